"""One line of the table of gates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """One line of the table: a number, and whether it passes if it is a gate.

    Attributes:
        name: what was measured.
        value: the number.
        passed: None where nothing is required.
        required: what of it, in words.
        note: what else there is to say.
    """

    name: str
    value: float
    passed: bool | None = None
    required: str = ""
    note: str = ""

    @classmethod
    def at_least(cls, name: str, value: float, gate: float, note: str = "") -> Result:
        """A gate that is red below a rate."""
        return cls(name, value, value >= gate, f">= {gate:.2f}", note)

    def __str__(self) -> str:
        verdict = "" if self.passed is None else f"{self.required} {'ok' if self.passed else 'RED'}"
        return f"{self.name:<52} {self.value:6.3f}  {verdict:<12} {self.note}".rstrip()

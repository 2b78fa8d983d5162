"""What every analysis takes and gives."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from diffusers_concept_maps.backbones import find_backbone, find_transformers
from diffusers_concept_maps.encoding import encode
from diffusers_concept_maps.errors import ConceptMapsValueError
from diffusers_concept_maps.evaluation.analysis._subjects import Subject
from diffusers_concept_maps.files import whole_file
from diffusers_concept_maps.maps import ConceptMaps
from diffusers_concept_maps.noising import check_levels

SCORES = {
    "average_precision": "average precision of the target's pixels",
    "mean_iou": "mean IoU of target and rest, map cut at its mean",
    "temporal_concordance": "temporal concordance: frames with the target ranked first",
}
"""What a map can be scored by, with the text that stands on an axis; all are fractions."""
MATRICES = ("head", "mean")
TOKENS = ("image", "joint")


@dataclass(frozen=True)
class Settings:
    """How clips are read, the same for all analyses.

    Attributes:
        score: one of `SCORES`.
        method: of the maps, as in `trace`.
        normalize: as in `trace`.
        noise_levels: fractions of the training schedule in (0, 1].
        seed: of the noise.
        size: `(height, width)` in pixels to scale clips to; None is what the model takes, see `encode`.
        num_frames: most frames to take; None likewise.
        call: further arguments of the pipeline's call.
        matrix: which transition matrix, one of `MATRICES`: every head's, or the mean of the heads'.
        tokens: over which tokens it goes, one of `TOKENS`.

    Raises:
        ConceptMapsValueError: a value that there is not.
    """

    score: str = "average_precision"
    method: str = "concept_attention"
    normalize: str | None = None
    noise_levels: tuple[float, ...] = (0.5,)
    seed: int = 0
    size: tuple[int, int] | None = None
    num_frames: int | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    matrix: str = "head"
    tokens: str = "image"

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        check_levels(self.noise_levels)
        for name, allowed in (("score", tuple(SCORES)), ("matrix", MATRICES), ("tokens", TOKENS)):
            if getattr(self, name) not in allowed:
                raise ConceptMapsValueError(
                    f"unknown {name} {getattr(self, name)!r}; expected one of {', '.join(allowed)}"
                )

    def read(self, pipe: Any, subject: Subject, **options: Any) -> ConceptMaps:
        """The maps of all layers of one clip.

        Args:
            pipe: a pipeline.
            subject: the clip.
            options: further ones of `encode`.
        """
        return encode(
            pipe,
            subject.frames,
            subject.concepts,
            noise_level=self.noise_levels,
            prompt=subject.caption,
            seed=self.seed,
            size=self.size,
            num_frames=self.num_frames,
            call=self.call,
            methods=[self.method],
            normalize=self.normalize,
            layers=range(depth(pipe)),
            **options,
        )

    def describe(self) -> str:
        """What the maps are made with, for the title of a picture."""
        levels = ", ".join(f"{level:g}" for level in self.noise_levels)
        return f"{self.method.replace('_', ' ')}, noise level {levels}"


@dataclass(frozen=True)
class Table:
    """Rows of a CSV file.

    Attributes:
        columns: their names.
        rows: as long as `columns` each; None is a value that is not defined, an empty field.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def write(self, path: Path) -> None:
        """Write a CSV file, whole or not at all."""
        with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows([_cell(value) for value in row] for row in self.rows)

    def markdown(self) -> str:
        """The table for a page, numbers to three decimals."""
        lines = [self.columns, ["---"] * len(self.columns), *([_short(value) for value in row] for row in self.rows)]
        return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


@dataclass(frozen=True)
class Findings:
    """What an analysis has found.

    Attributes:
        tables: by file name without suffix.
        figures: matplotlib figures, likewise.
        summary: what to print, and what to know of the numbers.
        pages: names of the tables that are written as markdown, too.
    """

    tables: Mapping[str, Table]
    figures: Mapping[str, Any]
    summary: Sequence[str]
    pages: Sequence[str] = ()

    def write(self, folder: Path) -> None:
        """Write the files into a folder that is there, each whole or not at all."""
        for name, table in self.tables.items():
            table.write(folder / f"{name}.csv")
        for name in self.pages:
            with whole_file(folder / f"{name}.md") as partial:
                partial.write_text(self.tables[name].markdown(), encoding="utf-8")
        for name, figure in self.figures.items():
            with whole_file(folder / f"{name}.png") as partial:
                figure.savefig(partial, dpi=130, metadata={"Software": None})  # the same bytes from every version


@dataclass(frozen=True)
class Analysis:
    """One analysis.

    Attributes:
        name: as on the command line.
        summary: in one line.
        run: from a pipeline, clips and settings to findings.
        noise_levels: what suits it, where the user names none; None is the command's default.
    """

    name: str
    summary: str
    run: Callable[[Any, Iterable[Subject], Settings], Findings]
    noise_levels: tuple[float, ...] | None = None


def depth(pipe: Any) -> int:
    """Number of layers of a pipeline's transformer."""
    transformer = find_transformers(pipe)[0]
    return len(find_backbone(transformer).sites(transformer))


def each(subjects: Iterable[Subject]) -> Iterator[Subject]:
    """The clips, with a progress bar.

    Raises:
        ConceptMapsValueError: there is none.
    """
    subject = None
    for subject in logging.tqdm(subjects, desc="clips", unit="clip"):
        yield subject
    if subject is None:
        raise ConceptMapsValueError("no clips to analyze; expected at least one with a target in it")


def mean(values: torch.Tensor, axis: int | tuple[int, ...] = 0) -> torch.Tensor:
    """Mean over what is defined (not NaN), in float64."""
    return values.double().nanmean(axis)


def number(value: float | torch.Tensor) -> float | None:
    """A number for a table, which has no NaN."""
    plain = float(value)
    return None if math.isnan(plain) else plain


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else value


def _short(value: Any) -> Any:
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else value

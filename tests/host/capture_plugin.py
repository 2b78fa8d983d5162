"""pytest plugin for diffusers' own tests: attaches a capture to every model they build, and notes how tests end.

`-p capture_plugin --outcomes FILE` writes the outcomes; `--attach-captures` patches, in that process alone, the
constructor of every transformer class that can be traced.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import JointBackbone, find_backbone, supported

_ADDRESS = re.compile(r"0x[0-9a-f]+")
_WORST_FIRST = ("failed", "skipped", "passed")
_CAPTURES: list[Any] = []
"""Handles of the captures that the current test has attached."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("captures")
    group.addoption("--attach-captures", action="store_true", help="attach a capture to every model that is built")
    group.addoption("--outcomes", type=Path, required=True, help="JSON file to write the outcome of every test to")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--attach-captures"):
        for name in supported():
            cls = getattr(diffusers, name)
            cls.__init__ = attaching(cls.__init__)
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist report to the process that started them
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What was captured travels with the last report of a test."""
    item.user_properties.append(("captures", [len(_CAPTURES), sum(map(has_maps, _CAPTURES))]))
    _CAPTURES.clear()


def attaching(construct: Callable[..., None]) -> Callable[..., None]:
    """A constructor that attaches a capture to what it has made; the signature stays, because diffusers reads it."""

    @functools.wraps(construct)
    def construct_and_attach(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if type(self).__init__ is construct_and_attach:  # a subclass is not complete yet
            _CAPTURES.append(attach(self))

    return construct_and_attach


def attach(transformer: Any) -> Any:
    """Attach a capture of two concepts by every method that the topology allows."""
    backbone = find_backbone(transformer)
    methods = ["cross_attention", "gramcol", "imap"]
    if isinstance(backbone, JointBackbone):
        methods.append("concept_attention")
    width = backbone.text_width(transformer)
    # No random numbers, which the test would miss, and a real device even where the model is built without one.
    embeds = torch.linspace(-1.0, 1.0, 2 * width, dtype=torch.float32, device="cpu").view(2, width)
    return dcm.attach(transformer, concept_embeds=embeds, methods=methods)


def has_maps(capture: Any) -> bool:
    """Whether anything has been recorded."""
    try:
        return bool(capture.maps["cond"].coverage["cross_attention"].any())
    except dcm.ConceptMapsError:
        return False


class Outcomes:
    """Outcomes of all tests, written as JSON `{test: {"outcome", "message", "captures"}}`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = self._tests.setdefault(report.nodeid, {"outcome": "passed", "message": ""})
        test["outcome"] = min(test["outcome"], report.outcome, key=_WORST_FIRST.index)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            test["message"] += _ADDRESS.sub("0x", crash.message if crash else report.longreprtext)
        test.update(report.user_properties)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._tests[report.nodeid] = {"outcome": "failed", "message": report.longreprtext, "captures": [0, 0]}

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._tests, indent=1))

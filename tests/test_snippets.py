"""Every snippet of the README and the documentation runs, and their command lines have options that exist."""

from __future__ import annotations

import argparse
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_wan
from diffusers import CogVideoXPipeline, WanPipeline
from PIL import Image
from tokenizers import normalizers

import diffusers_concept_maps as dcm
from diffusers_concept_maps.commands import load_commands
from diffusers_concept_maps.visualize.video import write_video

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(?:^<!-- not-run: (.*?) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEXTS = {
    str(page.relative_to(ROOT)): page.read_text(encoding="utf-8")
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
PAGES = {page: BLOCK.findall(text) for page, text in TEXTS.items()}
NOT_RUN: dict[tuple[str, str], int] = {}
"""How many snippets of a page cannot run, by page and reason."""
ELSEWHERE = ("docs/encode.md", "docs/visualize.md")  # test_docs runs them, with files that commands have written
KNOWN = {
    "dog": "circle",
    "running": "moving",
    "sand": "dark",
    "grass": "green",
    "sky": "blue",
    "beach": "background",
}
"""A word that the embedded model knows for each that is in a snippet and unknown to it."""
LANGUAGES = {"", "bash", "json", "python", "text", "toml"}


class StandIn(CogVideoXPipeline):
    """The embedded model in the place of a published one: same words for it, few steps, nothing to offload."""

    @functools.wraps(CogVideoXPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **{"num_inference_steps": 2, "max_sequence_length": 20} | kwargs)

    def enable_model_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """There is no accelerator."""


class SmallWan(WanPipeline):
    """A tiny Wan of random weights that by default makes a clip of its own size."""

    @functools.wraps(WanPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        small = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "max_sequence_length": 12}
        return super().__call__(*args, **small | kwargs)


def stand_in() -> StandIn:
    pipe = StandIn(**dcm.load_shapes_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(word, known) for word, known in KNOWN.items()]
    )
    return pipe


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What snippets may take for granted: a folder with a video, pipelines, and the usual imports."""
    monkeypatch.chdir(tmp_path)
    clip = (torch.rand(13, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255).byte()
    clip = clip.repeat_interleave(10, dim=2).repeat_interleave(10, dim=3)
    write_video("dog.mp4", _pictures(clip))
    load = CogVideoXPipeline.from_pretrained.__func__

    def from_pretrained(cls: Any, name: Any, **options: Any) -> Any:
        return load(cls, name, **options) if Path(name).is_dir() else stand_in()

    monkeypatch.setattr(CogVideoXPipeline, "from_pretrained", classmethod(from_pretrained))
    return {"torch": torch, "dcm": dcm, "pipe": stand_in(), "wan": SmallWan(**tiny_wan.make_pipeline().components)}


def _pictures(clip: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in clip]


@pytest.mark.parametrize(
    "page", [page for page, text in TEXTS.items() if "```python" in text and page not in ELSEWHERE]
)
def test_snippets_run_from_top_to_bottom(page: str, names: dict[str, Any]) -> None:
    pipe = names["pipe"]
    for section in re.split(r"^## ", TEXTS[page], flags=re.MULTILINE):
        if page == "README.md":  # each of its sections starts from the reader's own pipeline
            names["pipe"] = pipe
        for reason, language, source in BLOCK.findall(section):
            if language == "python" and not reason:
                exec(compile(source, page, "exec"), names)


def test_what_is_not_run_is_counted() -> None:
    found: dict[tuple[str, str], int] = {}
    for page, blocks in PAGES.items():
        for reason, _, _ in blocks:
            if reason:
                found[page, reason] = found.get((page, reason), 0) + 1
    assert found == NOT_RUN


def test_snippets_are_marked_with_their_language() -> None:
    assert {language for blocks in PAGES.values() for _, language, _ in blocks} <= LANGUAGES
    unmarked = [source for blocks in PAGES.values() for _, language, source in blocks if not language]
    assert not [source for source in unmarked if "concept-maps " in source or "import " in source]


def command_lines() -> Iterator[tuple[str, str]]:
    for page, blocks in PAGES.items():
        for _, language, source in blocks:
            lines = source.replace("\\\n", " ").splitlines() if language == "bash" else []
            yield from ((page, line[line.index("concept-maps ") :]) for line in lines if "concept-maps " in line)
    yield from (("README.md", line) for line in re.findall(r"`(concept-maps [^`]+)`", TEXTS["README.md"]))


@pytest.mark.parametrize(("page", "line"), list(command_lines()))
def test_command_lines_have_options_that_exist(page: str, line: str) -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for command in load_commands():
        command.register(commands)
    arguments = [argument for argument in shlex.split(line, comments=True)[1:] if argument != "..."]
    if "..." in line and arguments[-1].startswith("--"):
        arguments.append("left-out")
    parser.parse_args(arguments)

"""The file that maps of kept axes are streamed to: valid, whole or not there, and its size is known before."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps import detail

CONCEPTS = ["dog", "sky", "rock"]
METHODS = ["concept_attention", "cross_attention", "gramcol", "imap"]
PROMPTS = ["a red dog running on the beach", "the sky on a rock"]
STEPS, LAYERS, HEADS = 3, 3, 4
SIZE_OF_ALL = 4 * LAYERS * STEPS * HEADS * 2 * 3 * 45 * len(METHODS)


@cache
def pipeline() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def call(pipe: CogVideoXPipeline, prompt: Any = PROMPTS, **options: Any) -> torch.Tensor:
    return tiny.call(pipe, prompt, **options)


def traced(axes: Sequence[str], path: Path | None = None, **options: Any) -> dcm.ConceptMaps:
    settings = {"methods": METHODS, "normalize": "none", **options}
    with dcm.trace(pipeline(), CONCEPTS, detail=axes, detail_path=path, **settings) as maps:
        call(pipeline())
    return maps


def test_the_file_is_safetensors_with_one_json_entry(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    traced(("step", "layer"), path, layers=[0, 2], methods=["imap", "gramcol"], branch="both")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
        types = {file.get_slice(name).get_dtype() for name in shapes}
    assert list(metadata) == ["concept_maps"]
    assert json.loads(metadata["concept_maps"]) == {
        "format": "diffusers_concept_maps/detail/1",
        "axes": ["layer", "step", "row", "concept", "frame", "height", "width"],
        "concepts": CONCEPTS,
        "steps": [0, 1, 2],
        "layers": {"imap": [0, 2], "gramcol": [0, 2]},
    }
    assert types == {"F32"}
    assert shapes == {
        f"{branch}.{method}": [2, 3, 2, 3, *tiny.GRID]
        for branch in ("cond", "uncond")
        for method in ("imap", "gramcol")
    }
    with path.open("rb") as raw:  # the format asks for aligned data
        assert int.from_bytes(raw.read(8), "little") % 8 == 0
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_names_of_any_script(tmp_path: Path) -> None:
    names, embeds = ['"dog"', "chien \u00e9t\u00e9", "\u72d7\n"], torch.randn(3, 32)
    path = tmp_path / "maps.safetensors"
    with dcm.trace(pipeline(), names, concept_embeds=embeds, detail=("layer",), detail_path=str(path)) as maps:
        call(pipeline())
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["concept_maps"])["concepts"] == list(maps.concepts)
        assert torch.equal(file.get_tensor("cond.concept_attention"), maps.detail())


def test_a_file_of_kept_axes_is_no_file_of_maps(tmp_path: Path) -> None:
    traced(("layer",), tmp_path / "maps.safetensors")
    with pytest.raises(dcm.ConceptMapsError, match="has format 'diffusers_concept_maps/detail/1'; this version"):
        dcm.load(tmp_path / "maps.safetensors")


def test_a_saved_file_has_no_kept_axes(tmp_path: Path) -> None:
    maps = traced(("layer",))
    maps.save(tmp_path / "maps.safetensors")
    loaded = dcm.load(tmp_path / "maps.safetensors")
    assert torch.equal(loaded.get(), maps.get())
    with pytest.raises(dcm.ConceptMapsError, match="in the file of detail_path"):
        loaded.detail()


def test_the_file_may_have_any_name_and_replaces_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Karte ä.bin").write_text("something else")
    maps = traced(("layer",), Path("Karte ä.bin"))
    assert torch.equal(load_file("Karte ä.bin")["cond.imap"], maps.detail("imap"))


def test_the_file_appears_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    path.write_text("older")
    with dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=path):
        call(pipeline())
        assert path.read_text() == "older"
        assert len(list(tmp_path.iterdir())) == 2
    assert len(list(tmp_path.iterdir())) == 1
    assert load_file(path)


def test_what_is_written_into_the_maps_does_not_reach_the_file(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    maps = traced(("layer",), path)
    before = path.read_bytes()
    tensor = maps.detail()
    expected = tensor + 1
    assert torch.equal(tensor.add_(1), expected)
    assert path.read_bytes() == before
    del maps
    path.unlink()
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_file(raised: type[BaseException], tmp_path: Path) -> None:
    def traced_until_it_raises() -> None:
        with dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=tmp_path / "maps") as maps:
            seen.append(maps)
            call(pipeline())
            raise raised

    seen: list[dcm.ConceptMaps] = []
    with pytest.raises(raised):
        traced_until_it_raises()
    assert list(tmp_path.iterdir()) == []
    assert seen[0].get().shape == (2, 3, *tiny.GRID)
    with pytest.raises(dcm.ConceptMapsError, match="complete after the `with` block"):
        seen[0].detail()


def test_an_exception_within_the_run_leaves_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    path.write_text("older")

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    with (
        pytest.raises(RuntimeError, match="stop"),
        dcm.trace(pipeline(), CONCEPTS, detail=("layer", "step"), detail_path=path),
    ):
        call(pipeline(), callback_on_step_end=fail)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "older"


def test_a_second_run_that_raises_at_its_start_leaves_no_file(tmp_path: Path) -> None:
    def traced_twice() -> None:
        with dcm.trace(pipeline(), ["dog"], target="prompt", detail=("layer",), detail_path=tmp_path / "maps"):
            call(pipeline(), "a dog")
            assert len(list(tmp_path.iterdir())) == 1
            call(pipeline(), "the sky")

    with pytest.raises(dcm.ConceptMapsError, match="'dog' is not a word of the prompt 'the sky'"):
        traced_twice()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no memory map")

    monkeypatch.setattr(detail.np, "memmap", fail)
    with (
        pytest.raises(OSError, match="no memory map"),
        dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=tmp_path / "maps"),
    ):
        call(pipeline())
    assert list(tmp_path.iterdir()) == []


def test_the_room_is_taken_at_the_start(tmp_path: Path) -> None:
    """A sparse file would meet a full disk in the middle of a run, through the memory map."""
    sizes: list[os.stat_result] = []

    def look_and_stop(pipe: Any, *args: Any) -> dict[str, Any]:
        sizes.append(next(tmp_path.iterdir()).stat())
        pipe._interrupt = True
        return {}

    with dcm.trace(pipeline(), CONCEPTS, detail=("layer", "step", "head"), detail_path=tmp_path / "maps"):
        call(pipeline(), callback_on_step_end=look_and_stop, num_inference_steps=20)
    (size,) = sizes
    assert size.st_blocks * 512 >= size.st_size > 200_000


def test_a_disk_that_is_full_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail, raising=False)
    message = rf"^cannot reserve 0\.0 GB .* in '{tmp_path}': No space left on device; keep fewer axes, layers or steps"
    with (
        pytest.raises(dcm.ConceptMapsError, match=message),
        dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=tmp_path / "maps"),
    ):
        call(pipeline())
    assert list(tmp_path.iterdir()) == []


def test_a_system_that_cannot_reserve_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    maps = traced(("layer", "step"), tmp_path / "maps")
    assert torch.equal(maps.detail(), traced(("layer", "step")).detail())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_second_run_starts_anew(streamed: bool, tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors" if streamed else None
    with dcm.trace(pipeline(), CONCEPTS, detail=("layer", "step"), detail_path=path) as maps:
        call(pipeline(), PROMPTS[0], num_inference_steps=2)
        call(pipeline())
    alone = traced(("layer", "step"), methods=["concept_attention"], normalize=None)
    assert torch.equal(maps.detail(), alone.detail())
    assert maps.detail().shape == (LAYERS, STEPS, 2, 3, *tiny.GRID)
    assert len(list(tmp_path.iterdir())) == int(streamed)


def test_another_grid_in_a_second_run(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    with dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=path) as maps:
        call(pipeline())
        call(pipeline(), "a dog", height=64, width=48, num_frames=5)
    assert maps.detail().shape == (LAYERS, 1, 3, 2, 4, 3)
    assert load_file(path)["cond.concept_attention"].shape == maps.detail().shape


def test_nothing_was_run(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    with dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=path) as maps:
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(dcm.ConceptMapsError, match="if a run was recorded"):
        maps.detail()


def test_what_is_too_large_for_memory_needs_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = ("layer", "step", "head")
    monkeypatch.setattr(detail, "IN_MEMORY", SIZE_OF_ALL)
    assert traced(axes).detail().numel() * 4 * len(METHODS) == SIZE_OF_ALL
    monkeypatch.setattr(detail, "IN_MEMORY", SIZE_OF_ALL - 1)
    with pytest.raises(dcm.ConceptMapsError, match=r"would take 0\.0 GB of memory; pass detail_path="):
        traced(axes)
    assert traced(axes, tmp_path / "maps").detail().numel() * 4 * len(METHODS) == SIZE_OF_ALL


def test_what_is_too_large_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    asked = []

    def disk_usage(folder: Path) -> Any:
        asked.append(folder)
        return usage(10**9, 0, free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    free = SIZE_OF_ALL - 1
    with pytest.raises(dcm.ConceptMapsError, match=r"take 0\.0 GB, .* has 0\.0 GB left; keep fewer axes"):
        traced(("layer", "step", "head"), tmp_path / "maps")
    assert list(tmp_path.iterdir()) == []
    assert asked == [tmp_path]
    free = SIZE_OF_ALL
    traced(("layer", "step", "head"), tmp_path / "maps")


def test_the_size_is_told_before_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "maps.safetensors"
    with (
        caplog.at_level(logging.INFO, logger="diffusers_concept_maps"),
        dcm.trace(pipeline(), CONCEPTS, methods=METHODS, detail=("layer", "step", "head"), detail_path=path),
    ):
        call(pipeline(), num_inference_steps=STEPS)
    messages = [record.getMessage() for record in caplog.records if record.name == "diffusers_concept_maps.detail"]
    assert messages == [f"The maps of every kept axis take {SIZE_OF_ALL / 1e6:.1f} MB in {path}."]


def test_a_path_without_axes(tmp_path: Path) -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="detail_path is given without detail"),
        dcm.trace(pipeline(), CONCEPTS, detail_path=tmp_path / "maps"),
    ):
        pass


@pytest.mark.parametrize("place", ["", "missing/maps.safetensors"])
def test_a_path_where_no_file_can_be(place: str, tmp_path: Path) -> None:
    """Told before the pipeline starts, and before anything is attached."""
    processors = pipeline().transformer.attn_processors
    with (
        pytest.raises(dcm.ConceptMapsError, match="expected a file in a folder that exists"),
        dcm.trace(pipeline(), CONCEPTS, detail=("layer",), detail_path=tmp_path / place),
    ):
        pass
    assert pipeline().transformer.attn_processors == processors

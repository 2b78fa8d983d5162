"""Which files an export makes of which maps, at which size and in which scale; its manifest; its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from exported import CONCEPTS, GRID, decoded, detail_file, entries, gray_png, manifest, restored, scores
from safetensors.torch import save_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.fitting import Fit
from diffusers_concept_maps.maps import ConceptMaps, StoredMaps
from diffusers_concept_maps.visualize.export import ExportSettings, export, png
from diffusers_concept_maps.visualize.export.grid import _Layout, _spread

LAYERS, STEPS, HEADS = [1, 5], [0, 2, 7], [0, 1]
VALUES = scores(2, 3, 2, videos=2)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return detail_file(tmp_path / "maps.safetensors", VALUES, layer=LAYERS, step=STEPS, head=HEADS)


def stored(values: np.ndarray, concepts: tuple[str, ...] = CONCEPTS, **metadata: Any) -> ConceptMaps:
    tensors = {"imap": torch.from_numpy(values), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    return ConceptMaps(StoredMaps(concepts, tensors, metadata), ["imap"])


def close(folder: Path, entry: dict[str, Any], expected: np.ndarray) -> None:
    """The scores of a sequence, to a half of a level."""
    low, high = entry["scale"]
    error = np.abs(restored(gray_png(folder / entry["path"]), entry["scale"]) - expected)
    assert error.max() <= (high - low) / 65535 * 0.51 + 1e-6


def test_a_file_for_every_layer_step_and_head(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    export(file, out, ExportSettings(per=["head", "layer", "step"], video_index=1))
    listed = entries(out, kind="clip")
    assert len(listed) == 2 * 2 * 3 * 2
    for concept, layer, step, head in np.ndindex(2, 2, 3, 2):
        place = {"layer": LAYERS[layer], "step": STEPS[step], "head": HEADS[head]}
        (entry,) = entries(out, concept=CONCEPTS[concept], **place)
        name = f"layer-{place['layer']:02d}_step-{place['step']:03d}_head-{place['head']:02d}"
        assert entry["path"] == f"{concept:02d}_{CONCEPTS[concept]}/{name}"
        assert entry["frames"] == GRID[0]
        close(out, entry, VALUES[layer, step, head, 1, concept])
    found = {path.parent.relative_to(out).as_posix() for path in out.rglob("*.png")}
    assert found == {entry["path"] for entry in listed}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_manifest_says_where_the_maps_come_from(file: Path, tmp_path: Path) -> None:
    export(file, tmp_path / "out", ExportSettings(fps=5, video_index=1, concepts=["sky"], steps=[7, 0]))
    said = manifest(tmp_path / "out")
    assert said["source"] | {"metadata": None} == {
        "file": "maps.safetensors", "method": "imap", "video_index": 1, "grid": list(GRID), "metadata": None,
    }  # fmt: skip
    assert said["source"]["metadata"]["layers"] == {"imap": LAYERS}
    assert said["axes"] == {"layer": LAYERS, "step": [0, 7], "head": HEADS}
    expected = {
        "format": "diffusers_concept_maps/export/1", "concepts": ["sky"], "file_format": "png", "look": "gray",
        "scale": "clip", "fps": 5, "size": [5, 7], "token_frames": [0, 1, 2], "made_even": False,
    }  # fmt: skip
    assert {name: said[name] for name in expected} == expected
    assert said["score"] == "score = low + gray * (high - low), gray in 0..1, of `scale`"


def test_what_is_not_told_apart_is_averaged(file: Path, tmp_path: Path) -> None:
    settings = ExportSettings(per=["step"], layers=[5], steps=[2, 7], concepts=["sky"], file_format="ffv1")
    export(file, tmp_path / "out", settings)
    assert [entry["path"] for entry in entries(tmp_path / "out")] == ["01_sky/step-002.mkv", "01_sky/step-007.mkv"]
    for step, entry in zip((1, 2), entries(tmp_path / "out"), strict=True):
        found = restored(decoded(tmp_path / "out" / entry["path"], "gray16le", 1)[..., 0], entry["scale"])
        low, high = entry["scale"]
        expected = VALUES[1, step, :, 0, 1].astype(np.float64).mean(0)
        assert np.abs(found - expected).max() <= (high - low) / 65535 * 0.51 + 1e-6


def test_what_was_not_recorded_is_named_and_has_no_part_in_means(tmp_path: Path) -> None:
    values = scores(2, 3)
    values[:, 1] = np.nan
    values[1, 2] = np.nan
    file = detail_file(tmp_path / "maps.safetensors", values, layer=LAYERS, step=STEPS)
    export(file, tmp_path / "a", ExportSettings(products=["clips", "sharpening"], per=["step"], concepts=["dog"]))
    clips = entries(tmp_path / "a", kind="clip")
    assert [entry["path"] for entry in clips] == ["00_dog/step-000", None, "00_dog/step-007"]
    close(tmp_path / "a", clips[0], values[:, 0, 0, 0].astype(np.float64).mean(0))
    close(tmp_path / "a", clips[2], values[0, 2, 0, 0])
    (sharpening,) = entries(tmp_path / "a", kind="sharpening")
    assert (sharpening["steps"], sharpening["frames"]) == ([0, 7], 2)
    values[:] = np.nan
    empty = detail_file(tmp_path / "maps.safetensors", values, layer=LAYERS, step=STEPS)
    export(empty, tmp_path / "b", ExportSettings(products=["clips", "sharpening", "grid"], columns="layer"))
    assert [entry["path"] for entry in entries(tmp_path / "b")] == [None] * 4 + ["grid_layer"]


@pytest.mark.parametrize("score", [np.nan, np.inf])
def test_scores_that_are_no_numbers_are_refused(score: float, tmp_path: Path) -> None:
    values = scores(2)
    values[1, 0, 1, 2, 3, 4] = score
    file = detail_file(tmp_path / "maps.safetensors", values, layer=LAYERS)
    message = "the map of 'sky' at {'layer': 5} has scores that are infinite or no numbers"
    with pytest.raises(ConceptMapsValueError, match=message):
        export(file, tmp_path / "out", ExportSettings(per=["layer"]))


def test_scales(file: Path, tmp_path: Path) -> None:
    for scale in ("clip", "file", "frame"):
        out = tmp_path / scale
        export(file, out, ExportSettings(per=["layer", "step", "head"], concepts=["sky"], scale=scale))
        for entry in entries(out):
            layer, step, head = (
                numbers.index(entry[axis]) for axis, numbers in (("layer", LAYERS), ("step", STEPS), ("head", HEADS))
            )
            clip = VALUES[layer, step, head, 0, 1]
            expected = {
                "clip": [VALUES[:, :, :, 0, 1].min(), VALUES[:, :, :, 0, 1].max()],
                "file": [clip.min(), clip.max()],
                "frame": [[frame.min(), frame.max()] for frame in clip],
            }[scale]
            assert np.array_equal(np.asarray(entry["scale"], np.float32), np.asarray(expected, np.float32))
            if scale == "frame":
                pixels = gray_png(out / entry["path"])
                for frame, own, shown in zip(clip, entry["scale"], pixels, strict=True):
                    assert np.abs(restored(shown, own) - frame).max() <= (own[1] - own[0]) / 65535 * 0.51 + 1e-6


def test_a_map_that_is_constant_is_black_and_restored(tmp_path: Path) -> None:
    export(stored(np.full((1, 2, *GRID), 0.25, np.float32)), tmp_path / "out")
    for entry in entries(tmp_path / "out"):
        pixels = gray_png(tmp_path / "out" / entry["path"])
        assert pixels.max() == 0
        assert np.array_equal(restored(pixels, entry["scale"]), np.full(GRID, 0.25))


def test_sharpening_goes_through_the_steps(file: Path, tmp_path: Path) -> None:
    settings = ExportSettings(products=["sharpening"], layers=[1], heads=[1])
    export(file, tmp_path / "out", replace(settings, frame=2))
    export(file, tmp_path / "middle", settings)
    for concept, entry in enumerate(entries(tmp_path / "out")):
        assert entry["path"] == f"sharpening/{concept:02d}_{CONCEPTS[concept]}"
        assert (entry["steps"], entry["token_frame"]) == (STEPS, 2)
        close(tmp_path / "out", entry, VALUES[0, :, 1, 0, concept, 2])
    for concept, entry in enumerate(entries(tmp_path / "middle")):
        assert entry["token_frame"] == 1
        close(tmp_path / "middle", entry, VALUES[0, :, 1, 0, concept, 1])


def test_grid_has_a_row_for_each_concept_and_a_column_for_each_step(tmp_path: Path) -> None:
    values = scores(2, 3)
    values[:, 1, 0, 0] = np.nan
    file = detail_file(tmp_path / "maps.safetensors", values, layer=LAYERS, step=STEPS)
    export(file, tmp_path / "out", ExportSettings(products=["grid"], smooth=False, file_format="ffv1"))
    (entry,) = entries(tmp_path / "out")
    assert (entry["kind"], entry["path"], entry["frames"]) == ("grid", "grid_step.mkv", 3)
    assert (entry["rows"], entry["columns"]) == (list(CONCEPTS), {"step": STEPS})
    pages = decoded(tmp_path / "out" / "grid_step.mkv", "rgb48le", 3) / 65535
    layout = _Layout(2, 3, GRID[1:])
    assert list(pages.shape[1:3]) == entry["size"] == list(layout.size)
    height, width = layout.cell
    assert (height, width) == (5 * 14, 7 * 14)
    inferno = np.asarray(matplotlib.colormaps["inferno"].colors)
    means = values[:, :, 0].astype(np.float64).mean(0)  # [step, concept, frame, height, width]
    for concept in range(2):
        recorded = means[[0, 2] if concept == 0 else [0, 1, 2], concept].astype(np.float32)
        low, high = entry["scales"][concept]
        assert (np.float32(low), np.float32(high)) == (recorded.min(), recorded.max())
        for step, frame in np.ndindex(3, 3):
            top, left = layout.corner(concept, step)
            cell = pages[frame, top : top + height, left : left + width]
            if (concept, step) == (0, 1):
                assert np.abs(cell - 0.5).max() < 1e-4
                continue
            share = (means[step, concept, frame].astype(np.float32).astype(np.float64) - low) / (high - low)
            expected = inferno[np.minimum(share * 256, 255).astype(int)].repeat(14, 0).repeat(14, 1)
            assert np.abs(cell - expected).max() < 1e-4
    labels = pages[0, :, :128]
    assert labels.min() < 0.3  # there is text


def test_columns_of_a_long_axis_are_spread() -> None:
    assert _spread(tuple(range(0, 100, 2)), 12)[:3] == [0, 8, 18]
    assert _spread(tuple(range(50)), 3) == [0, 24, 49]
    assert _spread((4, 9), 12) == [4, 9]


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize(("size", "frames"), [("video", 9), ((40, 60), 9), ((40, 60), None)])
def test_sizes_are_those_of_upsample(size: Any, frames: int | None, smooth: bool, tmp_path: Path) -> None:
    maps = stored(scores(grid=(3, 4, 6))[0][None], frames_per_latent=4)
    video = None if frames is None else (frames, 32, 48)
    export(maps, tmp_path / "out", ExportSettings(size=size, video=video, smooth=smooth, scale="file"))
    pixels = (32, 48) if size == "video" else size
    expected = maps.upsample(pixels, frames or 3, mode="bilinear" if smooth else "nearest")[0]
    assert manifest(tmp_path / "out")["size"] == list(pixels)
    for concept, entry in enumerate(entries(tmp_path / "out")):
        close(tmp_path / "out", entry, expected[concept].numpy())


def test_maps_of_a_clip_know_its_size_and_what_was_padded(tmp_path: Path) -> None:
    fit = Fit(source=(7, 30, 42), model=(9, 16, 24), padding=2)
    maps = stored(scores(grid=(3, 4, 6))[0][None], source=fit.to_json(), frames_per_latent=4)
    maps.save(tmp_path / "maps.safetensors")
    export(tmp_path / "maps.safetensors", tmp_path / "out", ExportSettings(size="video"))
    for concept, entry in enumerate(entries(tmp_path / "out")):
        close(tmp_path / "out", entry, maps.upsample()[0, concept].numpy())


def test_names_cannot_leave_the_folder_or_meet(tmp_path: Path) -> None:
    names = ("../../dog", "dog", "Dog!", "..", "/etc/passwd", "犬")
    values = scores(concepts=6)[0][None]
    export(stored(values, names), tmp_path / "a" / "out")
    paths = [entry["path"] for entry in entries(tmp_path / "a" / "out")]
    assert paths == [
        "00_dog/mean", "01_dog/mean", "02_dog/mean", "03_concept/mean", "04_etc-passwd/mean", "05_concept/mean",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert manifest(tmp_path / "a" / "out")["concepts"] == list(names)


@pytest.mark.parametrize("raised", [OSError("the disk is full"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(
    raised: BaseException, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[np.ndarray] = []

    def encode(frame: np.ndarray) -> bytes:
        written.append(frame)
        if len(written) == 5:
            raise raised
        return b""

    monkeypatch.setattr(png, "encode", encode)
    with pytest.raises(type(raised)):
        export(file, tmp_path / "new" / "out", ExportSettings(per=["layer"]))
    assert os.listdir(tmp_path) == ["maps.safetensors"]


def test_a_folder_that_is_not_empty_is_refused(file: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    export(file, tmp_path / "empty")
    assert (tmp_path / "empty" / "manifest.json").is_file()
    before = (tmp_path / "empty" / "manifest.json").read_bytes()
    for taken in ("empty", "maps.safetensors"):
        with pytest.raises(ConceptMapsError, match=f"{taken}' is there already and not empty; name a new folder"):
            export(file, tmp_path / taken)
    assert (tmp_path / "empty" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": ["row"]}, "per is \\['row'\\]; expected a list out of layer, step, head"),
        ({"per": "step"}, "per is 'step'; expected a list"),
        ({"products": ["film"]}, "products is \\['film'\\]; expected a list out of clips, grid, sharpening"),
        ({"products": "grid"}, "products is 'grid'; expected a list"),
        ({"columns": "frame"}, "columns is 'frame'; expected one of layer, step, head"),
        ({"file_format": "gif"}, "file_format is 'gif'; expected one of png, exr, ffv1, prores, h264"),
        ({"look": "pretty"}, "look is 'pretty'; expected one of gray, color, overlay, matte"),
        ({"scale": "own"}, "scale is 'own'; expected one of clip, file, frame"),
        ({"fps": 0}, "fps is 0 and most_columns 12; expected at least 1 of each"),
        ({"most_columns": 0}, "fps is 8 and most_columns 0; expected"),
        ({"layers": [1, 3]}, "layers are \\[1, 3\\]; these maps have 1, 5"),
        ({"heads": []}, "heads are \\[\\]; these maps have 0, 1"),
        ({"concepts": ["cat"]}, "there are no maps of \\['cat'\\]; they are of 'dog', 'sky'"),
        ({"concepts": []}, "there are no maps of no concept"),
        ({"video_index": 2}, "video_index is 2; there are maps of 2 videos, counted from 0"),
        ({"frame": 3}, "frame is 3; these maps have 3 token frames, from 0 on"),
        ({"size": "video"}, "size is 'video', and these maps do not say how large theirs was"),
        ({"size": "huge"}, "size is 'huge'; expected 'token', 'video', or a height and width"),
        ({"size": (0, 5)}, "size is \\(0, 5\\); expected 'token', 'video'"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match=message):
        export(file, tmp_path / "out", ExportSettings(**options))
    assert os.listdir(tmp_path) == ["maps.safetensors"]


def test_axes_that_were_not_kept_are_asked_for(tmp_path: Path) -> None:
    file = detail_file(tmp_path / "maps", scores(2), layer=LAYERS)
    message = (
        r"step and head cannot be told apart in these maps, which have kept only layer; .*detail=\['step', 'head'\]"
    )
    with pytest.raises(ConceptMapsValueError, match=message):
        export(file, tmp_path / "out", ExportSettings(products=["clips", "sharpening"], per=["head"]))
    with pytest.raises(ConceptMapsValueError, match="layer cannot be told apart in these maps, which have kept none"):
        export(stored(scores()[None]), tmp_path / "out", ExportSettings(per=["layer"]))


def test_files_that_hold_no_maps(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsValueError, match="has no maps 'uncond.imap' .branch.method.; it has cond.imap"):
        export(file, tmp_path / "out", branch="uncond")
    with pytest.raises(ConceptMapsValueError, match="has no maps 'cond.gramcol'"):
        export(file, tmp_path / "out", method="gramcol")
    header = {"concept_maps": json.dumps({"format": "diffusers_concept_maps/detail/1", "axes": ["layer"]})}
    save_file({"cond.imap": torch.zeros(1)}, tmp_path / "damaged", metadata=header)
    with pytest.raises(ConceptMapsError, match=r"as maps of kept axes: damaged metadata \(KeyError\('layers'\)\)"):
        export(tmp_path / "damaged", tmp_path / "out")
    (tmp_path / "text").write_text("no safetensors")
    for name in ("text", "missing"):
        with pytest.raises(ConceptMapsError, match=f"cannot read '.*{name}' as concept maps"):
            export(tmp_path / name, tmp_path / "out")
    save_file({"a": torch.zeros(1)}, tmp_path / "others")
    with pytest.raises(ConceptMapsError, match="is a safetensors file without concept maps"):
        export(tmp_path / "others", tmp_path / "out")
    with pytest.raises(ConceptMapsValueError, match="method 'imaps' was not captured"):
        export(stored(scores()[None]), tmp_path / "out", method="imaps")


def test_memory_does_not_grow_with_layers_and_steps(tmp_path: Path) -> None:
    settings = ExportSettings(
        products=["clips", "sharpening", "grid"], per=["layer", "step"], most_columns=2, size=(32, 32)
    )
    peaks = []
    for count in (2, 2, 12):  # the first run imports and fills caches
        file = detail_file(tmp_path / "maps", scores(count, count), layer=list(range(count)), step=list(range(count)))
        tracemalloc.start()
        export(file, tmp_path / f"out{len(peaks)}", settings)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] * 1.2


def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The operating system counts the pages of a file that is mapped, too."""
    for name, layers in (("small", 1), ("large", 32)):
        values = np.zeros((layers, 16, 1, 1, 8, 64, 64), np.float32)
        detail_file(tmp_path / name, values, layer=list(range(layers)), step=list(range(16)))
    assert (tmp_path / "large").stat().st_size > 64e6
    source = """if True:
        import json, resource, sys
        from diffusers_concept_maps.visualize.export import ExportSettings, export
        peaks = []
        for name in ("small", "large"):
            export(name, name + "-out", ExportSettings(products=["clips", "sharpening"], per=["step"]))
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        print(json.dumps(peaks))
    """
    root = Path(dcm.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels" / "torch-ext"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        check=True,
    )
    small, large = json.loads(done.stdout)
    assert large - small < 16_000  # kilobytes

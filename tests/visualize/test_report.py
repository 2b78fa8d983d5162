"""The page as a file: what is in it, how large it is, that nothing in it leads outside, and what is refused."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import diffusers_concept_maps as dcm
from diffusers_concept_maps import cli
from diffusers_concept_maps.correspondence.output import TrackOutput
from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.fitting import Fit
from diffusers_concept_maps.maps import ConceptMaps, StoredMaps
from diffusers_concept_maps.visualize.report import write_report
from diffusers_concept_maps.visualize.report._frames import encoded
from diffusers_concept_maps.visualize.report._numbers import coarser

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><img src=x onerror=alert(1)>"


class Page(HTMLParser):
    """The elements of a page, and the text of its scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:  # within a script or style
            tag, attributes = self.elements[-1]
            name = attributes.get("id") or tag
            self.texts[name] = self.texts.get(name, "") + data


def some_maps(
    concepts: tuple[str, ...] = ("dog", "running"), grid: tuple[int, ...] = (3, 4, 5), **known: object
) -> ConceptMaps:
    scores = torch.randn(1, len(concepts), *grid, generator=torch.Generator().manual_seed(2))
    tensors = {"imap": scores, "coverage.imap": torch.ones(2, 6, dtype=torch.bool)}
    return ConceptMaps(StoredMaps(concepts, tensors, known), ["imap"])


def data_of(path: Path) -> dict[str, Any]:
    return json.loads(Page(path).texts["data"])


def numbers_of(entry: dict[str, Any], kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(entry["data"]), kind).reshape(-1, len(entry["low"]), *entry["grid"])


def test_nothing_in_it_leads_outside(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    some_maps().report(path, torch.rand(9, 3, 16, 20))
    page, text = Page(path), path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|[\"'(=]//|@import|url\(", text.replace(page.texts["data"], ""), re.IGNORECASE)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "style"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#")), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert all(frame.startswith("data:image/webp;base64,") for frame in data_of(path)["frames"])
    (policy,) = [a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in str(policy).split(";"))
    digests = {
        name: f"'sha256-{base64.b64encode(hashlib.sha256(page.texts[name].encode()).digest()).decode()}'"
        for name in ("style", "script")
    }
    assert rules == {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": digests["style"],
        "script-src": digests["script"],
        "base-uri": "'none'",
        "form-action": "'none'",
    }


def test_text_of_a_user_is_data_only(tmp_path: Path) -> None:
    strange = (HOSTILE, "<!--<script>", "@SCRIPT@ & \u2028\u2029", 'é"\\')
    path = tmp_path / "report.html"
    some_maps(strange, note=HOSTILE).report(path, title=HOSTILE)
    page = Page(path)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in {tag for tag, _ in page.elements}
    assert not set("<>&\u2028\u2029") & set(page.texts["data"])
    data = data_of(path)
    assert tuple(data["concepts"]) == strange
    assert data["title"] == data["metadata"]["note"] == HOSTILE
    some_maps().report(tmp_path / "plain.html")
    assert page.texts["script"] == Page(tmp_path / "plain.html").texts["script"]


@pytest.mark.parametrize("noise", [0.03, 1.0])
def test_a_clip_of_a_common_size_stays_small(tmp_path: Path, noise: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.linspace(0, 6, 480), torch.linspace(0, 9, 720), indexing="ij")
    frames = torch.stack([(rows * columns / 9 + t / 8).sin() / 2 + 0.5 for t in range(49)])[:, None].repeat(1, 3, 1, 1)
    frames = (frames * (1 - noise) + noise * torch.rand(frames.shape, generator=generator)).clamp(0, 1)
    path = tmp_path / "report.html"
    some_maps(tuple(f"concept {i}" for i in range(8)), (13, 30, 45)).report(path, frames)
    assert 100_000 < path.stat().st_size < 5_000_000
    assert len(data_of(path)["frames"]) == 49


def test_scores_are_kept_in_16_bits(tmp_path: Path) -> None:
    maps = some_maps(frames_per_latent=4, latents_per_token=1)
    maps.report(tmp_path / "a.html", torch.rand(9, 3, 16, 20))
    data = data_of(tmp_path / "a.html")
    entry = data["methods"][0]["scores"]
    scores = maps.get()[0].double().numpy()
    low, high = (np.array(entry[name])[:, None, None, None] for name in ("low", "high"))
    assert np.array_equal(low.ravel(), scores.min((1, 2, 3)))
    assert np.array_equal(high.ravel(), scores.max((1, 2, 3)))
    restored = low + numbers_of(entry, "<u2")[0] / 65535 * (high - low)
    assert np.abs(restored - scores).max() <= (high - low).max() / 65535 / 2 * 1.001
    assert data["tokens"] == [0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert data["size"] == [16, 20]


def test_small_frames_are_exact(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (3, 16, 20, 3), generator=torch.Generator().manual_seed(1)).byte().numpy()
    some_maps().report(tmp_path / "a.html", frames)
    for url, frame in zip(data_of(tmp_path / "a.html")["frames"], frames, strict=True):
        (tmp_path / "a.webp").write_bytes(base64.b64decode(url.split(",")[1]))
        assert np.array_equal(np.asarray(Image.open(tmp_path / "a.webp").convert("RGB")), frame)


def test_frames_become_smaller_where_no_quality_does() -> None:
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (192, 256, 3), np.uint8)) for _ in range(10)]
    sizes = {}
    for budget in (2_000_000, 400_000, 30_000):
        urls = encoded(pictures, budget)
        assert len(urls) == 10
        assert sum(map(len, urls)) <= budget
        sizes[budget] = {Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size for url in urls}
    assert sizes == {2_000_000: {(256, 192)}, 400_000: {(256, 192)}, 30_000: {(128, 96)}}
    assert len(encoded(pictures, 1)) == 10


class FreshMaps(StoredMaps):
    """Maps that keep every axis: of 6 layers, 4 steps and 8 heads."""

    def detail(self, method: str) -> torch.Tensor:
        return torch.rand(6, 4, 8, *self.tensors[method].shape, generator=torch.Generator().manual_seed(6))


def test_kept_axes_stay_small(tmp_path: Path) -> None:
    tensors = {"imap": torch.rand(1, 8, 13, 15, 22), "coverage.imap": torch.ones(4, 6, dtype=torch.bool)}
    known = {"detail": ["layer", "step", "head"], "methods": {"imap": {"layers": list(range(6))}}}
    fresh = FreshMaps(tuple(f"concept {i}" for i in range(8)), tensors, known)
    ConceptMaps(fresh, ["imap"]).report(tmp_path / "a.html")
    shown = data_of(tmp_path / "a.html")["methods"][0]["panels"]
    pooled = torch.nn.functional.adaptive_avg_pool3d
    kept = fresh.detail("imap")[:, :, :, 0].double()
    means = {"layer": kept.mean((1, 2)), "step": kept.mean((0, 2)), "head": kept.mean(1).flatten(0, 1)}
    assert {axis: entry["grid"] for axis, entry in shown.items()} == {
        "layer": [13, 15, 22],
        "step": [13, 15, 22],
        "head": [7, 8, 11],
    }
    for axis, mean in means.items():
        entry = shown[axis]
        low, high = (np.array(entry[name])[:, None, None, None] for name in ("low", "high"))
        restored = low + numbers_of(entry, "u1") / 254 * (high - low)
        assert np.abs(restored - pooled(mean, entry["grid"]).numpy()).max() < (high - low).max() / 254 / 2 * 1.001
        assert len(entry["data"]) <= 300_000 * 4 / 3 + 4


def test_a_constant_map_is_no_division_by_zero(tmp_path: Path) -> None:
    tensors = {"imap": torch.full((1, 1, 2, 3, 3), 7.0), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    ConceptMaps(StoredMaps(("dog",), tensors), ["imap"]).report(tmp_path / "a.html")
    entry = data_of(tmp_path / "a.html")["methods"][0]["scores"]
    assert (entry["low"], entry["high"], numbers_of(entry, "<u2").max()) == ([7.0], [7.0], 0)


def test_frames_that_the_model_has_not_seen_are_left_out(tmp_path: Path) -> None:
    fit = Fit((12, 16, 20), (9, 16, 20), 0)
    some_maps(source=fit.to_json(), frames_per_latent=4).report(tmp_path / "a.html", torch.rand(12, 3, 16, 20))
    data = data_of(tmp_path / "a.html")
    assert len(data["frames"]) == len(data["tokens"]) == 9


def detail_file(path: Path, concepts: tuple[str, ...] = ("dog", "running")) -> torch.Tensor:
    """What a capture with `detail=("layer",)` streams to a file."""
    kept = torch.randn(2, 1, len(concepts), 3, 4, 5, generator=torch.Generator().manual_seed(4))
    header = {"axes": ["layer", "row", "concept"], "concepts": concepts, "steps": [], "layers": {"imap": [3, 5]}}
    save_file({"cond.imap": kept}, path, metadata={"concept_maps": json.dumps(header)})
    return kept


def test_kept_axes_out_of_a_file(tmp_path: Path) -> None:
    kept = detail_file(tmp_path / "kept.safetensors")
    some_maps().report(tmp_path / "a.html", detail=tmp_path / "kept.safetensors")
    shown = data_of(tmp_path / "a.html")["methods"][0]["panels"]
    assert list(shown) == ["layer"]
    assert shown["layer"]["names"] == [3, 5]
    low, high = (np.array(shown["layer"][name])[:, None, None, None] for name in ("low", "high"))
    restored = low + numbers_of(shown["layer"], "u1") / 254 * (high - low)
    assert np.abs(restored - kept[:, 0].numpy()).max() <= (high - low).max() / 254 / 2 * 1.001


def test_kept_axes_that_do_not_fit(tmp_path: Path) -> None:
    detail_file(tmp_path / "other.safetensors", ("cat", "running"))
    detail_file(tmp_path / "kept.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    out = tmp_path / "a.html"
    with pytest.raises(ConceptMapsValueError, match="of the concepts 'cat', 'running'; expected"):
        some_maps().report(out, detail=tmp_path / "other.safetensors")
    for name in ("missing", "foreign"):
        with pytest.raises(ConceptMapsError, match=rf"cannot read '.*{name}.safetensors' as maps of kept axes"):
            some_maps().report(out, detail=tmp_path / f"{name}.safetensors")
    maps = some_maps()
    two = StoredMaps(maps.concepts, {"imap": maps.get().repeat(2, 1, 1, 1, 1), "coverage.imap": maps.coverage["imap"]})
    with pytest.raises(ConceptMapsValueError, match="index is 1; expected a video of the batch, 0 to 0"):
        ConceptMaps(two, ["imap"]).report(out, detail=tmp_path / "kept.safetensors", index=1)
    assert not out.exists()


@pytest.mark.parametrize(
    ("grid", "cells", "expected"),
    [
        ((13, 30, 45), 20000, (13, 30, 45)),
        ((13, 30, 45), 17549, (13, 15, 23)),
        ((13, 30, 45), 700, (7, 8, 12)),
        ((13, 30, 45), 3, (1, 1, 2)),
        ((1, 30, 45), 0, (1, 1, 1)),
    ],
)
def test_coarser(grid: tuple[int, int, int], cells: int, expected: tuple[int, int, int]) -> None:
    assert coarser(grid, cells) == expected


def tracks_of(frames: int) -> TrackOutput:
    visible = torch.ones(2, frames, dtype=torch.bool)
    return TrackOutput(torch.rand(2, frames, 2), visible, visible.float(), torch.zeros(2, 3))


def test_tracks_are_in_the_page(tmp_path: Path) -> None:
    tracks = tracks_of(4)
    tracks.report(tmp_path / "a.html", torch.rand(4, 3, 16, 20), maps=some_maps())
    data = data_of(tmp_path / "a.html")
    places = np.frombuffer(base64.b64decode(data["tracks"]["places"]), "<f4").reshape(2, 4, 2)
    assert np.array_equal(places, tracks.tracks.numpy())
    assert len(data["methods"]) == 1


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    out, frames = tmp_path / "a.html", torch.rand(4, 3, 16, 20)
    with pytest.raises(ConceptMapsValueError, match="neither maps nor tracks; expected"):
        write_report(out, frames=frames)
    with pytest.raises(ConceptMapsValueError, match="tracks without frames; expected"):
        write_report(out, some_maps(), tracks=tracks_of(4))
    with pytest.raises(ConceptMapsValueError, match="tracks through 5 frames over 4; expected"):
        tracks_of(5).report(out, frames)
    for fps in (0, 241, float("nan")):
        with pytest.raises(ConceptMapsValueError, match=f"fps is {fps}; expected"):
            some_maps().report(out, fps=fps)
    for index in (-1, 1):
        with pytest.raises(ConceptMapsValueError, match=f"index is {index}; expected a video of the batch, 0 to 0"):
            some_maps().report(out, index=index)
    broken = some_maps()
    broken.get()[0, 0, 0, 0, 0] = torch.nan
    with pytest.raises(ConceptMapsValueError, match="infinite or not a number"):
        broken.report(out)
    assert not list(tmp_path.iterdir())


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.html"
    out.write_text("before")
    with pytest.raises(ConceptMapsError, match="there is no folder"):
        some_maps().report(tmp_path / "none" / "a.html")

    def full(path: Path, text: str, **options: object) -> None:
        path.write_bytes(text[:100].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space left"):
        some_maps().report(out)
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
    assert out.read_bytes() == b"before"


def test_render(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = some_maps()
    maps.save(tmp_path / "maps.safetensors")
    (tmp_path / "clip").mkdir()
    for number in range(5):
        Image.new("RGB", (20, 16), (50 * number, 0, 0)).save(tmp_path / "clip" / f"{number}.png")
    detail_file(tmp_path / "kept.safetensors")
    given = ["render", str(tmp_path / "maps.safetensors"), "--out", str(tmp_path / "a.html")]
    assert cli.main([*given, "--video", str(tmp_path / "clip"), "--detail", str(tmp_path / "kept.safetensors")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'a.html'}\n"
    data = data_of(tmp_path / "a.html")
    assert (len(data["frames"]), data["fps"], data["title"]) == (5, 8, "clip")
    assert list(data["methods"][0]["panels"]) == ["layer"]
    assert cli.main([*given, "--fps", "3", "--title", HOSTILE]) == 0
    data = data_of(tmp_path / "a.html")
    assert (data["frames"], data["fps"], data["title"]) == ([], 3, HOSTILE)
    assert cli.main([*given, "--index", "4"]) == 2
    assert "index is 4; expected" in capsys.readouterr().err


def test_generate_and_encode_write_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--steps", "1", "--report", "--out", str(tmp_path / "made")]) == 0
    assert capsys.readouterr().out.endswith("contact_sheet.png, maps.safetensors, report.html\n")
    data = data_of(tmp_path / "made" / "report.html")
    assert data["concepts"] == ["red", "blue", "background"]
    assert len(data["frames"]) == len(data["tokens"]) == 6
    video = str(tmp_path / "made" / "video.mp4")
    given = ["encode", video, "--concepts", "red", "blue", "--fps", "5", "--out", str(tmp_path / "read")]
    assert cli.main([*given, "--report", "--prompt", "a red circle"]) == 0
    data = data_of(tmp_path / "read" / "report.html")
    assert (data["title"], data["fps"], len(data["frames"])) == ("video.mp4: a red circle", 5, 6)
    assert cli.main(given) == 0
    assert capsys.readouterr().out.endswith("contact_sheet.png, maps.safetensors\n")


def test_track_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("RGB", (32, 32), (60 * number, 0, 0)) for number in range(4)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=200)
    given = ["track", str(tmp_path / "clip.gif"), "--points", "0,12,14", "3,20,5", "--layers", "3"]
    assert cli.main([*given, "--report", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("tracks.npz, tracks.mp4, report.html\n")
    data = data_of(tmp_path / "out" / "report.html")
    tracks = TrackOutput.load(tmp_path / "out" / "tracks.npz")
    assert (data["title"], data["fps"], len(data["frames"]), data["methods"]) == ("clip.gif", 5, 4, [])
    assert base64.b64decode(data["tracks"]["places"]) == tracks.tracks.numpy().astype("<f4").tobytes()
    visible = np.frombuffer(base64.b64decode(data["tracks"]["visible"]), np.uint8)
    assert np.array_equal(visible.reshape(2, 4), tracks.visibility.numpy())


def test_the_page_of_the_documentation_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for language, source in re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if language == "bash":
            for line in source.splitlines():
                assert cli.main(shlex.split(line)[1:]) == 0
        else:
            exec(source, names)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "encoded", "again.html", "tracks", "report.html"}
    assert data_of(tmp_path / "again.html")["concepts"] == ["red", "blue", "background"]
    shown = data_of(tmp_path / "report.html")["methods"][0]["panels"]
    assert {axis: entry["names"] for axis, entry in shown.items()} == {
        "layer": [2, 3, 4],
        "step": list(range(20)),
        "head": [0, 1, 2, 3],
    }
    assert shown["head"]["rows"] == [2, 3, 4]
    # The kept axes average to what the layers show, whatever the bits they are stored in.
    entry = shown["layer"]
    mean = names["maps"].detail().nanmean((1, 2))[:, 0].double().numpy()
    low, high = (np.array(entry[name])[:, None, None, None] for name in ("low", "high"))
    restored = low + numbers_of(entry, "u1") / 254 * (high - low)
    assert np.abs(restored - mean).max() <= (high - low).max() / 254 / 2 * 1.001
    with Image.open(ROOT / "docs" / "images" / "report.png") as picture:
        assert picture.width > 1000


def test_kept_axes_of_what_was_encoded(tmp_path: Path) -> None:
    pipe = dcm.load_shapes_pipeline()
    frames = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    maps = dcm.encode(pipe, frames, ["red", "blue"], noise_level=[0.3, 0.6], detail=["step"])
    maps.report(tmp_path / "a.html", frames)
    (method,) = data_of(tmp_path / "a.html")["methods"]
    assert list(method["panels"]) == ["step"]
    assert method["panels"]["step"]["names"] == [0, 1]

"""Files of data sets: paths stay below the root, and what is missing or broken is named."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation.datasets._write import HEIGHT, WIDTH, blocks, write_frame, write_values
from PIL import Image

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.evaluation.datasets._files import (
    below,
    frame_files,
    frame_pairs,
    locate,
    read_image,
    read_json,
    read_lines,
    read_mask,
    read_values,
    require,
    stack,
)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "..", "", "C:x", "C:/x", "\\x", "a\\..\\..\\x", "//host/x", "a\0b"]
)
def test_no_name_leads_outside(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConceptMapsError, match=r"list\.txt' names .*; expected a relative name below its own folder"):
        below(tmp_path, "videos", name, listed_in=tmp_path / "list.txt")


def test_names_below(tmp_path: Path) -> None:
    assert below(tmp_path, "a", "b/c..d.jpg", listed_in=tmp_path) == tmp_path / "a" / "b" / "c..d.jpg"


def test_root_or_folder_in_it(tmp_path: Path) -> None:
    (tmp_path / "devkit" / "sets").mkdir(parents=True)
    assert locate(tmp_path / "devkit", "sets") == tmp_path / "devkit"
    assert locate(str(tmp_path), "sets", ("other", "devkit")) == tmp_path / "devkit"
    with pytest.raises(
        ConceptMapsError, match="is not the root of this data set: expected 'sets' in it, or in other or"
    ):
        locate(tmp_path, "sets", ("other", "another"))
    with pytest.raises(ConceptMapsError, match="expected 'sets' in it; unpack the data set there, or name the folder"):
        locate(tmp_path, "sets")


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "val.txt"
    with pytest.raises(
        ConceptMapsError, match=r"there is no '.*val\.txt'; expected a list with one name per line: fetch"
    ):
        read_lines(path)
    path.write_bytes(b"one\r\n\n two \n")
    assert read_lines(path) == ["one", "two"]
    path.write_bytes(b"\n")
    with pytest.raises(ConceptMapsError, match=r"val\.txt' is empty; expected a list"):
        read_lines(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConceptMapsError, match=r"val\.txt' cannot be read as a list .*UnicodeDecodeError"):
        read_lines(path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    with pytest.raises(ConceptMapsError, match=r"there is no '.*meta\.json'; expected JSON"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    path.write_text('{"a": ')
    with pytest.raises(ConceptMapsError, match=r"meta\.json' cannot be read as JSON \(JSONDecodeError"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(
        ConceptMapsError, match=r"meta\.json' cannot be read as JSON \((RecursionError|JSONDecodeError)"
    ):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(ConceptMapsError, match="holds a JSON list; expected an object with names"):
        read_json(path)


def test_image_channels(tmp_path: Path) -> None:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[..., 0], pixels[2:, :, 2] = 200, 90
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.is_contiguous()
    assert image.dtype == torch.uint8
    assert image.tolist() == pixels.transpose(2, 0, 1).tolist()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    assert torch.equal(read_image(tmp_path / "gray.png"), image[:1].expand(3, -1, -1))


def test_palette_and_gray_values(tmp_path: Path) -> None:
    values = blocks(0, 1, 20, 255)
    for palette in (True, False):
        write_values(tmp_path / "a.png", values, palette)
        read = read_values(tmp_path / "a.png")
        assert read.dtype == torch.int64
        assert read.tolist() == values.tolist()


def test_masks_in_values_and_colors(tmp_path: Path) -> None:
    values = blocks(0, 1, 255, 0)
    for palette in (True, False):
        write_values(tmp_path / "a.png", values, palette)
        assert read_mask(tmp_path / "a.png").tolist() == (values > 0).tolist()
    opaque = np.stack([0 * values, values, 0 * values, 0 * values + 255], axis=-1).astype(np.uint8)
    for channels in (3, 4):
        Image.fromarray(opaque[..., :channels]).save(tmp_path / "a.png")
        assert read_mask(tmp_path / "a.png").tolist() == (values > 0).tolist()
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ConceptMapsError, match=r"a\.png' cannot be read as a mask"):
        read_mask(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_broken_images(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    with pytest.raises(ConceptMapsError, match=rf"there is no '.*a\.{suffix}'; expected an image: fetch or unpack"):
        read_image(path)
    write_frame(path, seed=0, height=64, width=64)
    whole = path.read_bytes()
    for kept in (0, 10, 60, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(ConceptMapsError, match=rf"a\.{suffix}' cannot be read as an image \("):
            read_image(path)
        with pytest.raises(ConceptMapsError, match=rf"a\.{suffix}' cannot be read as a label image \("):
            read_values(path)


def test_colors_are_no_labels(tmp_path: Path) -> None:
    write_frame(tmp_path / "a.png", seed=0)
    with pytest.raises(
        ConceptMapsError, match="an image of 3 channels; expected a palette or gray image whose values"
    ):
        read_values(tmp_path / "a.png")


def test_frames_of_a_video(tmp_path: Path) -> None:
    frames, labels = tmp_path / "frames", tmp_path / "labels"
    with pytest.raises(ConceptMapsError, match=r"frames' has no frames; expected the \*\.jpg files of a video"):
        frame_files(frames)
    for name in ("00002", "00000", "00001"):
        write_frame(frames / f"{name}.jpg", seed=0)
        write_values(labels / f"{name}.png", blocks(0))
    # macOS leaves such files beside what it unpacks.
    (frames / "._00000.jpg").write_bytes(b"")
    (labels / "._00000.png").write_bytes(b"")
    assert list(frame_files(frames)) == ["00000", "00001", "00002"]
    assert frame_pairs(frames, labels) == [(frames / f"0000{n}.jpg", labels / f"0000{n}.png") for n in range(3)]
    (labels / "00001.png").unlink()
    with pytest.raises(
        ConceptMapsError, match="has 3 frames and '.*labels' 2 label images, and '00001' is in one of the"
    ):
        frame_pairs(frames, labels)
    write_values(labels / "00001.png", blocks(0))
    write_values(labels / "00003.png", blocks(0))
    with pytest.raises(ConceptMapsError, match="and '00003' is in one of them only; expected a label image for each"):
        frame_pairs(frames, labels)


def test_frames_of_two_sizes() -> None:
    frames = [torch.zeros(3, 4, 5), torch.ones(3, 4, 5)]
    assert torch.equal(stack(frames, [Path("a"), Path("b")]), torch.stack(frames))
    with pytest.raises(
        ConceptMapsError, match=r"'b' has height and width \[4, 6\] where 'a' has \[4, 5\]; expected one"
    ):
        stack([frames[0], torch.zeros(3, 4, 6)], [Path("a"), Path("b")])


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConceptMapsError, match=r'reading data sets needs h5py .*"diffusers-concept-maps\[data\]"'):
        require("h5py")

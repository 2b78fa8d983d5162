"""MeViS as its archive unpacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation.datasets._write import HEIGHT, WIDTH, write_frame
from evaluation.datasets.test_rle import compressed, runs_of

from diffusers_concept_maps.errors import ConceptMapsError, ConceptMapsValueError
from diffusers_concept_maps.evaluation.datasets import open_dataset

VIDEO, OTHER = "0ab4afe7fb46", "1c2d"
FRAMES = 5
NAMES = (f"{VIDEO}_0", f"{VIDEO}_1", f"{VIDEO}_2", f"{OTHER}_0")


def mask(top: int, left: int) -> torch.Tensor:
    shown = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    shown[top : top + 4, left : left + 6] = True
    return shown


# The second object is out of sight in two frames; boxes overlap.
TRACKS: dict[str, list[torch.Tensor | None]] = {
    "17": [mask(index, 2 * index) for index in range(FRAMES)],
    "3": [mask(1, 1), None, mask(3, 3), None, mask(5, 9)],
    "20": [mask(0, 0)],
}


def encoded(shown: torch.Tensor | None, as_text: bool) -> dict[str, Any] | None:
    if shown is None:
        return None
    runs = runs_of(shown)
    return {"size": list(shown.shape), "counts": compressed(runs) if as_text else runs}


def expressions() -> dict[str, Any]:
    of_video = {
        "0": {"exp": " Two birds  flying\taway ", "obj_id": [1, 0], "anno_id": [17, 3]},
        "1": {"exp": "the bird that hops", "obj_id": [0], "anno_id": [3]},
        "2": {"exp": "nothing of the kind", "obj_id": [], "anno_id": []},
    }
    return {
        "videos": {
            # Out of order: frames are sorted by name.
            VIDEO: {"expressions": of_video, "frames": ["00002", "00000", "00001", "00004", "00003"]},
            OTHER: {"expressions": {"0": {"exp": "a dog", "obj_id": [2], "anno_id": [20]}}, "frames": ["00000"]},
        }
    }


@pytest.fixture
def frames(tmp_path: Path) -> torch.Tensor:
    """Write a split with two videos; return the frames of the first."""
    split = tmp_path / "valid_u"
    shown = [write_frame(split / f"JPEGImages/{VIDEO}/{index:05}.jpg", seed=index) for index in range(FRAMES)]
    write_frame(split / f"JPEGImages/{OTHER}/00000.jpg", seed=9)
    masks = {name: [encoded(shown, as_text=name != "3") for shown in track] for name, track in TRACKS.items()}
    (split / "mask_dict.json").write_text(json.dumps(masks))
    (split / "meta_expressions.json").write_text(json.dumps(expressions()))
    return torch.stack(shown)


def union(names: list[str], indices: list[int]) -> torch.Tensor:
    labels = torch.zeros(len(indices), HEIGHT, WIDTH, dtype=torch.int64)
    for label, index in zip(labels, indices, strict=True):
        for name in names:
            shown = TRACKS[name][index]
            if shown is not None:
                label[shown] = 1
    return labels


def rewrite(tmp_path: Path, file: str, change: Any) -> None:
    path = tmp_path / "valid_u" / file
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_samples(frames: torch.Tensor, tmp_path: Path) -> None:
    dataset = open_dataset("mevis", tmp_path)
    assert dataset.names() == NAMES
    both, one, none, dog = dataset
    assert (both.caption, both.classes) == ("Two birds flying away", ("background", "Two birds flying away"))
    assert torch.equal(both.frames, frames)
    assert torch.equal(both.labels, union(["17", "3"], list(range(FRAMES))))
    assert torch.equal(one.labels, union(["3"], list(range(FRAMES))))
    assert torch.equal(none.labels, union([], list(range(FRAMES))))
    assert torch.equal(dog.labels, union(["20"], [0]))
    assert dog.caption == "a dog"


@pytest.mark.parametrize(
    ("options", "chosen"),
    [({"max_frames": 3}, [0, 2, 4]), ({"max_frames": 2, "stride": 1}, [0, 1]), ({"stride": 3}, [0, 3])],
)
def test_some_frames(options: dict[str, int], chosen: list[int], frames: torch.Tensor, tmp_path: Path) -> None:
    sample = open_dataset("mevis", tmp_path, **options).read(NAMES[0])
    assert torch.equal(sample.frames, frames[chosen])
    assert torch.equal(sample.labels, union(["17", "3"], chosen))


def test_layout_of_the_mask_file_is_free(frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "valid_u" / "mask_dict.json"
    path.write_text(
        json.dumps({"päron": [None], **json.loads(path.read_text())}, indent=1, ensure_ascii=False), "utf-8"
    )
    sample = open_dataset("mevis", tmp_path).read(NAMES[0])
    assert torch.equal(sample.labels, union(["17", "3"], list(range(FRAMES))))


def test_masks_that_are_not_published(frames: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "valid_u").rename(tmp_path / "valid")
    (tmp_path / "valid" / "mask_dict.json").unlink()
    with pytest.raises(
        ConceptMapsError, match=r"valid' has no mask_dict\.json, so nothing can be scored; .* take valid_u"
    ):
        open_dataset("mevis", tmp_path, split="valid")
    with pytest.raises(ConceptMapsError, match=r"expected 'train/meta_expressions\.json' in it, or in mevis or MeViS"):
        open_dataset("mevis", tmp_path, split="train")
    with pytest.raises(
        ConceptMapsValueError, match="mevis has no split 'test'; expected one of valid_u, train, valid"
    ):
        open_dataset("mevis", tmp_path, split="test")


@pytest.mark.parametrize("content", ["", "[]", '{"17"}', '{"17": [null]', '{"17": [null}', '{"17": [null] "3": []}'])
def test_a_broken_mask_file(content: str, frames: torch.Tensor, tmp_path: Path) -> None:
    (tmp_path / "valid_u" / "mask_dict.json").write_text(content)
    with pytest.raises(ConceptMapsError, match=r"mask_dict\.json' cannot be read as a JSON object of masks \("):
        open_dataset("mevis", tmp_path)


def test_a_truncated_mask_file(frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "valid_u" / "mask_dict.json"
    whole = path.read_text()
    for kept in range(1, len(whole), 97):
        path.write_text(whole[:kept])
        with pytest.raises(ConceptMapsError, match=r"mask_dict\.json' cannot be read as a JSON object of masks \("):
            open_dataset("mevis", tmp_path)


def test_a_broken_mask(frames: torch.Tensor, tmp_path: Path) -> None:
    rewrite(tmp_path, "mask_dict.json", lambda masks: masks["17"][2].update(counts="0T"))
    dataset = open_dataset("mevis", tmp_path)
    with pytest.raises(
        ConceptMapsError, match=r"mask '17' of frame 2 in .* is broken: .* end within a number; fetch or"
    ):
        dataset.read(NAMES[0])
    assert torch.equal(dataset.read(NAMES[1]).frames, frames)
    rewrite(tmp_path, "mask_dict.json", lambda masks: masks["3"][2].update(size=[WIDTH, HEIGHT]))
    with pytest.raises(ConceptMapsError, match=r"mask '3' of frame 2 .* size \[20, 12\] for a frame of \[12, 20\]"):
        open_dataset("mevis", tmp_path).read(NAMES[1])
    rewrite(tmp_path, "mask_dict.json", lambda masks: masks["3"][2].update(size=3))
    with pytest.raises(ConceptMapsError, match="mask '3' of frame 2 in .* is broken"):
        open_dataset("mevis", tmp_path).read(NAMES[1])


def test_masks_of_another_number(frames: torch.Tensor, tmp_path: Path) -> None:
    rewrite(tmp_path, "mask_dict.json", lambda masks: masks["3"].pop())
    with pytest.raises(ConceptMapsError, match="has 4 masks '3' for a video of 5 frames; expected one for each"):
        open_dataset("mevis", tmp_path).read(NAMES[0])
    rewrite(tmp_path, "mask_dict.json", lambda masks: masks.update({"3": {}}))
    with pytest.raises(ConceptMapsError, match="has a dict masks '3' for a video of 5 frames"):
        open_dataset("mevis", tmp_path).read(NAMES[0])
    rewrite(tmp_path, "mask_dict.json", lambda masks: masks.pop("3"))
    with pytest.raises(
        ConceptMapsError, match=r"has no masks '3', which an expression in meta_expressions\.json names"
    ):
        open_dataset("mevis", tmp_path).read(NAMES[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("videos"),
        lambda content: content.update(videos=[]),
        lambda content: content["videos"][VIDEO].pop("frames"),
        lambda content: content["videos"][VIDEO].update(expressions=3),
        lambda content: content["videos"][VIDEO]["expressions"]["0"].pop("anno_id"),
        lambda content: content["videos"][VIDEO]["expressions"]["0"].update(exp=None),
    ],
)
def test_broken_expressions(change: Any, frames: torch.Tensor, tmp_path: Path) -> None:
    rewrite(tmp_path, "meta_expressions.json", change)
    with pytest.raises(ConceptMapsError, match=r"meta_expressions\.json' is not what was expected: .*\"anno_id\""):
        open_dataset("mevis", tmp_path)


def test_a_video_without_frames(frames: torch.Tensor, tmp_path: Path) -> None:
    rewrite(tmp_path, "meta_expressions.json", lambda content: content["videos"][VIDEO].update(frames=[]))
    with pytest.raises(ConceptMapsError, match=rf"lists no frames of video '{VIDEO}'"):
        open_dataset("mevis", tmp_path)


def test_missing_and_mismatched_frames(frames: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / f"valid_u/JPEGImages/{VIDEO}/00003.jpg"
    write_frame(path, seed=0, height=5)
    with pytest.raises(ConceptMapsError, match=r"00003\.jpg' has height and width \[5, 20\] where .*00000\.jpg' has"):
        open_dataset("mevis", tmp_path).read(NAMES[0])
    path.unlink()
    with pytest.raises(ConceptMapsError, match=r"there is no '.*00003\.jpg'; expected an image"):
        open_dataset("mevis", tmp_path).read(NAMES[0])


@pytest.mark.parametrize("frame", ["/etc/00000", "../../../00000"])
def test_names_that_lead_elsewhere(frame: str, frames: torch.Tensor, tmp_path: Path) -> None:
    rewrite(tmp_path, "meta_expressions.json", lambda content: content["videos"][OTHER].update(frames=[frame]))
    with pytest.raises(
        ConceptMapsError, match=rf"meta_expressions\.json' names '{frame}\.jpg'; expected a relative name"
    ):
        open_dataset("mevis", tmp_path).read(NAMES[-1])
    rewrite(
        tmp_path, "meta_expressions.json", lambda content: content["videos"].update({"..": content["videos"][OTHER]})
    )
    with pytest.raises(ConceptMapsError, match=r"meta_expressions\.json' names '\.\.'; expected a relative name"):
        open_dataset("mevis", tmp_path).read(".._0")

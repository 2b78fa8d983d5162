"""ConceptMaps: reading, pixels, saving and loading."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox
from safetensors import safe_open

import diffusers_concept_maps as dcm
from diffusers_concept_maps import maps as maps_module
from diffusers_concept_maps.maps import ConceptMaps, StoredMaps
from diffusers_concept_maps.upsample import upsample_map

CONCEPTS = ("dog", "running", "a/../b \U0001f415")
METADATA = {"transformer": "Model", "steps": [0, 2], "methods": {"imap": {"layers": [1], "heads": None}}}
TENSORS = {
    name: torch.randn(2, 3, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    for seed, name in enumerate(("imap", "concept_attention"))
}


def made(tensors: dict[str, torch.Tensor], concepts: Sequence[str] = CONCEPTS, metadata: Any = None) -> ConceptMaps:
    """Maps of one step and layer."""
    coverage = {f"coverage.{name}": torch.ones(1, 1, dtype=torch.bool) for name in tensors}
    return ConceptMaps(StoredMaps(tuple(concepts), tensors | coverage, metadata or {}), tuple(tensors))


def make_maps() -> ConceptMaps:
    return made(TENSORS, metadata=METADATA)


def test_get_and_concepts() -> None:
    maps = make_maps()
    assert torch.equal(maps.get(), TENSORS["imap"])
    assert torch.equal(maps.get("concept_attention"), TENSORS["concept_attention"])
    assert maps["running"].concept == "running"
    assert torch.equal(maps["running"].tensor, TENSORS["imap"][:, 1])
    of_other_method = maps.concept(CONCEPTS[2], "concept_attention")
    assert torch.equal(of_other_method.tensor, TENSORS["concept_attention"][:, 2])


def test_repr() -> None:
    maps = made({"imap": TENSORS["imap"][:, :1]}, ["dog"])
    assert repr(maps) == "ConceptMaps(concepts=['dog'], methods=['imap'])"


def test_save_and_load(tmp_path: Path) -> None:
    make_maps().save(tmp_path / "maps.safetensors")
    loaded = dcm.load(str(tmp_path / "maps.safetensors"))
    assert loaded.concepts == CONCEPTS
    assert loaded.methods == ("imap", "concept_attention")
    assert loaded.metadata == METADATA
    for method, tensor in TENSORS.items():
        assert loaded.get(method).dtype == torch.float32
        assert torch.equal(loaded.get(method), tensor)
    assert os.listdir(tmp_path) == ["maps.safetensors"]


def test_the_file_has_one_metadata_entry(tmp_path: Path) -> None:
    make_maps().save(tmp_path / "maps.safetensors")
    with safe_open(tmp_path / "maps.safetensors", "pt") as file:
        entries = file.metadata()
    assert list(entries) == ["concept_maps"]
    assert json.loads(entries["concept_maps"])["concepts"] == list(CONCEPTS)


def test_a_captured_file_says_what_made_it(tmp_path: Path) -> None:
    pipe = tiny_cogvideox.make_pipeline()
    options: dict[str, Any] = {"methods": ["cross_attention", "imap"], "layers": [0, 2], "steps": [2, 0]}
    with dcm.trace(pipe, ["dog", "sky"], heads=dcm.HeadSelection(top_k=2), **options) as maps:
        tiny_cogvideox.call(pipe)
    maps.save(tmp_path / "maps.safetensors")
    loaded = dcm.load(tmp_path / "maps.safetensors")
    assert loaded.metadata == maps.metadata
    assert loaded.metadata["transformer"] == "CogVideoXTransformer3DModel"
    assert loaded.metadata["steps"] == [0, 2]
    heads = "HeadSelection(score='calinski_harabasz', top_k=2, threshold=None)"
    assert loaded.metadata["methods"] == {
        "cross_attention": {"layers": [0, 2], "heads": heads, "normalize": "softmax", "space": "output"},
        "imap": {"layers": [0, 2], "heads": heads, "normalize": "zscore", "space": "output"},
    }
    assert torch.equal(loaded.get("imap"), maps.get("imap"))


SELECTION = dcm.HeadSelection(top_k=2)


@pytest.mark.parametrize(("heads", "stored"), [(None, None), ([3, 1], [1, 3]), (SELECTION, str(SELECTION))])
def test_a_loaded_file_has_the_same_metadata(heads: Any, stored: Any, tmp_path: Path) -> None:
    pipe = tiny_cogvideox.make_pipeline()
    with dcm.trace(pipe, ["dog", "sky"], heads=heads, branch="both", token_policy="last") as maps:
        tiny_cogvideox.call(pipe)
    for branch, of_branch in maps.items():
        of_branch.save(tmp_path / "maps.safetensors")
        loaded = dcm.load(tmp_path / "maps.safetensors").metadata
        assert loaded == of_branch.metadata
        assert (loaded["branch"], loaded["token_policy"], loaded["preset"]) == (branch, "last", None)
        assert loaded["methods"]["concept_attention"]["heads"] == stored


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, "mean"),
        ({"parity": "imap"}, "first"),
        ({"concept_embeds": torch.zeros(2, 32)}, None),
        ({"target": "prompt"}, None),
    ],
)
def test_the_token_policy_is_the_one_that_was_used(options: dict[str, Any], policy: str | None) -> None:
    with dcm.trace(tiny_cogvideox.make_pipeline(), ["dog", "sky"], methods=["imap"], **options) as maps:
        pass
    assert maps.metadata["token_policy"] == policy


def test_maps_that_are_not_contiguous_are_saved(tmp_path: Path) -> None:
    tensor = TENSORS["imap"].transpose(3, 4)
    made({"imap": tensor}).save(tmp_path / "maps.safetensors")
    assert torch.equal(dcm.load(tmp_path / "maps.safetensors").get(), tensor)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "maps.safetensors"
    make_maps().save(path)
    old = path.read_bytes()

    def write_half(tensors: Any, target: Path, metadata: Any) -> None:
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(maps_module, "save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        make_maps().save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["maps.safetensors"]


def test_a_save_into_a_folder_that_is_not_there_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dcm.ConceptMapsError, match=r"^'missing/maps' .* there is no folder '/.*/missing'; make it"):
        make_maps().save("missing/maps")
    assert os.listdir(tmp_path) == []


def test_a_save_onto_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    with pytest.raises(dcm.ConceptMapsError, match="is a folder; name a file to write"):
        make_maps().save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def reference_pixels(tensor: torch.Tensor, size: tuple[int, int], covering: Sequence[int]) -> torch.Tensor:
    rows = [
        [
            torch.nn.functional.interpolate(concept, size=size, mode="bilinear", align_corners=False)
            for concept in video.unsqueeze(2)
        ]
        for video in tensor[:, :, list(covering)]
    ]
    return torch.stack([torch.stack(row) for row in rows]).squeeze(3)


@pytest.mark.parametrize(
    ("latent", "frames", "covering"),
    [
        (3, 9, [0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (3, 3, [0, 1, 2]),
        (3, 5, [0, 1, 1, 2, 2]),
        (1, 1, [0]),
        (1, 4, [0, 0, 0, 0]),
        (3, 1, [0]),
        (3, 8, [0, 0, 0, 1, 1, 1, 2, 2]),
        (3, 2, [0, 1]),
    ],
)
def test_upsample(latent: int, frames: int, covering: list[int]) -> None:
    tensor = TENSORS["imap"][:, :, :latent]
    maps = made({"imap": tensor})
    pixels = maps.upsample((17, 11), frames, "imap")
    assert pixels.shape == (2, 3, frames, 17, 11)
    torch.testing.assert_close(pixels, reference_pixels(tensor, (17, 11), covering), rtol=0, atol=1e-6)


def test_thirteen_latent_frames_cover_forty_nine() -> None:
    latent = torch.arange(13.0).reshape(13, 1, 1)
    covering = [0] + [frame for frame in range(1, 13) for _ in range(4)]
    assert upsample_map(latent, (1, 1), 49).flatten().tolist() == covering


def test_one_pixel_per_token_changes_nothing() -> None:
    assert torch.equal(make_maps().upsample((4, 5), 3), TENSORS["imap"])

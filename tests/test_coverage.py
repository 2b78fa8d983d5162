"""`maps.coverage` says which steps and layers the maps are made of; segmentation and pixels of whole runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps.maps import ConceptMaps

CONCEPTS = ["dog", "sky", "rock"]
METHODS = ["concept_attention", "cross_attention", "gramcol", "imap"]


@cache
def pipeline() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def covered(maps: dcm.ConceptMaps, method: str) -> list[tuple[int, ...]]:
    return [tuple(pair) for pair in maps.coverage[method].nonzero().tolist()]


def test_everything_is_covered() -> None:
    with dcm.trace(pipeline(), CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipeline(), num_inference_steps=4)
    assert list(maps.coverage) == METHODS
    for table in maps.coverage.values():
        assert table.dtype == torch.bool
        assert torch.equal(table, torch.ones(4, 3, dtype=torch.bool))


@pytest.mark.parametrize(("steps", "layers"), [([1], [0, 2]), ([0, 3], [1]), ([3], [2]), ((2, 1), (1, 0))])
@pytest.mark.parametrize("parity", [None, "imap"])
def test_chosen_steps_and_layers(steps: list[int], layers: list[int], parity: str | None) -> None:
    with dcm.trace(
        pipeline(), CONCEPTS, methods=METHODS, steps=steps, layers=layers, parity=parity, normalize="softmax"
    ) as maps:
        tiny.call(pipeline(), num_inference_steps=4)
    for method in METHODS:
        assert maps.coverage[method].shape == (4, 3)
        assert covered(maps, method) == [(step, layer) for step in sorted(steps) for layer in sorted(layers)]


def test_methods_of_a_preset_have_their_own_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers_concept_maps.backbones import Preset
    from diffusers_concept_maps.backbones.cogvideox import CogVideoXBackbone

    preset = Preset("tiny", "this test", {"num_layers": 3}, layers={"imap": (1, 2)}, steps=(0.5, 1.0))
    monkeypatch.setattr(CogVideoXBackbone, "presets", (preset,))
    with dcm.trace(pipeline(), CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipeline(), num_inference_steps=4)
    assert covered(maps, "imap") == [(2, 1), (2, 2), (3, 1), (3, 2)]
    assert covered(maps, "gramcol") == [(step, layer) for step in (2, 3) for layer in (0, 1, 2)]


def test_coverage_grows_and_starts_anew() -> None:
    seen = []

    def note(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(maps.coverage["imap"].sum(1).tolist())
        return tensors

    with dcm.trace(pipeline(), CONCEPTS, methods=["imap"]) as maps:
        tiny.call(pipeline(), callback_on_step_end=note)
        tiny.call(pipeline(), num_inference_steps=2, callback_on_step_end=note)
    assert seen == [[3, 0, 0], [3, 3, 0], [3, 3, 3], [3, 0], [3, 3]]
    assert maps.coverage["imap"].shape == (2, 3)


def test_branches_have_their_own_coverage() -> None:
    with dcm.trace(pipeline(), CONCEPTS, branch="both") as maps:
        tiny.call(pipeline(), guidance_scale=1.0)
    assert maps["cond"].coverage["concept_attention"].all()
    with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded for branch 'uncond'.*with guidance"):
        _ = maps["uncond"].coverage


@pytest.mark.parametrize("parity", [None, "imap"])
def test_a_run_that_raises_says_how_far_it_came(parity: str | None) -> None:
    """Also in the middle of a step: IMAP's second softmax needs all layers, so that such a step is not in its maps."""
    pipe = tiny.make_pipeline()
    count = [0]

    def fail(*args: Any) -> None:
        count[0] += 1
        if count[0] == 2:
            raise RuntimeError("stop")

    hook = pipe.transformer.transformer_blocks[2].register_forward_pre_hook(fail)
    options: dict[str, Any] = {"methods": ["imap"], "parity": parity, "normalize": "softmax"}
    with dcm.trace(pipe, CONCEPTS, **options) as maps:
        with pytest.raises(RuntimeError, match="stop"):
            tiny.call(pipe)
        expected = [[True, True, True], [parity is None, parity is None, False], [False, False, False]]
        assert maps.coverage["imap"].tolist() == expected
        hook.remove()
    with dcm.trace(pipe, CONCEPTS, steps=[0], **options) as alone:
        tiny.call(pipe)
    if parity is not None:
        assert torch.equal(maps.get(), alone.get())


def test_a_first_step_that_raises_leaves_no_map() -> None:
    pipe = tiny.make_pipeline()

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    hook = pipe.transformer.transformer_blocks[2].register_forward_pre_hook(fail)
    with dcm.trace(pipe, CONCEPTS, methods=["imap"], parity="imap", normalize="softmax") as maps:
        with pytest.raises(RuntimeError, match="stop"):
            tiny.call(pipe)
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            _ = maps.coverage
    hook.remove()


@pytest.mark.parametrize("parity", [None, "imap"])
def test_a_pass_that_raised_has_no_part_in_the_next_one(parity: str | None) -> None:
    """A bare transformer may be called again: what the broken pass has left of a step is not mixed into it."""
    transformer, embeds = tiny.make_transformer(rope=False), torch.randn(2, 32)
    options: dict[str, Any] = {"concept_embeds": embeds, "methods": ["imap"], "parity": parity, "normalize": "softmax"}
    arguments = {
        "hidden_states": torch.randn(1, 3, 4, 6, 10),
        "encoder_hidden_states": torch.randn(1, tiny.TEXT_LENGTH, 32),
        "timestep": torch.tensor([500]),
    }

    def fail(*args: Any) -> None:
        raise RuntimeError("stop")

    with torch.no_grad(), dcm.trace(transformer, **options) as maps:
        hook = transformer.transformer_blocks[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            transformer(**{**arguments, "hidden_states": torch.randn(1, 3, 4, 6, 10)})
        hook.remove()
        transformer(**arguments)
    with torch.no_grad(), dcm.trace(transformer, **options) as alone:
        transformer(**arguments)
    if parity is not None:
        assert torch.equal(maps.get(), alone.get())
        assert covered(maps, "imap") == [(1, 0), (1, 1), (1, 2)]
    else:
        assert covered(maps, "imap") == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]


def test_a_bare_transformer_counts_its_passes() -> None:
    transformer, embeds = tiny.make_transformer(rope=False), torch.randn(2, 32)
    with torch.no_grad(), dcm.trace(transformer, concept_embeds=embeds, layers=[1], steps=[0, 2]) as maps:
        for count in range(4):
            transformer(torch.randn(1, 3, 4, 6, 10), torch.randn(1, tiny.TEXT_LENGTH, 32), torch.tensor([count]))
    assert maps.coverage["concept_attention"].tolist() == [[False, True, False], [False] * 3, [False, True, False]]


def test_nothing_has_been_recorded() -> None:
    with dcm.trace(pipeline(), CONCEPTS) as maps:
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded for branch 'cond'"):
            _ = maps.coverage
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded for branch 'cond'"):
            maps.segment()


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_saved_and_loaded(branch: str, tmp_path: Path) -> None:
    with dcm.trace(pipeline(), CONCEPTS, methods=METHODS, steps=[0, 2], layers=[1], branch=branch) as maps:
        tiny.call(pipeline())
    maps.save(tmp_path / "maps.safetensors")
    loaded = dcm.load(tmp_path / "maps.safetensors")
    assert list(loaded.coverage) == METHODS
    for method in METHODS:
        assert loaded.coverage[method].dtype == torch.bool
        assert torch.equal(loaded.coverage[method], maps.coverage[method])
        assert torch.equal(loaded.segment(method), maps.segment(method))
        assert torch.equal(loaded.upsample((48, 80), 9, method), maps.upsample((48, 80), 9, method))


class Fixed:
    """Maps that are given."""

    def __init__(self, tensor: torch.Tensor, metadata: dict[str, Any]) -> None:
        self.tensor = tensor
        self.metadata = metadata
        self.concepts = tuple(f"concept {i}" for i in range(tensor.shape[1]))

    def read(self, method: str) -> torch.Tensor:
        return self.tensor

    coverage = detail = read


def maps_of(tensor: torch.Tensor, **metadata: Any) -> ConceptMaps:
    return ConceptMaps(Fixed(tensor, metadata), ("imap",))


def test_segments_are_the_strongest_concepts() -> None:
    with dcm.trace(pipeline(), CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipeline(), ["a dog", "the sky"])
    for method in METHODS:
        labels, scores = maps.segment(method), maps.get(method)
        assert labels.dtype == torch.int64
        assert labels.shape == (2, *tiny.GRID)
        for row in range(2):
            for index in torch.cartesian_prod(*(torch.arange(n) for n in tiny.GRID)).tolist():
                values = [float(scores[(row, concept, *index)]) for concept in range(3)]
                assert values[int(labels[(row, *index)])] == max(values)
    assert torch.equal(maps.segment(), maps.segment(METHODS[0]))
    assert len(maps.segment().unique()) > 1


def test_the_lowest_index_on_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 3, (2, 5, 3, 7, 9), generator=generator).float()
    labels = maps_of(tensor).segment()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in (2, 3, 7, 9))).tolist():
        values = tensor[index[0], :, index[1], index[2], index[3]].tolist()
        assert int(labels[tuple(index)]) == values.index(max(values))
    assert torch.equal(maps_of(torch.zeros(1, 4, 1, 2, 2)).segment(), torch.zeros(1, 1, 2, 2, dtype=torch.int64))


def test_a_single_concept_cannot_be_segmented() -> None:
    with dcm.trace(pipeline(), ["dog"]) as maps:
        tiny.call(pipeline())
    with pytest.raises(dcm.ConceptMapsError, match="there is only 'dog'; add another, such as 'background'"):
        maps.segment()
    with pytest.raises(dcm.ConceptMapsError, match="method 'imap' was not captured"):
        maps.segment("imap")


def test_upsampling_a_whole_run() -> None:
    """Video frame 0 is token frame 0, frames 1 to 4 are token frame 1, 5 to 8 token frame 2."""
    with dcm.trace(pipeline(), CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipeline())
    for method in METHODS:
        tokens = maps.get(method)
        pixels = maps.upsample((48, 80), 9, method)
        assert pixels.shape == (1, 3, 9, 48, 80)
        flat = torch.nn.functional.interpolate(tokens[0], size=(48, 80), mode="bilinear", align_corners=False)
        for frame in range(9):
            assert torch.equal(pixels[0, :, frame], flat[:, (frame + 3) // 4])
        back = pixels[:, :, [0, 1, 5], 7::16, 7::16] + pixels[:, :, [0, 1, 5], 8::16, 8::16]
        torch.testing.assert_close(back / 2, tokens, rtol=0, atol=float(tokens.abs().max()) * 0.1)
    assert torch.equal(maps.upsample((48, 80), 9), maps.upsample((48, 80), 9, METHODS[0]))


@pytest.mark.parametrize(
    ("tokens", "frames", "metadata", "covering"),
    [
        (3, 9, {"frames_per_latent": 4}, [0, 1, 1, 1, 1, 2, 2, 2, 2]),
        (1, 1, {"frames_per_latent": 4}, [0]),
        (3, 9, {}, [0, 1, 1, 1, 1, 2, 2, 2, 2]),
        # CogVideoX 1.5, two latent frames to a token: 3 become 4, with padding in front.
        (2, 9, {"frames_per_latent": 4, "latents_per_token": 2}, [0, *[1] * 8]),
        (2, 13, {"frames_per_latent": 4, "latents_per_token": 2}, [0, 0, 0, 0, 0, *[1] * 8]),
        (4, 8, {"frames_per_latent": 4}, [0, 0, 1, 1, 2, 2, 3, 3]),  # does not fit: spread evenly
        (3, 2, {}, [0, 1]),
    ],
)
def test_which_token_frame_a_video_frame_takes(
    tokens: int, frames: int, metadata: dict[str, int], covering: list[int]
) -> None:
    tensor = torch.arange(tokens).float().view(1, 1, tokens, 1, 1).expand(1, 2, tokens, 2, 3)
    pixels = maps_of(tensor, **metadata).upsample((4, 6), frames)
    assert pixels.shape == (1, 2, frames, 4, 6)
    assert pixels[0, 0, :, 0, 0].tolist() == covering
    assert torch.equal(pixels, pixels[:, :, :, :1, :1].expand_as(pixels))


@pytest.mark.parametrize(("size", "frames"), [((0, 8), 9), ((8, -1), 9), ((8, 8), 0)])
def test_sizes_that_are_none(size: tuple[int, int], frames: int) -> None:
    with pytest.raises(dcm.ConceptMapsError, match="expected at least one pixel and one frame"):
        maps_of(torch.zeros(1, 2, 3, 2, 2)).upsample(size, frames)

"""Maps that keep the layer, step or head axis: their values, the file they are streamed to, and what they refuse."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import naive
import naive_variants as variants
import pytest
import torch
from backbones import tiny_cogvideox as tiny
from diffusers import CogVideoXPipeline, FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from safetensors.torch import load_file

import diffusers_concept_maps as dcm

CONCEPTS = ["dog", "sky", "rock"]
METHODS = ["concept_attention", "cross_attention", "gramcol", "imap"]
PROMPTS = ["a red dog running on the beach", "the sky on a rock"]
STEPS, LAYERS, HEADS = 3, 3, 4
SUBSETS = [axes for count in (1, 2, 3) for axes in combinations(("layer", "step", "head"), count)]
pipeline = tiny.shaken_pipeline


def call(pipe: CogVideoXPipeline, prompt: Any = PROMPTS, **options: Any) -> torch.Tensor:
    """Three steps, with a seed that makes no near tie of anchors."""
    return tiny.call(pipe, prompt, **{"generator": torch.Generator().manual_seed(1), **options})


def traced(axes: Sequence[str], path: Path | None = None, **options: Any) -> dcm.ConceptMaps:
    settings = {"methods": METHODS, "normalize": "none", **options}
    with dcm.trace(pipeline(), CONCEPTS, detail=axes, detail_path=path, **settings) as maps:
        call(pipeline())
    return maps


@cache
def single(layer: int, step: int) -> dcm.ConceptMaps:
    """The maps of one layer and step by themselves."""
    with dcm.trace(pipeline(), CONCEPTS, methods=METHODS, normalize="none", layers=[layer], steps=[step]) as maps:
        call(pipeline())
    return maps


@cache
def every_head() -> dict[str, torch.Tensor]:
    """Maps of every layer, step and head in float64 `[layer, step, head, row, concept, frame, height, width]`."""
    pipe = pipeline()
    with tiny.recorded_calls(pipe.transformer) as calls:
        call(pipe)
    ids = pipe.tokenizer(CONCEPTS, padding="max_length", max_length=tiny.TEXT_LENGTH, return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = pipe.text_encoder(ids).last_hidden_state[:, 0]
    model = variants.VariantCogVideoX(pipe.transformer)
    shown = [model.layers(step, slice(2, 4), embeds) for step in calls]
    result = {}
    for method in METHODS:
        scores = [
            torch.stack([naive.head_maps(method, variants.taps(layer, layer.concepts), 3) for layer in layers])
            for layers in shown
        ]
        result[method] = torch.stack(scores, 1).movedim(3, 2).unflatten(5, tiny.GRID)
    return result


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    variants.assert_close(actual, expected)


@pytest.mark.parametrize("axes", SUBSETS)
def test_every_subset_of_axes(axes: tuple[str, ...], tmp_path: Path) -> None:
    """Against every head, layer and step in float64; what is not kept is averaged over, heads joined by the method."""
    path = tmp_path / "maps.safetensors"
    maps, streamed = traced(axes), traced(axes, path)
    plain = traced(())
    stored = load_file(path)
    assert sorted(stored) == sorted(f"cond.{method}" for method in METHODS)
    for method in METHODS:
        scores = every_head()[method]
        if "head" not in axes:
            scores = scores.sum(2, keepdim=True) if method == "concept_attention" else scores.mean(2, keepdim=True)
        kept = ["layer" in axes, "step" in axes, "head" in axes]
        for axis in (2, 1, 0):
            if not kept[axis]:
                scores = scores.mean(axis)
        assert_close(maps.detail(method), scores)
        assert torch.equal(streamed.detail(method), maps.detail(method))
        assert torch.equal(stored[f"cond.{method}"], maps.detail(method))
        assert torch.equal(maps.get(method), plain.get(method))
        assert torch.equal(streamed.get(method), plain.get(method))


@pytest.mark.parametrize("axes", [("layer",), ("step",), ("layer", "step")])
@pytest.mark.parametrize("normalize", ["softmax", "zscore", None])
def test_means_over_the_kept_axes_are_the_map(axes: tuple[str, ...], normalize: str | None) -> None:
    maps = traced(axes, normalize=normalize)
    for method in METHODS:
        mean = maps.detail(method).mean(tuple(range(len(axes))))
        torch.testing.assert_close(mean, maps.get(method), rtol=1e-5, atol=1e-6)


def test_layers_and_steps_are_those_recorded_alone() -> None:
    maps = traced(("step", "layer"))  # in which order they are named is of no matter
    for method in METHODS:
        for layer in range(LAYERS):
            for step in range(STEPS):
                assert torch.equal(maps.detail(method)[layer, step], single(layer, step).get(method))


def test_heads_are_in_their_order() -> None:
    maps = traced(("head",), heads=[0, 2])
    for head in range(HEADS):  # all heads, whether they are chosen or not
        alone = traced((), heads=[head])
        for method in METHODS:
            torch.testing.assert_close(maps.detail(method)[head], alone.get(method), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["softmax", "zscore"])
def test_every_head_is_normalized_by_itself(normalize: str) -> None:
    maps = traced(("head",), methods=["cross_attention"], normalize=normalize)
    for head in range(HEADS):
        alone = traced((), methods=["cross_attention"], normalize=normalize, heads=[head])
        torch.testing.assert_close(maps.detail()[head], alone.get(), rtol=1e-5, atol=1e-6)


def test_methods_have_their_own_axes(tmp_path: Path) -> None:
    """A preset or `layers=` may give them different layers; here only the subset is recorded."""
    maps = traced(("layer", "step"), tmp_path / "maps.safetensors", layers=[0, 2], steps=[2, 0])
    for method in METHODS:
        assert maps.detail(method).shape == (2, 2, 2, 3, *tiny.GRID)
        for row, layer in enumerate((0, 2)):
            for column, step in enumerate((0, 2)):
                assert torch.equal(maps.detail(method)[row, column], single(layer, step).get(method))


def test_both_branches(tmp_path: Path) -> None:
    path = tmp_path / "maps.safetensors"
    with dcm.trace(pipeline(), CONCEPTS, branch="both", detail=("layer",), detail_path=path) as maps:
        call(pipeline())
    stored = load_file(path)
    assert sorted(stored) == ["cond.concept_attention", "uncond.concept_attention"]
    for branch in ("cond", "uncond"):
        with dcm.trace(pipeline(), CONCEPTS, branch=branch, detail=("layer",)) as alone:
            call(pipeline())
        torch.testing.assert_close(maps[branch].detail(), alone.detail())
        assert torch.equal(stored[f"{branch}.concept_attention"], maps[branch].detail())
    assert not torch.equal(maps["cond"].detail(), maps["uncond"].detail())


def test_a_branch_that_was_not_generated() -> None:
    with dcm.trace(pipeline(), CONCEPTS, branch="both", detail=("layer",)) as maps:
        call(pipeline(), guidance_scale=1.0)
    assert maps["cond"].detail().shape == (LAYERS, 2, 3, *tiny.GRID)
    with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded for branch 'uncond'"):
        maps["uncond"].detail()


def test_words_of_the_prompt() -> None:
    """Their number is known only when the prompt is."""
    with dcm.trace(pipeline(), target="prompt", detail=("layer", "head"), normalize="none") as maps:
        call(pipeline(), "a dog", num_inference_steps=1)
        call(pipeline(), PROMPTS[1], num_inference_steps=1)
    assert maps.detail().shape == (LAYERS, HEADS, 1, 5, *tiny.GRID)
    torch.testing.assert_close(maps.detail().sum(1).mean(0), maps.get(), rtol=1e-5, atol=1e-5)


def test_parity() -> None:
    with dcm.trace(
        pipeline(), CONCEPTS, methods=["imap", "gramcol"], parity="imap", detail=("head",), heads=[1, 2]
    ) as maps:
        call(pipeline())
    torch.testing.assert_close(maps.detail("imap")[[1, 2]].mean(0), maps.get("imap"), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(maps.detail("gramcol")[[1, 2]].sum(0), maps.get("gramcol"), rtol=1e-5, atol=1e-5)


def test_frames_are_the_same(tmp_path: Path) -> None:
    frames = call(pipeline())
    with dcm.trace(pipeline(), CONCEPTS, detail=("layer", "step", "head"), detail_path=tmp_path / "maps"):
        assert torch.equal(call(pipeline()), frames)


def recorded_attention(pipe: CogVideoXPipeline) -> torch.Tensor:
    """In which steps and layers the stock pipeline computes attention, bool `[step, layer]`."""
    seen: list[tuple[int, int]] = []
    steps = [0]
    stock = dict(pipe.transformer.attn_processors)
    processor = type(next(iter(stock.values())))

    class Watching(processor):  # type: ignore[misc, valid-type]
        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            seen.append((steps[0], self.layer))
            return super().__call__(*args, **kwargs)

    def count(*args: Any) -> None:
        steps[0] += 1

    hook = pipe.transformer.register_forward_hook(count)
    pipe.transformer.set_attn_processor(
        {name: Watching(int(name.split(".")[1])) for name in pipe.transformer.attn_processors}
    )
    call(pipe, num_inference_steps=8)
    hook.remove()
    pipe.transformer.set_attn_processor(stock)
    table = torch.zeros(8, LAYERS, dtype=torch.bool)
    table[tuple(zip(*seen, strict=True))] = True
    return table


@pytest.mark.parametrize("name", ["pyramid", "first block"])
def test_what_a_cache_skips_is_nan(name: str) -> None:
    pipe = tiny.make_pipeline()
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
        if name == "pyramid"
        else FirstBlockCacheConfig(threshold=2.0)
    )
    computed = recorded_attention(pipe)
    assert computed.any()
    assert not computed.all()
    frames = call(pipe, num_inference_steps=8)
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, detail=("layer", "step")) as maps:
        assert torch.equal(call(pipe, num_inference_steps=8), frames)
    for method in METHODS:
        missing = maps.detail(method).isnan()
        assert torch.equal(missing.flatten(2).all(2), ~computed.T)
        assert torch.equal(missing.flatten(2).any(2), ~computed.T)
        assert torch.equal(maps.coverage[method], computed)
        mean = maps.detail(method).flatten(0, 1).nanmean(0)
        torch.testing.assert_close(mean, maps.get(method), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cache_that_leaves_the_unconditional_rows_out_of_the_first_step(streamed: bool, tmp_path: Path) -> None:
    pipe = tiny.make_pipeline()
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 0),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 901),
            tensor_format="BFCHW",
            attention_weight_callback=lambda _: 0.3,
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )
    frames = call(pipe, num_inference_steps=8)
    with dcm.trace(pipe, CONCEPTS, branch="both") as every_step:
        call(pipe, num_inference_steps=8)
    halved = ~every_step["uncond"].coverage["concept_attention"].any(1)
    first = int(halved.nonzero()[0])  # the one after it is whole
    options: dict[str, Any] = {"steps": [first, first + 1], "detail_path": tmp_path / "maps" if streamed else None}
    with dcm.trace(pipe, CONCEPTS, branch="both", detail=("step",), **options) as maps:
        assert torch.equal(call(pipe, num_inference_steps=8), frames)
    kept = {branch: of_branch.detail() for branch, of_branch in maps.items()}
    assert kept["uncond"].isnan().flatten(1).all(1).tolist() == [True, False]
    assert not kept["cond"].isnan().any()
    for branch, of_branch in maps.items():
        torch.testing.assert_close(kept[branch].nanmean(0), of_branch.get(), rtol=1e-5, atol=1e-6)


def test_steps_after_an_interruption_are_nan() -> None:
    def stop(pipe: CogVideoXPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= 1
        return tensors

    pipe = tiny.make_pipeline()
    with dcm.trace(pipe, CONCEPTS, detail=("step",)) as maps:
        call(pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert maps.detail().flatten(1).isnan().all(1).tolist() == [False, False, True, True]
    assert maps.coverage["concept_attention"].all(1).tolist() == [True, True, False, False]


def bare_calls(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "hidden_states": torch.randn(2, 3, 4, 6, 10, generator=generator),
            "encoder_hidden_states": torch.randn(2, tiny.TEXT_LENGTH, 32, generator=generator),
            "timestep": torch.tensor([500, 500]),
        }
        for _ in range(count)
    ]


def run_bare(transformer: Any, count: int = 3) -> None:
    with torch.no_grad():
        for arguments in bare_calls(count):
            transformer(**arguments)


def test_a_bare_transformer_needs_steps_for_the_step_axis() -> None:
    transformer, embeds = tiny.make_transformer(rope=False), torch.randn(2, 32)
    with (
        pytest.raises(dcm.ConceptMapsError, match="does not tell how many steps there will be; name them in steps="),
        dcm.trace(transformer, concept_embeds=embeds, detail=("step",)),
    ):
        run_bare(transformer)


def test_a_bare_transformer_with_named_steps() -> None:
    transformer, embeds = tiny.make_transformer(rope=False), torch.randn(2, 32)
    with dcm.trace(transformer, concept_embeds=embeds, detail=("step",), steps=[0, 2, 7]) as maps:
        run_bare(transformer)
    assert maps.detail().shape == (3, 2, 2, *tiny.GRID)
    for index, step in enumerate((0, 2)):
        with dcm.trace(transformer, concept_embeds=embeds, steps=[step]) as alone:
            run_bare(transformer)
        torch.testing.assert_close(maps.detail()[index], alone.get())
    assert maps.detail()[2].isnan().all()  # never run


def test_a_bare_transformer_without_the_step_axis() -> None:
    transformer, embeds = tiny.make_transformer(rope=False), torch.randn(2, 32)
    with dcm.trace(transformer, concept_embeds=embeds, detail=("layer", "head"), normalize="none") as maps:
        run_bare(transformer)
    torch.testing.assert_close(maps.detail().sum(1).mean(0), maps.get(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", ["layer", ("layers",), ("layer", "layer"), ("concept",), ("layer", "frame")])
def test_axes_that_cannot_be_kept(axes: Any) -> None:
    with (
        pytest.raises(dcm.ConceptMapsError, match="expected a list of different axes out of layer, step, head"),
        dcm.trace(pipeline(), CONCEPTS, detail=axes),
    ):
        pass


def test_no_axes_were_kept() -> None:
    maps = traced(())
    with pytest.raises(dcm.ConceptMapsError, match=r"no axes were kept; pass detail=\('layer', 'step'\)"):
        maps.detail()
    with pytest.raises(dcm.ConceptMapsError, match="method 'saliency' was not captured"):
        traced(("layer",)).detail("saliency")


def test_kept_axes_are_not_there_yet() -> None:
    with dcm.trace(pipeline(), CONCEPTS, detail=("layer",)) as maps:
        call(pipeline())
        with pytest.raises(dcm.ConceptMapsError, match="complete after the `with` block"):
            maps.detail()
    assert maps.detail().shape == (LAYERS, 2, 3, *tiny.GRID)

"""Maps of whole pipeline runs against the naive float64 implementation, and that implementation against the host."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import diffusers.models.embeddings
import naive
import pytest
import torch
from backbones import tiny_cogvideox
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
NORMALIZED = {"concept_attention": "softmax", "cross_attention": "softmax", "gramcol": "zscore", "imap": "zscore"}
CONCEPTS = ["dog", "red rock", "sky"]
PROMPTS = ["a red dog running on the beach", "the sky on a rock"]
TOLERANCE = 3e-5  # of the largest value of a map; float32 differs from float64 by up to 4e-6
pipeline = tiny_cogvideox.shaken_pipeline


def encoded(pipe: CogVideoXPipeline, concepts: Sequence[str], policy: str) -> torch.Tensor:
    """Concept embeddings `[C, width]`; the tokenizer makes one token of every word."""
    pooled = []
    for concept in concepts:
        ids = pipe.tokenizer(concept, padding="max_length", max_length=tiny_cogvideox.TEXT_LENGTH, return_tensors="pt")
        with torch.no_grad():
            states = pipe.text_encoder(ids.input_ids).last_hidden_state[0, : len(concept.split())]
        pooled.append({"mean": states.mean(0), "first": states[0], "last": states[-1]}[policy])
    return torch.stack(pooled)


def rows_of(branch: str, batch: int, guided: bool) -> slice:
    if not guided:
        return slice(0, batch)
    return slice(batch // 2, batch) if branch == "cond" else slice(0, batch // 2)


def naive_taps(
    pipe: CogVideoXPipeline, calls: list[dict[str, Any]], embeds: torch.Tensor, rows: slice
) -> list[list[naive.Taps]]:
    """What every step and layer shows of the given rows of the batch."""
    model, steps = naive.NaiveCogVideoX(pipe.transformer), []
    for call in calls:
        latents, text = call["hidden_states"][rows], call["encoder_hidden_states"][rows]
        concepts = embeds.expand(latents.shape[0], -1, -1)
        steps.append(model.forward(latents, text, call["timestep"][rows], call["image_rotary_emb"], concepts)[1])
    return steps


def assert_close(maps: torch.Tensor, expected: torch.Tensor) -> None:
    assert maps.dtype == torch.float32
    assert maps.shape == expected.shape
    assert (maps - expected).abs().max() <= TOLERANCE * expected.abs().max()


def check(
    rope: bool = True,
    concepts: Sequence[str] = CONCEPTS,
    *,
    normalize: str | None = None,
    branch: str = "cond",
    embeds: torch.Tensor | None = None,
    policy: str = "mean",
    steps: Sequence[int] = (0, 1, 2),
    layers: Sequence[int] = (0, 1, 2),
    heads: Any = None,
    rule: naive.HeadRule = naive.all_heads,
    grid: tuple[int, int, int] = tiny_cogvideox.GRID,
    **options: Any,
) -> None:
    """Run a pipeline under `trace` and compare every method with the naive maps; `options` go to the pipeline."""
    pipe = pipeline(rope)
    traced = dcm.trace(
        pipe,
        list(concepts),
        methods=METHODS,
        normalize=normalize,
        branch=branch,
        concept_embeds=embeds,
        token_policy=policy,
        steps=steps,
        layers=layers,
        heads=heads,
    )
    with tiny_cogvideox.recorded_calls(pipe.transformer) as calls, traced as maps:
        tiny_cogvideox.call(pipe, **options)
    batch, guided = calls[0]["hidden_states"].shape[0], options.get("guidance_scale", 4.0) > 1
    embeds = encoded(pipe, concepts, policy) if embeds is None else embeds
    for name in ("cond", "uncond") if branch == "both" else (branch,):
        every = naive_taps(pipe, calls, embeds, rows_of(name, batch, guided))
        taps = [[every[step][layer] for layer in layers] for step in steps]
        of_branch = maps[name] if branch == "both" else maps
        for method in METHODS:
            chosen = normalize or (
                NORMALIZED[method] if len(concepts) > 1 else NORMALIZED[method].replace("softmax", "none")
            )
            assert_close(of_branch.get(method), naive.saliency(taps, method, chosen, grid, rule))


@pytest.mark.parametrize("rope", [True, False])
def test_the_naive_model_is_the_host_model(monkeypatch: pytest.MonkeyPatch, rope: bool) -> None:
    """To 1e-9 in float64, with a spatial scale that is exact in the host's float32 position arithmetic."""
    transformer = tiny_cogvideox.make_transformer(rope=rope, spatial_interpolation_scale=2.0).double()
    tiny_cogvideox.shake(transformer)
    rotate = diffusers.models.embeddings.apply_rotary_emb

    def rotate_in_double(*args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as context:  # the host rotates in float32 whatever the model's dtype
            context.setattr(torch.Tensor, "float", torch.Tensor.double)
            return rotate(*args, **kwargs)

    monkeypatch.setattr(diffusers.models.embeddings, "apply_rotary_emb", rotate_in_double)
    generator = torch.Generator().manual_seed(1)
    random = partial(torch.randn, generator=generator, dtype=torch.float64)
    latents, text, concepts = random(2, 3, 4, 6, 10), random(2, tiny_cogvideox.TEXT_LENGTH, 32), random(2, 4, 32)
    timestep = torch.tensor([801, 37])
    angles = random(45, 16)
    rotary = (angles.cos(), angles.sin()) if rope else None
    with torch.no_grad():
        expected = transformer(latents, text, timestep, image_rotary_emb=rotary).sample
    predicted, _ = naive.NaiveCogVideoX(transformer).forward(latents, text, timestep, rotary, concepts)
    assert (predicted - expected).abs().max() < 1e-9 * expected.abs().max()


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0])
def test_positions_batch_and_guidance(rope: bool, prompt: Any, guidance_scale: float) -> None:
    check(rope, prompt=prompt, guidance_scale=guidance_scale)


@pytest.mark.parametrize("concepts", [["running"], ["dog", "sky"], ["dog", "sky", "red", "beach", "running"]])
def test_one_two_and_many_concepts(concepts: list[str]) -> None:
    check(concepts=concepts)


@pytest.mark.parametrize("branch", ["uncond", "both"])
@pytest.mark.parametrize("prompt", [PROMPTS[0], PROMPTS])
def test_branches(branch: str, prompt: Any) -> None:
    check(branch=branch, prompt=prompt)


@pytest.mark.parametrize("normalize", ["none", "softmax", "zscore"])
def test_normalizations(normalize: str) -> None:
    check(normalize=normalize)


@pytest.mark.parametrize(
    "subset", [{"layers": (0, 2)}, {"layers": (1,)}, {"steps": (1,)}, {"steps": (0, 2), "layers": (2,)}]
)
def test_layers_and_steps(subset: dict[str, Any]) -> None:
    check(**subset)


@pytest.mark.parametrize("indices", [(1, 3), (2,)])
@pytest.mark.parametrize("normalize", ["none", None])
def test_listed_heads(indices: tuple[int, ...], normalize: str | None) -> None:
    check(heads=indices, rule=naive.listed_heads(indices), normalize=normalize)


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("score", ["calinski_harabasz", "fisher"])
def test_best_heads(top_k: int, score: str) -> None:
    check(heads=dcm.HeadSelection(score=score, top_k=top_k), rule=naive.best_heads(top_k), prompt=PROMPTS)


@pytest.mark.parametrize("threshold", [0.5, 1.2, 1000.0])
def test_heads_above_a_threshold(threshold: float) -> None:
    check(heads=dcm.HeadSelection(threshold=threshold), rule=naive.heads_above(threshold), prompt=PROMPTS)


def test_heads_above_a_fisher_threshold() -> None:
    selection = dcm.HeadSelection(score="fisher", threshold=0.05)
    check(heads=selection, rule=naive.heads_above(0.05, fisher=True), prompt=PROMPTS)


@pytest.mark.parametrize("policy", ["mean", "first", "last"])
def test_concepts_of_several_tokens(policy: str) -> None:
    seed = torch.Generator().manual_seed(2)  # one without near ties
    check(concepts=["red rock", "the dog running", "sky"], policy=policy, generator=seed)


@pytest.mark.parametrize("branch", ["cond", "both"])
def test_embeddings_of_their_own_for_every_video(branch: str) -> None:
    embeds = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(3))
    check(embeds=embeds, branch=branch, prompt=PROMPTS)


@pytest.mark.parametrize("rope", [True, False])
def test_another_grid(rope: bool) -> None:
    check(rope, height=64, width=48, num_frames=5, grid=(2, 4, 3))


def test_imap_takes_five_of_many_heads() -> None:
    pipe = tiny_cogvideox.make_pipeline(heads=7)
    with tiny_cogvideox.recorded_calls(pipe.transformer) as calls, dcm.trace(pipe, CONCEPTS, methods=["imap"]) as maps:
        tiny_cogvideox.call(pipe)
    taps = naive_taps(pipe, calls, encoded(pipe, CONCEPTS, "mean"), slice(1, 2))
    assert_close(maps.get(), naive.saliency(taps, "imap", "zscore", tiny_cogvideox.GRID, naive.best_heads(5)))


@pytest.mark.parametrize("steps", [None, (1,)])
def test_bare_transformer(steps: tuple[int, ...] | None) -> None:
    """Every call is a step and every row a video; arguments may be positional."""
    pipe, random = (
        pipeline(True),
        partial(torch.randn, generator=torch.Generator().manual_seed(4)),
    )
    angles, embeds = random(45, 16), random(2, 3, 32)
    shared: dict[str, Any] = {"image_rotary_emb": (angles.cos(), angles.sin())}
    calls = [
        {
            "hidden_states": random(2, 3, 4, 6, 10),
            "encoder_hidden_states": random(2, 12, 32),
            "timestep": times,
            **shared,
        }
        for times in (torch.tensor([801, 37]), torch.tensor([400, 400]))
    ]
    with dcm.trace(pipe.transformer, concept_embeds=embeds, methods=METHODS, steps=steps) as maps, torch.no_grad():
        for call in calls:
            pipe.transformer(call["hidden_states"], call["encoder_hidden_states"], call["timestep"], **shared)
    taps = naive_taps(pipe, calls, embeds, slice(0, 2))
    taps = [taps[step] for step in steps or (0, 1)]
    for method in METHODS:
        expected = naive.saliency(taps, method, NORMALIZED[method], tiny_cogvideox.GRID, naive.all_heads)
        assert_close(maps.get(method), expected)


def test_one_frame() -> None:
    check(num_frames=1, grid=(1, 3, 5), heads=dcm.HeadSelection(top_k=1), prompt=PROMPTS)


def test_negative_prompt_and_another_length() -> None:
    check(negative_prompt="cat", branch="both", num_inference_steps=5, steps=(0, 4))

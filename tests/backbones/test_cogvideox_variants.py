"""Image-to-video, video-to-video, control, CogVideoX 1.5, ConsisID and unusual guidance: same frames, right maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from backbones import tiny_cogvideox
from backbones import tiny_cogvideox_variants as tiny
from backbones.naive_cogvideox_variants import NaiveVariant
from backbones.tiny_cogvideox_variants import PROMPTS, VARIANTS, Variant
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
)
from diffusers.models.upsampling import CogVideoXUpsample3D
from diffusers.pipelines.cogvideo.pipeline_output import CogVideoXPipelineOutput

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones.cogvideox import BACKBONE
from diffusers_concept_maps.upsample import spread_frames
from diffusers_concept_maps.visualize.overlay import overlay

CONCEPTS = ["dog", "red rock", "sky"]
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
NORMALIZED = {"concept_attention": "softmax", "cross_attention": "softmax", "gramcol": "zscore", "imap": "zscore"}
TOLERANCE = 3e-5  # of the largest value of a map
TEXT_TO_VIDEO = Variant(CogVideoXPipeline, lambda n: {"num_frames": 9})


@cache
def pipeline(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny.make_pipeline(VARIANTS[name], dtype)


@contextmanager
def recorded(transformer: torch.nn.Module) -> Iterator[list[tuple[dict[str, Any], torch.Tensor]]]:
    """Arguments and result of every forward pass."""
    calls: list[tuple[dict[str, Any], torch.Tensor]] = []
    hook = transformer.register_forward_hook(
        lambda module, args, kwargs, output: calls.append((dict(kwargs), output[0])), with_kwargs=True
    )
    try:
        yield calls
    finally:
        hook.remove()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def encoded(pipe: Any, concepts: Sequence[str]) -> torch.Tensor:
    """Concept embeddings `[C, width]`; the tokenizer makes one token of every word."""
    pooled = []
    for concept in concepts:
        ids = pipe.tokenizer(concept, padding="max_length", max_length=tiny_cogvideox.TEXT_LENGTH, return_tensors="pt")
        with torch.no_grad():
            states = pipe.text_encoder(ids.input_ids).last_hidden_state[0]
        pooled.append(states[: len(concept.split())].mean(0))
    return torch.stack(pooled)


def check_maps(
    pipe: Any,
    run: Callable[[], Any],
    grid: tuple[int, int, int],
    guided: Sequence[bool],
    methods: Sequence[str] = ("concept_attention",),
) -> Any:
    """Compare the maps of a run of two prompts with the naive ones; `guided` says so of every forward pass.

    Returns:
        The output of the run.
    """
    heads = dcm.HeadSelection(top_k=2)
    with (
        recorded(pipe.transformer) as calls,
        dcm.trace(pipe, CONCEPTS, methods=methods, heads=heads, branch="both") as maps,
    ):
        output = run()
    assert len(calls) == len(guided)
    model, embeds = NaiveVariant(pipe.transformer), encoded(pipe, CONCEPTS)
    seen: dict[str, list[list[naive.Taps]]] = {"cond": [], "uncond": []}
    for (call, prediction), both in zip(calls, guided, strict=True):
        assert len(prediction) == (4 if both else 2)
        rows = {"uncond": slice(0, 2), "cond": slice(2, 4)} if both else {"cond": slice(0, 2)}
        for branch, chosen in rows.items():
            expected, taps = model.run(call, chosen, embeds)
            assert_close(prediction[chosen], expected)
            seen[branch].append(taps)
    for branch, steps in seen.items():
        for method in methods:
            expected = naive.saliency(steps, method, NORMALIZED[method], grid, naive.best_heads(2))
            assert_close(maps[branch].get(method), expected)
            covered = torch.tensor([both or branch == "cond" for both in guided])
            table = covered[:, None].expand(-1, pipe.transformer.config.num_layers)
            assert torch.equal(maps[branch].coverage[method], table)
    return output


def state(transformer: torch.nn.Module) -> list[Any]:
    """What must be the very same objects after a capture."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [
        (
            name,
            id(getattr(module, "processor", None)),
            sorted(vars(module)),
            [list(vars(module)[hook]) for hook in hooks],
        )
        for name, module in transformer.named_modules()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_capture_changes_nothing(name: str, dtype: torch.dtype) -> None:
    pipe, variant = pipeline(name, dtype), VARIANTS[name]
    plain = tiny.call(pipe, variant)
    before, random = state(pipe.transformer), torch.get_rng_state()
    with dcm.trace(pipe, CONCEPTS, methods=METHODS, branch="both"):
        traced = tiny.call(pipe, variant)
    assert traced.dtype == dtype
    assert torch.equal(traced, plain)
    assert torch.equal(torch.get_rng_state(), random)
    assert state(pipe.transformer) == before


@pytest.mark.parametrize("name", VARIANTS)
def test_maps(name: str) -> None:
    pipe, variant = pipeline(name), VARIANTS[name]
    steps = 2 if name.startswith("video") else 3  # of three, a strength of 0.8 runs two
    check_maps(pipe, lambda: tiny.call(pipe, variant), variant.grid, [True] * steps, METHODS)


@pytest.mark.parametrize("name", ["1.5", "image", "video", "control", "face"])
def test_a_pipeline_that_returns_maps(name: str) -> None:
    pipe, variant = pipeline(name), VARIANTS[name]
    with dcm.trace(pipe, CONCEPTS) as maps:
        plain = tiny.call(pipe, variant, PROMPTS[:1])
    mixed = dcm.with_concept_maps(pipe)
    outputs = mixed(
        prompt=PROMPTS[0],
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_inference_steps=3,
        guidance_scale=4.0,
        max_sequence_length=tiny_cogvideox.TEXT_LENGTH,
        output_type="latent",
        generator=torch.Generator().manual_seed(variant.seed),
        concepts=CONCEPTS,
        **variant.inputs(1),
    )
    assert torch.equal(outputs.frames, plain)
    assert torch.equal(outputs.concept_maps.get(), maps.get())


@pytest.mark.parametrize("name", ["image", "image-ofs", "face"])
def test_every_concept_enters_at_the_learned_position_of_the_first_word(name: str) -> None:
    transformer = pipeline(name).transformer
    table = transformer.patch_embed.pos_embedding[0]
    assert not torch.equal(table[0], table[1])
    embeds = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(2))
    entered = BACKBONE.enter(transformer, embeds, torch.empty(2, 45, 64), {}, slice(None))
    expected = torch.nn.functional.linear(embeds, *transformer.patch_embed.text_proj.parameters()) + table[0]
    torch.testing.assert_close(entered, expected, rtol=0, atol=1e-6)
    other_length = BACKBONE.enter(transformer, embeds, torch.empty(2, 60, 64), {}, slice(None))
    torch.testing.assert_close(other_length, expected - table[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["image", "face"])
def test_the_order_of_concepts_does_not_matter_with_learned_positions(name: str) -> None:
    pipe, variant = pipeline(name), VARIANTS[name]
    with dcm.trace(pipe, CONCEPTS, methods=METHODS) as maps:
        tiny.call(pipe, variant)
    order = [2, 0, 1]
    with dcm.trace(pipe, [CONCEPTS[i] for i in order], methods=METHODS) as permuted:
        tiny.call(pipe, variant)
    for method in METHODS:
        assert_close(permuted.get(method), maps.get(method)[:, order])


@pytest.mark.parametrize(
    ("name", "covering"),
    [("1.5", [0] + [1] * 8), ("1.5-even", [0] * 8 + [1] * 8), ("image-1.5", [0] + [1] * 8)],
)
def test_padding_shows_in_no_frame(name: str, covering: list[int], tmp_path: Any) -> None:
    """The decoded frames take the token frames that cover them, in what is saved and loaded too."""
    pipe, variant = pipeline(name), VARIANTS[name]
    with dcm.trace(pipe, CONCEPTS) as maps:
        frames = tiny.call(pipe, variant, output_type="pt")
    assert frames.shape[:2] == (2, len(covering))
    maps.save(tmp_path / "maps.safetensors")
    expected = maps.get()[:, :, covering]
    for source in (maps, dcm.load(tmp_path / "maps.safetensors")):
        assert torch.equal(source.upsample(variant.grid[1:], len(covering)), expected)


@pytest.mark.parametrize(
    ("frames", "covering"), [(9, [0] + [1] * 8), (16, [0] * 8 + [1] * 8), (13, [0] * 5 + [1] * 8)]
)
def test_overlay_takes_the_token_frame_that_covers_a_frame(frames: int, covering: list[int]) -> None:
    tensor = torch.randn(2, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    clip = tiny.pictures(frames)
    laid = dcm.ConceptMap("dog", tensor, 4, 2).overlay(clip, index=1, opacity=0.3)
    assert laid == overlay(clip, tensor[1, covering], opacity=0.3)


def test_overlay_of_an_image() -> None:
    image, tensor = tiny.pictures(1)[0], torch.randn(1, 1, 3, 5)
    assert dcm.ConceptMap("dog", tensor, 1, 1).overlay(image) == overlay(image, tensor[0])


def test_a_map_knows_its_geometry() -> None:
    pipe = pipeline("1.5")
    with dcm.trace(pipe, CONCEPTS) as maps:
        tiny.call(pipe, VARIANTS["1.5"])
    assert (maps["sky"].frames_per_latent, maps["sky"].latents_per_token) == (4, 2)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("latents", range(1, 9))
def test_video_frames_take_the_tokens_they_are_decoded_from(latents: int, depth: int) -> None:
    """The number of every latent frame, sent through the VAE's own chunks and temporal upsampling."""
    vae = tiny_cogvideox.make_pipeline().vae
    stages = [CogVideoXUpsample3D(1, 1, compress_time=True) for _ in range(2)]
    for stage in stages:
        torch.nn.init.dirac_(stage.conv.weight)
        torch.nn.init.zeros_(stage.conv.bias)
    vae.decoder = torch.nn.Module()
    vae.decoder.forward = lambda z, conv_cache: (stages[1](stages[0](z)), None)
    with torch.no_grad():
        source = vae.decode(torch.arange(float(latents)).view(1, 1, -1, 1, 1)).sample[0, 0, :, 0, 0]
    padding = -latents % depth
    tokens = torch.arange((latents + padding) // depth).view(-1, 1, 1)
    spread = spread_frames(tokens, len(source), frames_per_latent=4, latents_per_token=depth)
    assert spread.flatten().tolist() == [(int(latent) + padding) // depth for latent in source]


def test_no_frames_to_spread_over() -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match="0 video frames; expected at least one"):
        spread_frames(torch.zeros(1, 2, 3, 5), 0)


def switch_off(pipe: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
    pipe._guidance_scale = 1.0
    return tensors


@pytest.mark.parametrize("options", [{"use_dynamic_cfg": True}, {"callback_on_step_end": switch_off}])
@pytest.mark.parametrize("name", ["text", "image", "video", "control", "face"])
def test_guidance_that_changes_during_the_run(name: str, options: dict[str, Any]) -> None:
    """Stock pipelines keep the layout of the batch whatever becomes of the scale."""
    variant = VARIANTS.get(name, TEXT_TO_VIDEO)
    pipe = pipeline(name) if name in VARIANTS else tiny.make_pipeline(variant)
    plain = tiny.call(pipe, variant, **options)
    steps = 2 if name == "video" else 3
    traced = check_maps(pipe, lambda: tiny.call(pipe, variant, **options), variant.grid, [True] * steps)
    assert torch.equal(traced, plain)
    assert not torch.equal(traced, tiny.call(pipe, variant))


class ShrinkingPipeline(CogVideoXPipeline):
    """Leaves the unconditional half out after the first step, and gives one timestep for the whole batch."""

    @torch.no_grad()
    def __call__(self, prompt: list[str], guidance_scale: float = 4.0) -> CogVideoXPipelineOutput:
        self._guidance_scale, self._num_timesteps = guidance_scale, 3
        cond, uncond = self.encode_prompt(prompt, max_sequence_length=tiny_cogvideox.TEXT_LENGTH)
        self.scheduler.set_timesteps(3)
        generator = torch.Generator().manual_seed(0)
        latents = self.prepare_latents(len(prompt), 4, 9, tiny.HEIGHT, tiny.WIDTH, cond.dtype, "cpu", generator)
        rotary = self._prepare_rotary_positional_embeddings(tiny.HEIGHT, tiny.WIDTH, 3, "cpu")
        for timestep in self.scheduler.timesteps:
            self._current_timestep, guided = timestep, self._guidance_scale > 1
            noise = self.transformer(
                hidden_states=torch.cat([latents] * 2) if guided else latents,
                encoder_hidden_states=torch.cat([uncond, cond]) if guided else cond,
                timestep=timestep[None],
                image_rotary_emb=rotary,
                return_dict=False,
            )[0]
            if guided:
                unconditional, conditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
            self._guidance_scale = 1.0
        self._current_timestep = None
        return CogVideoXPipelineOutput(frames=latents)


@pytest.fixture
def shrinking() -> ShrinkingPipeline:
    return tiny.make_pipeline(Variant(ShrinkingPipeline, lambda n: {}))


def test_guidance_that_ends_during_the_run(shrinking: ShrinkingPipeline) -> None:
    prompts = list(PROMPTS)
    plain = shrinking(prompts).frames
    traced = check_maps(shrinking, lambda: shrinking(prompts).frames, tiny_cogvideox.GRID, [True, False, False])
    assert torch.equal(traced, plain)


@pytest.mark.parametrize("branch", ["cond", "uncond"])
def test_one_branch_of_guidance_that_ends_during_the_run(shrinking: ShrinkingPipeline, branch: str) -> None:
    with dcm.trace(shrinking, CONCEPTS, branch="both") as both:
        shrinking(list(PROMPTS))
    with dcm.trace(shrinking, CONCEPTS, branch=branch) as maps:
        shrinking(["a cat"], guidance_scale=1.0)  # another run does not decide how this one is read
        shrinking(list(PROMPTS))
    assert_close(maps.get(), both[branch].get())
    assert torch.equal(maps.coverage["concept_attention"], both[branch].coverage["concept_attention"])


def test_embeddings_per_video_follow_a_shrinking_batch(shrinking: ShrinkingPipeline) -> None:
    embeds = encoded(shrinking, CONCEPTS)
    with dcm.trace(shrinking, CONCEPTS, branch="both") as shared:
        shrinking(list(PROMPTS))
    with dcm.trace(shrinking, CONCEPTS, concept_embeds=torch.stack([embeds, embeds.flip(0)]), branch="both") as own:
        shrinking(list(PROMPTS))
    for branch in ("cond", "uncond"):
        assert_close(own[branch].get()[0], shared[branch].get()[0])
        assert_close(own[branch].get()[1], shared[branch].get()[1].flip(0))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("name", ["image", "face"])
def test_passes_of_others_are_not_recorded(name: str, fresh: bool) -> None:
    """ConsisID's pipeline does not write down its timestep."""
    variant = VARIANTS[name]
    pipe = tiny.make_pipeline(variant)
    other = type(pipe)(**pipe.components | {"scheduler": CogVideoXDDIMScheduler()})
    other.set_progress_bar_config(disable=True)
    with recorded(pipe.transformer) as calls, dcm.trace(pipe, CONCEPTS) as expected:
        tiny.call(pipe, variant)
    if fresh:
        pipe = type(pipe)(**pipe.components | {"scheduler": CogVideoXDDIMScheduler()})
        pipe.set_progress_bar_config(disable=True)

    def interfere() -> None:
        tiny.call(other, variant, ["a cat"], guidance_scale=1.0)
        with torch.no_grad():
            pipe.transformer(**calls[0][0] | {"timestep": torch.tensor([5] * 4)})

    with dcm.trace(pipe, CONCEPTS) as maps:
        interfere()
        with pytest.raises(dcm.ConceptMapsError, match="nothing has been recorded"):
            maps.get()
        tiny.call(pipe, variant)
        interfere()
        assert torch.equal(maps.get(), expected.get())
        tiny.call(pipe, variant, ["a cat"])
        assert maps.get().shape[0] == 1
        tiny.call(pipe, variant)
    assert torch.equal(maps.get(), expected.get())


def test_supported() -> None:
    assert {"CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"} <= set(dcm.backbones.supported())


# Entries of the published configs that differ from the class's defaults.
FIVE_B = {"num_layers": 42, "num_attention_heads": 48, "use_rotary_positional_embeddings": True}
CHECKPOINTS = [
    ({}, "CogVideoX-2b"),
    (FIVE_B, "CogVideoX-5b"),
    (FIVE_B | {"in_channels": 32, "use_learned_positional_embeddings": True}, None),  # 5b-I2V
    (FIVE_B | {"patch_size_t": 2, "sample_height": 300, "sample_width": 300}, None),  # 1.5-5B
    (FIVE_B | {"patch_size_t": 2, "in_channels": 32, "ofs_embed_dim": 512}, None),  # 1.5-5B-I2V
    (FIVE_B | {"in_channels": 32}, None),  # Fun-V1.1-5b-Pose
    ({"in_channels": 32}, None),  # Fun-V1.1-2b-Pose
]


@pytest.mark.parametrize(("config", "name"), CHECKPOINTS)
def test_presets_are_for_text_to_video_alone(config: dict[str, Any], name: str | None) -> None:
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(**config)
    preset = BACKBONE.preset(transformer)
    assert (preset.name if preset else None) == name


def test_consisid_has_no_preset() -> None:
    config = FIVE_B | {"in_channels": 32, "use_learned_positional_embeddings": True}
    with torch.device("meta"):
        assert BACKBONE.preset(ConsisIDTransformer3DModel(**config)) is None
    published = SimpleNamespace(config=SimpleNamespace(**config | {"in_channels": 16}))
    assert BACKBONE.preset(published) is None  # the learned table alone tells it apart

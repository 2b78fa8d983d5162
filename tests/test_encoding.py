"""Maps of real clips are those of a bare transformer over latents noised by hand, and the pipeline stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones._oracle import kept_state
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps import fitting
from diffusers_concept_maps.encoding import encode
from diffusers_concept_maps.fitting import fit_clip
from diffusers_concept_maps.upsample import upsample_map

CONCEPTS = ("dog", "running", "sky")
METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
PROMPT = "a red dog running on the beach"
SPREAD = (1e-5, 1e-5)
"""Absolute and relative difference that float32 may make."""


def clip_of(frames: int = 9, height: int = 48, width: int = 80) -> torch.Tensor:
    """Noise and a shade, `[frame, 3, height, width]` in 0..1."""
    noise = torch.rand(frames, 3, height, width, generator=torch.Generator().manual_seed(frames))
    return 0.5 * noise + 0.5 * torch.linspace(0, 1, width)


@cache
def shared(rope: bool = True, dtype: torch.dtype = torch.float32) -> CogVideoXPipeline:
    """A pipeline that tests leave as it is."""
    return tiny.make_pipeline(rope=rope, dtype=dtype)


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_pipeline()


def kept(scheduler: Any) -> torch.Tensor:
    """The cumulative product of each of 1000 training steps, in float64 from the config alone."""
    config = scheduler.config
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64)
    product = (1 - roots.square()).cumprod(0)
    assert config.beta_schedule == "scaled_linear"
    product = product / (config.snr_shift_scale + (1 - config.snr_shift_scale) * product)
    if config.rescale_betas_zero_snr:
        root = product.sqrt()
        product = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    return product


@torch.no_grad()
def by_hand(
    pipe: CogVideoXPipeline, clip: torch.Tensor, level: float, seed: int = 0, prompt: str = PROMPT, **options: Any
) -> dcm.ConceptMaps:
    """Maps of one forward pass of the bare transformer; the clip is of a size that the model takes."""
    frames, _, height, width = clip.shape
    dtype = pipe.transformer.dtype
    pixels = (clip * 2 - 1).transpose(0, 1)[None].to(pipe.vae.dtype)
    clean = (pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor).double()
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)).double()
    step = round(1000 * level) - 1
    signal = kept(pipe.scheduler)[step]
    noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    rotary = None
    if pipe.transformer.config.use_rotary_positional_embeddings:
        rotary = pipe._prepare_rotary_positional_embeddings(height, width, (frames - 1) // 4 + 1, "cpu")
    if "prompt_tokens" not in options:
        options = {"concepts": list(CONCEPTS), "concept_embeds": embeds_of(pipe, CONCEPTS)} | options
    with dcm.trace(pipe.transformer, **options) as maps:
        pipe.transformer(
            hidden_states=noised.transpose(1, 2).to(dtype),
            encoder_hidden_states=text_of(pipe, [prompt]),
            timestep=torch.tensor([step]),
            image_rotary_emb=rotary,
        )
    return maps


def text_of(pipe: CogVideoXPipeline, texts: Sequence[str]) -> torch.Tensor:
    tokens = pipe.tokenizer(
        list(texts), padding="max_length", max_length=tiny.TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    return pipe.text_encoder(tokens.input_ids)[0]


def embeds_of(pipe: CogVideoXPipeline, concepts: Sequence[str]) -> torch.Tensor:
    """The mean over the words of each concept, its end mark and padding left out."""
    states = text_of(pipe, concepts).float()
    return torch.stack([state[: len(text.split())].mean(0) for state, text in zip(states, concepts, strict=True)])


def expect(maps: dcm.ConceptMaps, expected: Sequence[dcm.ConceptMaps]) -> None:
    """Every method's maps are the mean of the expected ones."""
    assert {maps.methods} == {other.methods for other in expected}
    for method in maps.methods:
        mean = torch.stack([other.get(method).double() for other in expected]).mean(0)
        torch.testing.assert_close(maps.get(method).double(), mean, atol=SPREAD[0], rtol=SPREAD[1])
        assert mean.std() > 1e-3


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("level", [0.05, 0.5, 1.0])
def test_one_level(rope: bool, level: float) -> None:
    pipe, clip = shared(rope), clip_of()
    maps = encode(pipe, clip, CONCEPTS, noise_level=level, prompt=PROMPT, methods=METHODS)
    assert maps.concepts == CONCEPTS
    assert maps.get().shape == (1, 3, *tiny.GRID)
    expect(maps, [by_hand(pipe, clip, level, methods=METHODS)])


def test_levels_and_samples_are_averaged() -> None:
    pipe, clip = shared(), clip_of()
    options = {"methods": METHODS, "layers": [0, 2]}
    maps = encode(pipe, clip, CONCEPTS, noise_level=(0.2, 0.7), num_samples=3, seed=5, prompt=PROMPT, **options)
    expect(maps, [by_hand(pipe, clip, level, seed, **options) for level in (0.2, 0.7) for seed in (5, 6, 7)])
    assert maps.metadata["noise_levels"] == [0.2, 0.7]
    assert maps.metadata["seeds"] == [5, 6, 7]
    assert maps.metadata["prompt"] == PROMPT
    assert maps.coverage["imap"].tolist() == [[True, False, True]] * 6


def test_levels_and_samples_are_steps_of_kept_axes() -> None:
    pipe, clip = shared(), clip_of()
    axes = ("layer", "step", "head")
    options = {"methods": ("concept_attention", "gramcol"), "detail": axes, "normalize": "none"}
    maps = encode(pipe, clip, CONCEPTS, noise_level=(0.7, 0.2), num_samples=2, prompt=PROMPT, **options)
    parts = [by_hand(pipe, clip, level, seed, steps=[0], **options) for level in (0.7, 0.2) for seed in (0, 1)]
    for method in options["methods"]:
        expected = torch.cat([part.detail(method) for part in parts], dim=1)
        assert expected.shape == (3, 4, 4, 1, 3, *tiny.GRID)
        torch.testing.assert_close(maps.detail(method), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [None, ["dog", "beach"]])
def test_words_of_the_caption(words: list[str] | None) -> None:
    pipe, clip = shared(), clip_of()
    options = {"target": "prompt", "methods": ("cross_attention", "gramcol")}
    maps = encode(pipe, clip, words, noise_level=0.4, prompt=PROMPT, **options)
    places = {word: [place] for place, word in enumerate(PROMPT.split()) if words is None or word in words}
    expect(maps, [by_hand(pipe, clip, 0.4, prompt_tokens=places, **options)])
    assert maps.concepts == tuple(places)


def test_further_options_are_those_of_trace() -> None:
    pipe, clip = shared(), clip_of()
    options = {"heads": [1, 3], "normalize": "zscore", "space": "value", "reads": "image"}
    maps = encode(pipe, clip, CONCEPTS, prompt=PROMPT, **options)
    expect(maps, [by_hand(pipe, clip, 0.5, **options)])


def test_arguments_of_the_call() -> None:
    pipe, clip = shared(), clip_of()
    with torch.no_grad():
        states = text_of(pipe, [PROMPT])
    maps = encode(pipe, clip, CONCEPTS, call={"prompt": None, "prompt_embeds": states})
    expect(maps, [by_hand(pipe, clip, 0.5)])


def test_the_scheduler_is_of_no_matter_only_its_noise_is() -> None:
    pipe, clip = tiny.make_pipeline(), clip_of()
    expected = encode(pipe, clip, CONCEPTS, prompt=PROMPT)
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config)
    assert torch.equal(encode(pipe, clip, CONCEPTS, prompt=PROMPT).get(), expected.get())
    pipe.scheduler = CogVideoXDPMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    maps = encode(pipe, clip, CONCEPTS, prompt=PROMPT)
    expect(maps, [by_hand(pipe, clip, 0.5)])
    assert not torch.allclose(maps.get(), expected.get(), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """Noise is added in float32."""
    pipe, clip = shared(dtype=dtype), clip_of()
    maps = encode(pipe, clip, CONCEPTS, noise_level=(0.3, 0.6), prompt=PROMPT, methods=METHODS)
    expect(maps, [by_hand(pipe, clip, level, methods=METHODS) for level in (0.3, 0.6)])


def test_a_vae_of_another_precision(pipe: CogVideoXPipeline) -> None:
    clip = clip_of()
    for name in ("transformer", "text_encoder"):
        getattr(pipe, name).to(torch.bfloat16)
    expect(encode(pipe, clip, CONCEPTS, prompt=PROMPT, methods=METHODS), [by_hand(pipe, clip, 0.5, methods=METHODS)])


@pytest.mark.parametrize(
    ("source", "model"),
    [
        ((1, 48, 80), (1, 48, 80)),
        ((1, 31, 77), (1, 32, 80)),
        ((6, 50, 33), (9, 48, 32)),
        ((9, 100, 61), (9, 80, 48)),
        ((20, 48, 80), (9, 48, 80)),
    ],
)
def test_any_size_and_length(source: tuple[int, int, int], model: tuple[int, int, int]) -> None:
    pipe, clip = shared(), clip_of(*source)
    maps = encode(pipe, clip, CONCEPTS, prompt=PROMPT)
    padding = max(0, model[0] - source[0])
    assert maps.metadata["source"] == {"source": list(source), "model": list(model), "padding": padding}
    fitted, _ = fit_clip(clip, area=48 * 80, multiple=16, frame_step=4, max_frames=9)
    assert fitted.shape == (model[0], 3, *model[1:])
    expect(maps, [by_hand(pipe, fitted, 0.5)])
    seen = min(source[0], model[0])
    expected = upsample_map(maps.get(), source[1:], seen, padding=padding, frames_per_latent=4)
    assert torch.equal(maps.upsample(), expected)
    assert maps.upsample().shape == (1, 3, seen, *source[1:])


def test_a_clip_that_is_too_long_is_cut_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(fitting.logger, "warning", said.append)
    pipe, clip = shared(), clip_of(20)
    maps = encode(pipe, clip, CONCEPTS, prompt=PROMPT)
    assert len(said) == 1
    assert "20 frames and the model takes 9 at most: frames 0 to 8 are used" in said[0]
    assert torch.equal(maps.get(), encode(pipe, clip[:9], CONCEPTS, prompt=PROMPT).get())
    encode(pipe, clip[:7], CONCEPTS, prompt=PROMPT)
    assert len(said) == 1


def test_size_and_length_that_are_asked_for() -> None:
    pipe, clip = shared(), clip_of(12)
    maps = encode(pipe, clip, CONCEPTS, prompt=PROMPT, size=(32, 64), num_frames=5)
    fitted, _ = fit_clip(clip, size=(32, 64), frame_step=4, max_frames=5)
    expect(maps, [by_hand(pipe, fitted, 0.5)])
    assert maps.get().shape == (1, 3, 2, 2, 4)
    assert maps.upsample().shape == (1, 3, 5, 48, 80)
    longer = encode(pipe, clip, CONCEPTS, prompt=PROMPT, num_frames=13)
    assert longer.metadata["source"] == {"source": [12, 48, 80], "model": [13, 48, 80], "padding": 1}


def test_the_noise_is_seeded() -> None:
    pipe, clip = shared(), clip_of()
    first, again, other = (encode(pipe, clip, CONCEPTS, seed=seed).get() for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=1e-3)


def test_work_is_done_once_and_nothing_is_decoded(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    parts = {"transformer": pipe.transformer, "text": pipe.text_encoder, "vae": pipe.vae.encoder}
    parts |= {f"block {i}": block for i, block in enumerate(pipe.transformer.transformer_blocks)}
    for name, module in parts.items():
        module.register_forward_pre_hook(lambda *args, name=name: calls.update([name]))

    def decode(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(pipe.vae, "decode", decode)
    once = {"text": 2, "transformer": 1, "block 0": 1, "block 1": 1}  # the concepts, and the caption
    clip = clip_of()
    encode(pipe, clip, CONCEPTS, prompt=PROMPT, layers=[1])
    vae = calls.pop("vae")
    assert calls == once
    calls.clear()
    encode(pipe, clip, CONCEPTS, prompt=PROMPT, layers=[0, 1], noise_level=(0.2, 0.4, 0.6), num_samples=2)
    assert calls.pop("vae") == vae
    assert calls == {name: number if name == "text" else 6 * number for name, number in once.items()}


class Untouched:
    """What a pipeline holds and makes, to compare with what it was."""

    def __init__(self, pipe: CogVideoXPipeline) -> None:
        self.pipe = pipe
        self.generated = tiny.call(pipe)
        self.before = self.state()

    def state(self) -> list[Any]:
        pipe = self.pipe
        models = [kept_state(module) for module in (pipe.transformer, pipe.vae, pipe.text_encoder)]
        return [*models, dict(pipe.__dict__), dict(pipe.scheduler.__dict__), torch.get_rng_state().tolist()]

    def check(self) -> None:
        after = self.state()
        assert after[:3] == self.before[:3]
        for now, then in zip(after[3:5], self.before[3:5], strict=True):
            assert now.keys() == then.keys()
            assert [name for name in then if now[name] is not then[name]] == []
        assert after[5] == self.before[5]
        assert torch.equal(tiny.call(self.pipe), self.generated)


@pytest.mark.parametrize("target", ["concepts", "prompt"])
def test_the_pipeline_stays_as_it_is(pipe: CogVideoXPipeline, target: str) -> None:
    untouched = Untouched(pipe)
    methods = ("cross_attention", "gramcol")
    encode(pipe, clip_of(), ["dog"], prompt=PROMPT, noise_level=(0.2, 0.9), target=target, methods=methods)
    untouched.check()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["vae.encoder", "transformer", "transformer.transformer_blocks.1", "text_encoder"])
def test_the_pipeline_stays_as_it_is_whatever_fails(
    pipe: CogVideoXPipeline, where: str, error: type[BaseException]
) -> None:
    untouched = Untouched(pipe)
    name, _, path = where.partition(".")
    module, calls = getattr(pipe, name).get_submodule(path), Counter[str]()

    def fail(*args: Any) -> None:
        calls.update(["call"])
        if calls["call"] == (1 if name == "vae" else 2):  # of the text encoder, the one that encodes the caption
            raise error("stop")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(error, match="stop"):
        encode(pipe, clip_of(), CONCEPTS, prompt=PROMPT, noise_level=(0.2, 0.4))
    hook.remove()
    untouched.check()
    assert torch.equal(
        encode(pipe, clip_of(), CONCEPTS, prompt=PROMPT).get(),
        encode(shared(), clip_of(), CONCEPTS, prompt=PROMPT).get(),
    )


def test_a_capture_that_is_open_is_not_disturbed(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, CONCEPTS) as maps:
        with pytest.raises(dcm.ConceptMapsError, match="is being traced already"):
            encode(pipe, clip_of(), CONCEPTS)
        tiny.call(pipe)
    with dcm.trace(pipe, CONCEPTS) as expected:
        tiny.call(pipe)
    assert torch.equal(maps.get(), expected.get())


def test_a_pipeline_that_returns_maps(pipe: CogVideoXPipeline) -> None:
    maps = encode(dcm.with_concept_maps(pipe), clip_of(), CONCEPTS, prompt=PROMPT)
    assert torch.equal(maps.get(), encode(shared(), clip_of(), CONCEPTS, prompt=PROMPT).get())


@pytest.mark.parametrize("where", ["transformer", "blocks"])
def test_compiled(pipe: CogVideoXPipeline, where: str) -> None:
    """Graphs go on behind the deepest layer, and those that were compiled for generation do not hide the clip."""
    torch._dynamo.reset()
    for module in [pipe.transformer] if where == "transformer" else pipe.transformer.transformer_blocks:
        module.compile(fullgraph=True, backend="eager")
    untouched = Untouched(pipe)
    levels = tuple(number / 10 for number in range(1, 11))  # more than graphs of one function may be
    for options in ({"seed": 0}, {"seed": 1, "layers": [1]}, {"noise_level": levels}):
        maps, expected = (encode(p, clip_of(), CONCEPTS, prompt=PROMPT, **options) for p in (pipe, shared()))
        torch.testing.assert_close(maps.get(), expected.get(), atol=1e-6, rtol=1e-5)
    untouched.check()


@pytest.mark.parametrize("how", ["models", "groups"])
def test_offload(pipe: CogVideoXPipeline, how: str) -> None:
    if how == "models":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        for module in (pipe.transformer, pipe.vae):
            module.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    for layers in ([1], None):
        maps, expected = (encode(p, clip_of(), CONCEPTS, prompt=PROMPT, layers=layers) for p in (pipe, shared()))
        assert torch.equal(maps.get(), expected.get())
        assert torch.equal(tiny.call(pipe), tiny.call(shared()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, "encode has no argument steps; beside its own it takes concept_embeds, detail, heads"),
        ({"noise_level": 0}, r"noise_level is 0; expected a fraction of the training schedule in \(0, 1\]"),
        ({"noise_level": (0.5, 1.2)}, "noise_level is 1.2; expected a fraction"),
        ({"noise_level": ()}, r"noise_level is \(\); expected a fraction"),
        ({"num_samples": 0}, "num_samples is 0; expected at least 1"),
        ({"num_frames": 0}, "num_frames is 0; expected at least 1"),
        ({"size": (40, 80)}, r"size \(40, 80\) \(height, width\) is not what the model takes"),
        ({"image_or_video": "no/such/file.mp4"}, "there is no file 'no/such/file.mp4'"),
        ({"image_or_video": torch.full((3, 8, 8), 2.0)}, "expected uint8, or floats in 0..1"),
        ({"methods": ["gradcam"]}, "unknown method 'gradcam'"),
        ({"layers": [3]}, "layer"),
        ({"concepts": None}, "concepts"),
        ({"concepts": ["dog"], "target": "prompt", "methods": ["gramcol"], "prompt": "a cat"}, "dog"),
    ],
)
def test_mistakes(options: dict[str, Any], message: str) -> None:
    pipe = shared()
    before = kept_state(pipe.transformer)
    arguments = {"image_or_video": clip_of(), "concepts": CONCEPTS} | options
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        encode(pipe, **arguments)
    assert kept_state(pipe.transformer) == before


def test_what_is_no_pipeline_with_a_vae(pipe: CogVideoXPipeline) -> None:
    with pytest.raises(
        dcm.ConceptMapsValueError, match="CogVideoXTransformer3DModel has no vae; expected a diffusers"
    ):
        encode(pipe.transformer, clip_of(), CONCEPTS)
    pipe.vae = None
    with pytest.raises(dcm.ConceptMapsValueError, match="CogVideoXPipeline has no vae; expected a diffusers pipeline"):
        encode(pipe, clip_of(), CONCEPTS)

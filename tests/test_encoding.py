"""Maps of real clips are those of a bare transformer over latents that are noised by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox as tiny
from backbones._oracle import kept_state
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.hooks import HookRegistry
from encoded import CONCEPTS, METHODS, PROMPT, by_hand, clip_of, expect, shared, text_of

import diffusers_concept_maps as dcm
from diffusers_concept_maps import fitting
from diffusers_concept_maps.encoding import encode
from diffusers_concept_maps.fitting import fit_clip
from diffusers_concept_maps.upsample import upsample_map


@pytest.fixture
def pipe() -> CogVideoXPipeline:
    return tiny.make_pipeline()


@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("level", [0.05, 0.5, 1.0])
def test_one_level(rope: bool, level: float) -> None:
    pipe, clip = shared(rope), clip_of()
    maps = encode(pipe, clip, CONCEPTS, noise_level=level, prompt=PROMPT, methods=METHODS)
    assert maps.concepts == CONCEPTS
    assert maps.get().shape == (1, 3, *tiny.GRID)
    expect(maps, [by_hand(pipe, clip, level, methods=METHODS)])


def test_where_no_signal_is_left_the_clip_does_not_matter() -> None:
    """The schedule of the embedded model ends in nothing but noise."""
    pipe = dcm.load_shapes_pipeline()
    assert float(pipe.scheduler.alphas_cumprod[-1]) == 0
    one, other = (
        encode(pipe, torch.full((6, 3, 32, 32), value), ["red", "blue"], noise_level=1.0).get() for value in (0.1, 0.9)
    )
    assert torch.equal(one, other)
    assert bool(one.isfinite().all())
    assert float(one.std()) > 0


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0]}, "encode has no argument steps; beside its own it takes concept_embeds, detail, heads"),
        ({"noise_level": 0}, r"noise_level is 0; expected a fraction of the training schedule in \(0, 1\]"),
        ({"noise_level": (0.5, 1.2)}, "noise_level is 1.2; expected a fraction"),
        ({"noise_level": ()}, r"noise_level is \(\); expected a fraction"),
        ({"num_samples": 0}, "num_samples is 0; expected a whole number of at least 1"),
        ({"num_samples": 1.5}, "num_samples is 1.5; expected a whole number of at least 1"),
        ({"num_frames": 0}, "num_frames is 0; expected a whole number of at least 1"),
        ({"num_frames": "3"}, "num_frames is '3'; expected a whole number of at least 1"),
        ({"seed": "a"}, "seed is 'a'; expected a whole number"),
        ({"size": 32}, r"size is 32; expected \(height, width\) in pixels"),
        ({"size": (32,)}, r"size is \(32,\); expected \(height, width\) in pixels"),
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
    HookRegistry.check_if_exists_or_initialize(pipe.transformer)  # as the first run of a stock pipeline leaves it
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

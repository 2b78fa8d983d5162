"""HunyuanVideo 1.5 beyond the contract: images, guiders, half precision, and words behind other kinds of text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import tiny_hunyuan_video15 as tiny
from diffusers import ClassifierFreeGuidance, LayerSkipConfig, SkipLayerGuidance
from PIL import Image

import diffusers_concept_maps as dcm
from diffusers_concept_maps.backbones import find_backbone

METHODS = ("concept_attention", "cross_attention", "gramcol", "imap")
PICTURE = Image.new("RGB", (20, 12), (90, 20, 200))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.make_pipeline()


@pytest.fixture(scope="module")
def image_pipe() -> Any:
    return tiny.make_image_pipeline()


def call_with_image(pipe: Any, prompt: str = "a red dog") -> torch.Tensor:
    latents = torch.randn(1, 4, 3, 3, 5, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:  # the pipeline chooses among sizes of its checkpoint
        patch.setattr(pipe.video_processor, "calculate_default_height_width", lambda *_, **__: (12, 20))
        frames: torch.Tensor = pipe(
            image=PICTURE,
            prompt=prompt,
            negative_prompt="a cat",
            latents=latents,
            num_frames=9,
            num_inference_steps=2,
            output_type="latent",
        ).frames
    return frames


def test_image_to_video(image_pipe: Any) -> None:
    calls: list[dict[str, Any]] = []
    off = call_with_image(image_pipe)
    hook = image_pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True
    )
    embeds = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
    with dcm.trace(image_pipe, concept_embeds=embeds, methods=METHODS, branch="both", steps=[1]) as maps:
        on = call_with_image(image_pipe)
    hook.remove()
    assert torch.equal(on, off)
    assert len(calls) == 4
    for branch, inputs in zip(("cond", "uncond"), calls[2:], strict=True):
        assert (inputs["image_embeds"] != 0).all()
        with dcm.trace(image_pipe.transformer, concept_embeds=embeds, methods=METHODS) as expected, torch.no_grad():
            image_pipe.transformer(**inputs)
        for method in METHODS:
            actual, reference = maps[branch].get(method), expected.get(method)
            assert actual.shape == (1, 2, 3, 3, 5)
            torch.testing.assert_close(actual, reference, rtol=0, atol=1e-5 * float(reference.abs().max()))


def test_half_precision() -> None:
    """The pipeline rounds its timesteps to the dtype of the latents then."""
    pipe = tiny.make_pipeline().to(torch.bfloat16)
    off = tiny.call(pipe, ["a red dog"])
    with dcm.trace(pipe, ["dog"], methods=["gramcol"]) as maps:
        assert torch.equal(tiny.call(pipe, ["a red dog"]), off)
    assert maps.coverage["gramcol"].tolist() == [[True] * 3] * 3


def test_guiders() -> None:
    pipe = tiny.make_pipeline()
    pipe.register_modules(guider=ClassifierFreeGuidance(guidance_scale=4.0, start=0.4))
    off = tiny.call(pipe, ["a red dog"])
    with dcm.trace(pipe, ["dog", "sky"], branch="both") as maps:
        assert torch.equal(tiny.call(pipe, ["a red dog"]), off)
    for branch, steps in (("cond", [True] * 3), ("uncond", [False, True, True])):
        assert maps[branch].coverage["concept_attention"].any(1).tolist() == steps
    skipped = LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False, skip_ff=True)
    span = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe.register_modules(guider=SkipLayerGuidance(guidance_scale=4.0, skip_layer_config=skipped, **span))
    with pytest.raises(dcm.ConceptMapsError, match="more than two forward passes"), dcm.trace(pipe, ["dog"]):
        tiny.call(pipe, ["a red dog"])


@pytest.mark.parametrize("prompt", ["a red dog", 'the dog on "red rock"', 'a "cat", a "sky" dog'])
@pytest.mark.parametrize("image", [False, True])
def test_words_stand_behind_image_and_glyphs(prompt: str, image: bool, pipe: Any, image_pipe: Any) -> None:
    """What the first block gets in the rows of the words is what the refiner made of their tokens."""
    chosen = image_pipe if image else pipe
    transformer = chosen.transformer
    refined: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    hooks = [
        transformer.context_embedder.register_forward_hook(lambda _, args, output: refined.append(output)),
        transformer.transformer_blocks[0].register_forward_pre_hook(lambda _, args: texts.append(args[1])),
    ]
    with dcm.trace(chosen, ["dog"], target="prompt", methods=METHODS) as found:
        call_with_image(chosen, prompt) if image else tiny.call(chosen, [prompt])
    for hook in hooks:
        hook.remove()
    words = chosen.tokenizer(prompt).input_ids
    token = words.index(chosen.tokenizer("dog").input_ids[0])
    wanted = refined[0][0, token] + transformer.cond_type_embed.weight[0]
    [row] = (texts[0][0] == wanted).all(-1).nonzero().flatten().tolist()
    with dcm.trace(chosen, target="prompt", prompt_tokens={"dog": [row]}, methods=METHODS) as given:
        call_with_image(chosen, prompt) if image else tiny.call(chosen, [prompt])
    for method in METHODS:
        assert torch.equal(found.get(method), given.get(method))


@pytest.mark.parametrize("length", [None, 16])
def test_concepts_are_encoded_within_the_chat(pipe: Any, length: int | None) -> None:
    random = torch.get_rng_state()
    states, counts = find_backbone(pipe.transformer).encode(pipe, ["dog", "the red rock"], length)
    assert counts == [1, 3]
    assert torch.equal(torch.get_rng_state(), random)
    for text, state, count in zip(["dog", "the red rock"], states, counts, strict=True):
        chat = f"<|im_start|>system\n{pipe.system_message}<|im_end|>\n<|im_start|>user\n{text}"
        with torch.no_grad():
            hidden = pipe.text_encoder(pipe.tokenizer(chat, return_tensors="pt").input_ids, output_hidden_states=True)
        torch.testing.assert_close(state[:count], hidden.hidden_states[-3][0, -count:], rtol=0, atol=1e-5)


def test_what_cannot_be_encoded() -> None:
    pipe = tiny.make_pipeline()
    backbone = find_backbone(pipe.transformer)
    with pytest.raises(dcm.ConceptMapsError, match="has 300 tokens; expected at most 255"):
        backbone.encode(pipe, ["dog " * 300], None)
    with pytest.raises(dcm.ConceptMapsError, match="'zebra' has no word that the tokenizer knows"):
        backbone.encode(pipe, ["zebra"], None)
    pipe.text_encoder = None
    with pytest.raises(dcm.ConceptMapsError, match="no tokenizer or text encoder"):
        backbone.encode(pipe, ["dog"], None)


def test_official_maps_have_no_preset_but_their_quirks(pipe: Any) -> None:
    """`parity="imap"` refines all concepts as one sequence here too, with padding to the length of the text."""
    assert find_backbone(pipe.transformer).preset(pipe.transformer) is None
    transformer, inputs = pipe.transformer, tiny.inputs(1, 5, 1)
    embeds = torch.randn(2, tiny.WIDTH, generator=torch.Generator().manual_seed(3))
    seen: list[tuple[Any, ...]] = []
    hook = transformer.context_embedder.register_forward_pre_hook(lambda _, args: seen.append(args))
    with dcm.trace(transformer, concept_embeds=embeds, parity="imap") as maps, torch.no_grad():
        transformer(**inputs)
    hook.remove()
    (_, own) = seen
    assert torch.equal(own[0], torch.cat([embeds[None], torch.zeros(1, 1, tiny.WIDTH)], 1))
    assert own[2].tolist() == [[1, 1, 0]]
    assert maps.get().isfinite().all()

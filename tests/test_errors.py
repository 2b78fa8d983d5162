"""Every error that a user can meet: its message, and that nothing is left behind in the model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import tiny_cogvideox
from diffusers import CogVideoXPipeline, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor2_0
from safetensors.torch import save_file
from torch import nn

import diffusers_concept_maps as dcm
from diffusers_concept_maps import backbones
from diffusers_concept_maps.backbones.cogvideox import CogVideoXBackbone
from diffusers_concept_maps.capture import attach
from diffusers_concept_maps.maps import ConceptMaps, StoredMaps

SUPPORTED = ", ".join(backbones.supported())
LENGTH = tiny_cogvideox.TEXT_LENGTH


def state(transformer: nn.Module) -> dict[str, Any]:
    """Identities of everything that an attach may change."""
    return {
        name: (
            {key: id(value) for key, value in vars(module).items()},
            list(module._forward_hooks),
            list(module._forward_pre_hooks),
            id(getattr(module, "processor", None)),
        )
        for name, module in transformer.named_modules()
    }


@pytest.fixture(scope="module")
def shared() -> CogVideoXPipeline:
    pipe = tiny_cogvideox.make_pipeline()
    tiny_cogvideox.call(pipe)  # at its first call the host puts a hook registry on the transformer, which stays
    return pipe


@pytest.fixture
def pipe(shared: CogVideoXPipeline) -> Iterator[CogVideoXPipeline]:
    """A pipeline that must be after the test what it was before."""
    before = state(shared.transformer)
    yield shared
    assert state(shared.transformer) == before


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=4,
    )


def refuse(message: str, what: Any, concepts: Any = ("dog", "sky"), *, value: bool = True, **options: Any) -> None:
    """Attaching raises `message`, a regular expression; `value` says whether it is a ValueError too."""
    error = dcm.ConceptMapsValueError if value else dcm.ConceptMapsError
    with pytest.raises(error, match=message) as caught, dcm.trace(what, concepts, **options):
        raise AssertionError("attached")
    assert isinstance(caught.value, ValueError) == value


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        (None, r"^no concepts; pass at least one"),
        ([], r"^no concepts; pass at least one"),
        ("dog", r"^concepts is the string 'dog'; expected a list such as \['dog'\]"),
        (["dog", " "], r"^concept ' ' is blank or no string"),
        ([""], r"^concept '' is blank or no string"),
        ([3], r"^concept 3 is blank or no string"),
        (["dog", "sky", " dog "], r"^concept 'dog' is there twice"),
        ([" ".join(["dog"] * LENGTH)], rf"^concept 'dog .*' has {LENGTH} tokens; expected at most {LENGTH - 1}"),
        (["dog", "zebra quagga"], r"^concept 'zebra quagga' has no word that the .*tokenizer knows"),
    ],
)
def test_concepts(pipe: CogVideoXPipeline, concepts: Any, message: str) -> None:
    refuse(message, pipe, concepts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"methods": ["daam"]},
            r"^unknown method 'daam'; expected one of concept_attention, cross_attention, gramcol",
        ),
        ({"methods": ["imap", "gramcol", "imap"]}, r"^methods \['imap', 'gramcol', 'imap'\] names one twice"),
        ({"methods": []}, r"^no methods; pass at least one"),
        ({"methods": "imap"}, r"^methods is the string 'imap'; expected a list such as \['imap'\]"),
        ({"layers": [0, 3]}, r"^layer 3 is out of range; expected an integer of 0 to 2"),
        ({"layers": [-1]}, r"^layer -1 is out of range"),
        ({"layers": []}, r"^no layers; pass at least one layer index, or None"),
        ({"heads": [4]}, r"^head 4 is out of range; expected an integer of 0 to 3"),
        ({"heads": []}, r"^no heads; pass at least one head index"),
        ({"heads": [1.5]}, r"^head 1.5 is no index; expected an integer of 0 to 3"),
        ({"layers": 1}, r"^layers is 1; expected a list such as \[1\]"),
        ({"heads": 3}, r"^heads is 3; expected a list such as \[3\]"),
        ({"steps": [-1]}, r"^step -1 is out of range; expected an integer of 0 or more"),
        ({"steps": []}, r"^no steps; pass at least one step index"),
        ({"heads": dcm.HeadSelection(top_k=5)}, r"^top_k is 5; the model has 4 heads in a layer"),
        ({"normalize": "minmax"}, r"^unknown normalize 'minmax'; expected None or one of none, softmax, zscore"),
        ({"concepts": ["dog"], "normalize": "softmax"}, r"^a softmax over a single concept is 1 everywhere"),
        ({"branch": "negative"}, r"^unknown branch 'negative'; expected one of cond, uncond, both"),
        ({"token_policy": "max"}, r"^unknown token_policy 'max'; expected one of mean, first, last"),
    ],
)
def test_options(pipe: CogVideoXPipeline, options: dict[str, Any], message: str) -> None:
    refuse(message, pipe, **options)


@pytest.mark.parametrize(
    ("embeds", "concepts", "message"),
    [
        (torch.zeros(32), None, r"^concept_embeds has shape \(32,\) and dtype torch.float32; expected a floating"),
        (torch.zeros(2, 31), None, r"shape \(2, 31\).*expected a floating tensor \[concept, 32\] or"),
        (torch.zeros(1, 1, 2, 32), None, r"shape \(1, 1, 2, 32\)"),
        (torch.zeros(0, 32), None, r"shape \(0, 32\)"),
        (torch.zeros(2, 32, dtype=torch.int64), None, r"dtype torch.int64"),
        (torch.zeros(2, 32), ["dog"], r"^1 concepts for 2 concept_embeds; expected one name for each"),
        (torch.zeros(2, 32), ["dog", "dog"], r"^concept 'dog' is there twice"),
    ],
)
def test_concept_embeds(pipe: CogVideoXPipeline, embeds: torch.Tensor, concepts: Any, message: str) -> None:
    refuse(message, pipe, concepts, concept_embeds=embeds)


def test_a_token_policy_for_given_embeddings(pipe: CogVideoXPipeline) -> None:
    message = "^token_policy is 'last', but it joins the tokens .*, and here concept_embeds are given; leave it out$"
    refuse(message, pipe, token_policy="last", concept_embeds=torch.zeros(2, 32))


def test_a_bare_transformer_needs_embeddings(pipe: CogVideoXPipeline) -> None:
    refuse("^a bare transformer has no text encoder; pass concept_embeds", pipe.transformer)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder"])
def test_a_pipeline_without_text_encoder_needs_embeddings(
    pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(pipe, part, None)
    refuse("^this CogVideoXPipeline has no tokenizer or text encoder.*pass concept_embeds instead", pipe, value=False)


def test_unsupported_models_are_told_what_is_supported() -> None:
    model = unet()
    assert "CogVideoXTransformer3DModel" in SUPPORTED
    refuse(f"^UNet2DModel cannot be traced; supported are {SUPPORTED}. docs/contributing.md", model, value=False)
    pipe = DDPMPipeline(unet=model, scheduler=DDPMScheduler())
    refuse(f"^DDPMPipeline has no transformer to trace; pass a .*{SUPPORTED}", pipe)
    refuse(f"^str has no transformer to trace; pass a .*{SUPPORTED}", "model")


def test_foreign_processors() -> None:
    transformer = tiny_cogvideox.make_transformer()
    embeds = torch.zeros(1, 32)
    transformer.transformer_blocks[1].attn1.processor = AttnProcessor2_0()
    before = state(transformer)
    message = "^layer 1 has the attention processor AttnProcessor2_0, which cannot be traced; put the model's own"
    refuse(message, transformer, None, concept_embeds=embeds, value=False)
    assert state(transformer) == before
    transformer.set_attn_processor(dcm.concept_attn_processors(transformer))
    before = state(transformer)
    message = "^layer 1 holds ConceptAttnProcessor2_0, which shows no attention"
    refuse(message, transformer, None, concept_embeds=embeds, value=False)
    assert state(transformer) == before


def test_processors_for_processors_of_this_package() -> None:
    transformer = tiny_cogvideox.make_transformer()
    transformer.set_attn_processor(dcm.concept_attn_processors(transformer))
    before = state(transformer)
    message = (
        "^transformer_blocks.0.attn1.processor is a ConceptCogVideoXAttnProcessor2_0 already; put the model's own"
    )
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.concept_attn_processors(transformer)
    assert state(transformer) == before


def test_the_router_refuses_modules_it_does_not_know(pipe: CogVideoXPipeline) -> None:
    message = "^the stock processor of this Linear is not known to ConceptAttnProcessor; use set_attn_processor"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.ConceptAttnProcessor()(nn.Linear(2, 2), torch.zeros(1, 3, 2))


def test_a_second_capture(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, ["dog"]) as maps:
        message = "^this CogVideoXTransformer3DModel is being traced already; leave the other `with` block first"
        refuse(message, pipe, value=False)
        refuse(message, pipe.transformer, None, concept_embeds=torch.zeros(1, 32), value=False)
        tiny_cogvideox.call(pipe)
    assert maps["dog"].tensor.shape == (1, *tiny_cogvideox.GRID)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": [0, 3]}, r"^step 3 is out of range; this run has 3 steps, 0 to 2"),
        (
            {"concept_embeds": torch.zeros(3, 2, 32)},
            r"^concept_embeds has batch size 3, but 1 videos are generated; expected \[1, concept, 32\] or",
        ),
    ],
)
def test_what_only_the_run_can_tell(pipe: CogVideoXPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(dcm.ConceptMapsValueError, match=message), dcm.trace(pipe, ["dog", "sky"], **options):
        tiny_cogvideox.call(pipe)


def test_attention_outside_of_its_block(pipe: CogVideoXPipeline) -> None:
    attention = pipe.transformer.transformer_blocks[1].attn1

    def call_early(block: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        attention(output[0], encoder_hidden_states=output[1])

    hook = pipe.transformer.transformer_blocks[0].register_forward_hook(call_early)
    message = "^an attention module ran outside of its block"
    with pytest.raises(dcm.ConceptMapsError, match=message), dcm.trace(pipe, ["dog"]):
        tiny_cogvideox.call(pipe)
    hook.remove()


def test_nothing_recorded(pipe: CogVideoXPipeline, tmp_path: Path) -> None:
    message = "^nothing has been recorded for branch 'cond'; run the traced pipeline inside the `with` block$"
    with dcm.trace(pipe, ["dog"]) as maps:
        for read in (maps.get, lambda: maps["dog"], lambda: maps.upsample((8, 8), 9)):
            with pytest.raises(dcm.ConceptMapsError, match=message):
                read()
        with pytest.raises(dcm.ConceptMapsError, match=message):
            maps.save(tmp_path / "maps.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_no_unconditional_branch_without_guidance(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, ["dog"], branch="both") as maps:
        tiny_cogvideox.call(pipe, guidance_scale=1.0)
    assert maps["cond"].get().shape == (1, 1, *tiny_cogvideox.GRID)
    message = "^nothing has been recorded for branch 'uncond'; run the .* inside the `with` block, with guidance$"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        maps["uncond"].get()


def test_what_was_not_captured(pipe: CogVideoXPipeline) -> None:
    with dcm.trace(pipe, ["dog", "sky"], methods=["imap", "gramcol"]) as maps:
        tiny_cogvideox.call(pipe)
    message = "^method 'daam' was not captured; captured were imap, gramcol. Name it in `methods=`"
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        maps.get("daam")
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        maps.concept("dog", "daam")
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        maps.upsample((8, 8), 9, "daam")
    with pytest.raises(dcm.ConceptMapsValueError, match=r"^concept 'cat' was not captured; captured were 'dog', 's"):
        maps["cat"]


def stored_maps() -> ConceptMaps:
    tensors = {"imap": torch.zeros(1, 1, 3, 4, 5), "coverage.imap": torch.ones(1, 1, dtype=torch.bool)}
    return ConceptMaps(StoredMaps(("dog",), tensors), ["imap"])


@pytest.mark.parametrize(("size", "frames"), [((0, 8), 9), ((8, -1), 9), ((8, 8), 0)])
def test_sizes_of_no_pixel(size: tuple[int, int], frames: int) -> None:
    maps = stored_maps()
    message = re.escape(f"size {size} with {frames} frames; expected at least one pixel and one frame")
    with pytest.raises(dcm.ConceptMapsValueError, match=message):
        maps.upsample(size, frames)


def test_head_selection() -> None:
    with pytest.raises(
        dcm.ConceptMapsValueError, match="^unknown head score 'gini'; expected one of calinski_harabasz, "
    ):
        dcm.HeadSelection(score="gini")
    with pytest.raises(dcm.ConceptMapsValueError, match="^top_k is 0; expected at least 1 head"):
        dcm.HeadSelection(top_k=0)


def test_load(tmp_path: Path) -> None:
    def refused(path: Path, message: str) -> None:
        with pytest.raises(dcm.ConceptMapsError, match=message) as caught:
            dcm.load(path)
        assert path.name in str(caught.value)

    whole, other = tmp_path / "whole.safetensors", tmp_path / "other.safetensors"
    stored_maps().save(whole)
    refused(tmp_path / "missing.safetensors", "^cannot read .* as concept maps: ")
    refused(tmp_path, "^cannot read .* as concept maps: ")
    for damaged in (whole.read_bytes()[:-1], whole.read_bytes()[:20], b"", b"no such format"):
        other.write_bytes(damaged)
        refused(other, "^cannot read .* as concept maps: ")
    save_file({"imap": torch.zeros(1)}, other)
    refused(other, "is a safetensors file without concept maps; expected one written by ConceptMaps.save$")
    save_file({"imap": torch.zeros(1)}, other, metadata={"concept_maps": json.dumps({"format": "else/9"})})
    refused(other, "has format 'else/9'; this version reads 'diffusers_concept_maps/1'$")
    header = {
        "format": "diffusers_concept_maps/1",
        "methods": ["imap", "gramcol"],
        "concepts": ["dog"],
        "metadata": {},
    }
    save_file(
        {"imap": torch.zeros(1), "coverage.gramcol": torch.zeros(1)}, other, {"concept_maps": json.dumps(header)}
    )
    refused(other, "lacks the tensors coverage.imap, gramcol that its header names; save the maps anew$")


def test_a_backbone_for_a_class_that_has_one() -> None:
    message = "^CogVideoXTransformer3DModel belongs to CogVideoXBackbone; remove it from CogVideoXBackbone"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        backbones.register(CogVideoXBackbone())


def test_an_attach_that_fails_half_way_is_undone(pipe: CogVideoXPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no more hooks")

    last = pipe.transformer.transformer_blocks[-1]
    monkeypatch.setattr(last, "register_forward_pre_hook", fail)
    with pytest.raises(RuntimeError, match="no more hooks"):
        attach(pipe, ["dog"])
    monkeypatch.undo()


def test_a_pipeline_that_returns_maps_already(pipe: CogVideoXPipeline) -> None:
    mixed = dcm.with_concept_maps(pipe)
    with pytest.raises(
        dcm.ConceptMapsError, match="^this CogVideoXPipeline returns concept maps already; use it as it is"
    ):
        dcm.with_concept_maps(mixed)
    with pytest.raises(dcm.ConceptMapsError, match=f"^UNet2DModel cannot be traced; supported are {SUPPORTED}"):
        dcm.with_concept_maps(unet())


def test_options_without_concepts(pipe: CogVideoXPipeline) -> None:
    message = r"^layers, methods given without concepts; pass concepts=\[...\] as well"
    with pytest.raises(dcm.ConceptMapsError, match=message):
        dcm.with_concept_maps(pipe)("a dog", methods=["imap"], layers=[0])


def test_no_such_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'tracer'"):
        dcm.tracer  # noqa: B018

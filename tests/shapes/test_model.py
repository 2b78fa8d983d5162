"""The embedded pipeline is made of stock classes, its VAE is the identity, and the text length is what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import CogVideoXPipeline

import diffusers_concept_maps as dcm
from diffusers_concept_maps.shapes import model
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, WORDS

FOLDER = Path(model.__file__).with_name("pipeline")
STOCK = {
    "tokenizer": transformers.PreTrainedTokenizerFast,
    "text_encoder": transformers.T5EncoderModel,
    "vae": diffusers.AutoencoderKLCogVideoX,
    "transformer": diffusers.CogVideoXTransformer3DModel,
    "scheduler": diffusers.CogVideoXDDIMScheduler,
}


@pytest.fixture(scope="module")
def pipe() -> CogVideoXPipeline:
    pipe = dcm.load_shapes_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def public_config(part: Any) -> dict[str, Any]:
    """The configuration as a file would hold it, without where it came from."""
    config = {key: value for key, value in part.config.items() if not key.startswith("_")}
    return dict(json.loads(json.dumps(config)))


def test_stock_classes_only(pipe: CogVideoXPipeline) -> None:
    assert type(pipe) is CogVideoXPipeline
    assert {name: getattr(type(part), "__name__", "") for name, part in pipe.components.items()} == {
        name: stock.__name__ for name, stock in STOCK.items()
    }
    built = model.build_pipeline(model.build_transformer(), model.build_text_encoder())
    for loaded in (pipe, built):
        assert all(isinstance(loaded.components[name], stock) for name, stock in STOCK.items())
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert {entry[0] for name, entry in index.items() if not name.startswith("_")} == {"diffusers", "transformers"}


def test_folder_is_small_safe_and_half_precision() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 10_000_000
    half = dcm.load_shapes_pipeline(torch.float16)
    full = dcm.load_shapes_pipeline()
    for name in ("text_encoder", "vae", "transformer"):
        stored, loaded = half.components[name], full.components[name]
        assert (stored.dtype, loaded.dtype) == (torch.float16, torch.float32)
        for key, value in stored.state_dict().items():
            torch.testing.assert_close(value.float(), loaded.state_dict()[key], atol=0, rtol=0)


def test_built_parts_are_those_of_the_folder(pipe: CogVideoXPipeline) -> None:
    built = model.build_pipeline(model.build_transformer(), model.build_text_encoder())
    for name in ("transformer", "vae", "scheduler"):
        assert public_config(built.components[name]) == public_config(pipe.components[name])
    assert built.tokenizer.get_vocab() == pipe.tokenizer.get_vocab()
    for name, parameter in built.vae.state_dict().items():
        torch.testing.assert_close(pipe.vae.state_dict()[name], parameter, atol=0, rtol=1e-3)


@pytest.mark.parametrize("frames", [1, 6, 7])
def test_vae_is_the_identity(frames: int) -> None:
    vae = model.build_identity_vae().eval()
    clip = torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(clip).latent_dist
        decoded = vae.decode(clip).sample
    torch.testing.assert_close(posterior.mode(), clip, atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.sample(torch.Generator().manual_seed(2)), clip, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, clip, atol=1e-4, rtol=0)


def test_shipped_vae_round_trip(pipe: CogVideoXPipeline) -> None:
    clip = torch.rand(1, 3, 6, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
    with torch.no_grad():
        returned = pipe.vae.decode(pipe.vae.encode(clip).latent_dist.mode()).sample
    torch.testing.assert_close(returned, clip, atol=1e-4, rtol=0)


def test_new_transformer_predicts_nothing_and_its_gates_are_open() -> None:
    transformer = model.build_transformer()
    noisy = torch.randn(1, 6, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    text = torch.randn(1, TEXT_LENGTH, model.TEXT_HIDDEN, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        out = transformer(noisy, text, torch.tensor([500])).sample
    assert torch.equal(out, torch.zeros_like(noisy))
    width = model.HIDDEN
    expected = torch.zeros(6, width)
    expected[2] = expected[5] = 1  # shift, scale, gate of the video, then of the text
    for block in transformer.transformer_blocks:
        assert torch.equal(block.norm1.linear.bias.detach().view(6, width), expected)
        assert torch.equal(block.norm2.linear.bias.detach().view(6, width), expected)


def test_tokenizer_knows_its_words_and_ends_every_text(pipe: CogVideoXPipeline) -> None:
    vocabulary = pipe.tokenizer.get_vocab()
    assert set(vocabulary) == {*WORDS, "<pad>", "</s>", "<unk>"}
    assert (pipe.tokenizer.pad_token_id, pipe.tokenizer.eos_token_id) == (0, 1)
    padded = pipe.tokenizer("a red dog", padding="max_length", max_length=6).input_ids
    assert padded == [vocabulary[word] for word in ("a", "red", "<unk>", "</s>", "<pad>", "<pad>")]


def test_call_needs_the_text_length(pipe: CogVideoXPipeline) -> None:
    call = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(6)}
    with pytest.raises(RuntimeError, match="size of tensor a"):
        pipe("a red circle moving right", **call)
    frames = pipe("a red circle moving right", max_sequence_length=TEXT_LENGTH, **call).frames
    assert TEXT_LENGTH == 20
    assert frames.shape == (1, 6, 3, 32, 32)
    assert bool(frames.isfinite().all())
    assert "max_sequence_length=20" in str(model.load_shapes_pipeline.__doc__)

"""A Hugging Face cache with random stand-ins for what diffusers' pipeline tests load from the hub.

The published ones are tiny as well, but need a network. Token ids and weights differ from theirs, so that tests which
expect the numbers of one machine fail with these, with a capture or without.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

_REVISION = "0" * 40
_SPACE = "▁"


def write_tiny_hub(home: Path) -> None:
    """Write the cache below a folder that `HF_HOME` is to name; with `HF_HUB_OFFLINE=1` all is found there."""
    t5 = _repository(home, "hf-internal-testing/tiny-random-t5")
    _t5_encoder().save_pretrained(t5)
    _t5_tokenizer().save_pretrained(t5)
    _save_clip_tokenizer(_repository(home, "hf-internal-testing/tiny-random-clip"))
    _llama_tokenizer().save_pretrained(_repository(home, "finetrainers/dummy-hunyaunvideo") / "tokenizer")
    siglip = _repository(home, "hf-internal-testing/tiny-random-SiglipVisionModel")
    _siglip_encoder().save_pretrained(siglip)
    SiglipImageProcessor(size={"height": 30, "width": 30}).save_pretrained(siglip)


def _repository(home: Path, name: str) -> Path:
    """An empty repository in the layout of the hub's cache."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / _REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(_REVISION)
    return snapshot


def _t5_encoder() -> T5EncoderModel:
    """Of the widths of the published one, on which the tests' transformers rely."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4, relative_attention_num_buckets=8,
        pad_token_id=0, eos_token_id=1, is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config)


def _siglip_encoder() -> SiglipVisionModel:
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=30, patch_size=2
    )
    return SiglipVisionModel(config)


def _characters(special: list[str]) -> Tokenizer:
    """One token per character, spaces included, behind special tokens of which one is called `<unk>`."""
    pieces = [(token, 0.0) for token in special] + [(_SPACE, -2.0)]
    pieces += [(chr(code), -9.0) for code in range(ord("!"), ord("~") + 1)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=_SPACE)
    tokenizer.decoder = decoders.Metaspace(replacement=_SPACE)
    return tokenizer


def _t5_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = _characters(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _llama_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=_characters(["<unk>", "<s>", "</s>", "<pad>"]),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512,
    )  # fmt: skip


def _save_clip_tokenizer(folder: Path) -> None:
    """Byte-level, without merges; as `tokenizer.json` and as the two files of the older format."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), start, end]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], end_of_word_suffix="</w>", unk_token=end))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(token, vocabulary[token]) for token in (start, end)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=start, eos_token=end, unk_token=end, pad_token=end, model_max_length=77,
    ).save_pretrained(folder)  # fmt: skip
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")

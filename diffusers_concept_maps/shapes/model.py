"""The embedded model's parts, all of stock classes: built here, trained by `train.py`, shipped as a pipeline folder.

The VAE needs no training: its weights are set by hand so that the stock `AutoencoderKLCogVideoX` is the identity on
RGB clips. One latent frame is one real frame and the transformer's own patch size does the patching, so masks line
up with tokens exactly.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from diffusers_concept_maps.errors import ConceptMapsError
from diffusers_concept_maps.shapes.captions import TEXT_LENGTH, WORDS
from diffusers_concept_maps.shapes.scenes import FRAMES, HEIGHT, WIDTH

HIDDEN, HEADS, LAYERS, PATCH, TEXT_HIDDEN = 128, 4, 5, 4, 64

STEPS, GUIDANCE_SCALE = 20, 4.0
"""Denoising steps, and the guidance scale that does best on noise of the development seed (docs/shapes_model.md)."""

_SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `WORDS` that ends every text with `</s>`, as T5's does."""
    vocabulary = {word: i for i, word in enumerate((*_SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def build_text_encoder() -> T5EncoderModel:
    """A two-layer T5 encoder, trained together with the transformer."""
    config = T5Config(
        vocab_size=len(_SPECIAL) + len(WORDS),
        d_model=TEXT_HIDDEN,
        d_kv=16,
        d_ff=2 * TEXT_HIDDEN,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_max_distance=32,
        pad_token_id=0,
        eos_token_id=1,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def build_transformer() -> CogVideoXTransformer3DModel:
    """A CogVideoX transformer of 1.5 M parameters with sin-cos positions, every block near the identity at first."""
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HIDDEN // HEADS,
        in_channels=3,
        out_channels=3,
        time_embed_dim=64,
        text_embed_dim=TEXT_HIDDEN,
        num_layers=LAYERS,
        sample_width=WIDTH,
        sample_height=HEIGHT,
        sample_frames=FRAMES,
        patch_size=PATCH,
        temporal_compression_ratio=1,
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.0,
        temporal_interpolation_scale=1.0,
        use_rotary_positional_embeddings=False,
    )
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
            with torch.no_grad():  # the gates of both streams start open
                norm.linear.bias[2 * HIDDEN : 3 * HIDDEN] = 1.0
                norm.linear.bias[5 * HIDDEN :] = 1.0
        for linear in (block.attn1.to_out[0], block.ff.net[2]):
            with torch.no_grad():
                linear.weight.mul_((2 * LAYERS) ** -0.5)
            nn.init.zeros_(linear.bias)
    nn.init.zeros_(transformer.proj_out.weight)
    nn.init.zeros_(transformer.proj_out.bias)
    return transformer


def build_scheduler() -> CogVideoXDDIMScheduler:
    """The scheduler of CogVideoX-2B: v-prediction, zero terminal SNR, SNR shift 3, trailing time steps."""
    return CogVideoXDDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.0120,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


@torch.no_grad()
def build_identity_vae() -> AutoencoderKLCogVideoX:
    """A stock CogVideoX VAE whose hand-set weights encode and decode RGB clips unchanged (to 1e-5).

    The activation before both last convolutions is undone by `silu(x) - silu(-x) == x`: colours go in with both signs.
    The encoder's group norm is undone by two constant channels, large enough to fix its statistics.
    """
    channels, constant = 8, 256.0
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",),
        up_block_types=("CogVideoXUpBlock3D",),
        block_out_channels=(channels,),
        latent_channels=3,
        layers_per_block=1,
        norm_num_groups=1,
        temporal_compression_ratio=1,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        scaling_factor=1.0,
        norm_eps=1e-6,
    )
    for parameter in vae.parameters():
        parameter.zero_()
    encoder, decoder = vae.encoder, vae.decoder
    _pass_both_signs(encoder.conv_in.conv.weight)
    encoder.conv_in.conv.bias[6], encoder.conv_in.conv.bias[7] = constant, -constant
    encoder.norm_out.weight.fill_((2 * constant * constant / channels) ** 0.5)
    _join_both_signs(encoder.conv_out.conv.weight)
    encoder.conv_out.conv.bias[3:] = -30.0  # log-variance: the posterior is its mean
    _pass_both_signs(decoder.norm_out.conv_b.conv.weight)
    _join_both_signs(decoder.conv_out.conv.weight)
    return vae


def _pass_both_signs(weight: torch.Tensor) -> None:
    """Make a causal 3-D convolution copy channel i to i and its negative to 3 + i."""
    height, width = weight.shape[3] // 2, weight.shape[4] // 2
    for i in range(3):
        weight[i, i, -1, height, width] = 1
        weight[3 + i, i, -1, height, width] = -1


def _join_both_signs(weight: torch.Tensor) -> None:
    """Make a causal 3-D convolution subtract channel 3 + i from channel i."""
    height, width = weight.shape[3] // 2, weight.shape[4] // 2
    for i in range(3):
        weight[i, i, -1, height, width] = 1
        weight[i, 3 + i, -1, height, width] = -1


def build_pipeline(transformer: CogVideoXTransformer3DModel, text_encoder: T5EncoderModel) -> CogVideoXPipeline:
    """The stock text-to-video pipeline around a transformer and a text encoder of this file."""
    return CogVideoXPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=build_identity_vae().eval(),
        transformer=transformer.eval(),
        scheduler=build_scheduler(),
    )


def load_shapes_pipeline(dtype: torch.dtype = torch.float32, *, folder: Path | None = None) -> CogVideoXPipeline:
    """The embedded model: a stock pipeline that makes 6 frames of 32 x 32 pixels of coloured shapes that move.

    Its sin-cos position table fixes the text length, so every call needs `max_sequence_length=20`
    (`diffusers_concept_maps.shapes.captions.TEXT_LENGTH`); the words it knows are `shapes.captions.WORDS`.

    Args:
        dtype: of the weights, which are stored in float16.
        folder: another pipeline of the same parts, such as `train.py` writes; None is the one of the package.

    Returns:
        A `CogVideoXPipeline` on the CPU, loaded with `from_pretrained`.

    Raises:
        ConceptMapsError: there is no pipeline in the folder.

    Example:
        >>> pipe = dcm.load_shapes_pipeline()
        >>> pipe("a red circle moving right", max_sequence_length=20).frames[0]
    """
    folder = folder or Path(__file__).with_name("pipeline")
    if not (folder / "model_index.json").is_file():
        raise ConceptMapsError(f"there is no model_index.json in {str(folder)!r}; expected the folder of a pipeline")
    return CogVideoXPipeline.from_pretrained(folder, dtype=dtype)

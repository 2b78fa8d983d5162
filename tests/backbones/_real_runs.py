"""Tiny stock pipelines into which clips are put: those of the cases, and the others of their families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import diffusers
import torch
from backbones import (
    test_chroma,
    test_cosmos,
    test_flux,
    test_flux2,
    test_hunyuan_video,
    test_kandinsky5,
    test_ltx,
    test_ltx2,
    test_sana_video,
    test_wan,
    tiny_cogvideox,
    tiny_cogvideox_variants,
    tiny_framepack,
    tiny_hunyuan_video15,
    tiny_kandinsky5,
    tiny_qwenimage,
    tiny_sd3,
    tiny_skyreels_v2,
    tiny_wan,
)
from backbones._case import Case, find_cases, randomize
from diffusers.pipelines.ltx2 import LTX2ConditionPipeline, LTX2ImageToVideoPipeline

from diffusers_concept_maps.backbones import find_backbone
from diffusers_concept_maps.backbones._real import transformer_of


@dataclass(frozen=True)
class RealCase:
    """A pipeline, and what else it is called with.

    Attributes:
        name: of the case in test reports.
        pipeline: a tiny stock pipeline.
        call: what it cannot do without, or what keeps it tiny.
        given: latent frames at the start of the grid that are an image which the pipeline was given.
        decodes: everything that is decoded was noise, and the pipeline undoes the scale wholly (SD3 inpainting adds
            no shift).
    """

    name: str
    pipeline: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    given: int = 0
    decodes: bool = True

    def __str__(self) -> str:
        return self.name


SHORT = {"max_sequence_length": 12}


def of_case(case: Case) -> RealCase:
    assert case.pipeline is not None
    return RealCase(case.name, cache(case.pipeline), dict(case.real_call))


def cosmos(case: Case) -> RealCase:
    assert case.pipeline is not None
    starts = "image to world" in case.name
    return RealCase(f"Cosmos {case.name}", case.pipeline, SHORT, given=int(starts), decodes=not starts)


def cogvideox(cls: Any, config: dict[str, Any]) -> Any:
    variant = tiny_cogvideox_variants.Variant(cls, lambda n: {}, config)
    return tiny_cogvideox_variants.make_pipeline(variant)


FLUX = ("FluxImg2ImgPipeline", "FluxInpaintPipeline", "FluxKontextPipeline")


def kandinsky_image() -> Any:
    transformer = tiny_kandinsky5.make_transformer(visual_cond=True)
    return test_kandinsky5.prepared(
        diffusers.Kandinsky5I2VPipeline(**test_kandinsky5.components(transformer=transformer))
    )


def kandinsky_still() -> Any:
    pipe = test_kandinsky5.prepared(
        test_kandinsky5.Kandinsky5T2IPipeline(
            **test_kandinsky5.components(
                transformer=tiny_kandinsky5.make_transformer(), vae=test_kandinsky5.make_image_vae()
            )
        )
    )
    pipe.resolutions = [(80, 48)]
    return pipe


def kandinsky_still_from_image() -> Any:
    transformer, vae = tiny_kandinsky5.make_transformer(visual_cond=True), test_kandinsky5.make_image_vae()
    pipe = test_kandinsky5.prepared(
        test_kandinsky5.Kandinsky5I2IPipeline(**test_kandinsky5.components(transformer=transformer, vae=vae))
    )
    pipe.resolutions = [(80, 48)]
    return pipe


def skyreels_image() -> Any:
    transformer = tiny_skyreels_v2.make_transformer(image_dim=16, added_kv_proj_dim=48, in_channels=36)
    parts = tiny_wan.components(transformer=transformer, **test_wan.image_parts())
    return tiny_wan.silent(diffusers.SkyReelsV2ImageToVideoPipeline(**parts))


def sd3_image(cls: Any = diffusers.StableDiffusion3Img2ImgPipeline, **options: Any) -> Any:
    return tiny_wan.silent(cls(**tiny_sd3.make_pipeline(**options).components))


def sd3_control() -> Any:
    parts = tiny_sd3.make_pipeline().components
    control = diffusers.SD3ControlNetModel.from_transformer(
        parts["transformer"], num_layers=2, num_extra_conditioning_channels=0
    ).eval()
    return tiny_wan.silent(diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=control))


def qwen_image(cls: Any = diffusers.QwenImageImg2ImgPipeline, **parts: Any) -> Any:
    return tiny_qwenimage.set_up(cls(**tiny_qwenimage.make_components(), **parts))


def qwen_control() -> Any:
    config = {name: value for name, value in tiny_qwenimage.SETTINGS.items() if name != "num_layers"}
    control = randomize(diffusers.QwenImageControlNetModel(**config, num_layers=2))
    return qwen_image(diffusers.QwenImageControlNetPipeline, controlnet=control)


LEARNED = tiny_cogvideox_variants.LEARNED
VARIANTS = [
    RealCase("CogVideoX 1.5", partial(tiny_cogvideox.make_pipeline, patch_size_t=2)),
    RealCase("CogVideoX sin-cos", partial(tiny_cogvideox.make_pipeline, rope=False)),
    RealCase("CogVideoX image", partial(cogvideox, diffusers.CogVideoXImageToVideoPipeline, LEARNED)),
    RealCase("CogVideoX video", partial(cogvideox, diffusers.CogVideoXVideoToVideoPipeline, {})),
    RealCase(
        "CogVideoX control",
        partial(cogvideox, diffusers.CogVideoXFunControlPipeline, {"in_channels": 8}),
        {"control_video": tiny_cogvideox_variants.pictures(9)},
    ),
    RealCase(
        "ConsisID",
        partial(cogvideox, tiny_cogvideox_variants.ConsisIDPipeline, LEARNED),
        {name: value for name, value in tiny_cogvideox_variants.face(1).items() if name.startswith("id_")},
    ),
    RealCase(
        "CogVideoX 1.5 image",
        partial(cogvideox, diffusers.CogVideoXImageToVideoPipeline, {"in_channels": 8, "patch_size_t": 2}),
    ),
    RealCase(
        "Wan 2.2 image",
        lambda: tiny_wan.silent(
            diffusers.WanImageToVideoPipeline(
                **tiny_wan.components(transformer=tiny_wan.make_transformer(in_channels=36))
            )
        ),
        SHORT,
    ),
    RealCase("SkyReels image", skyreels_image, {"max_sequence_length": 512}),
    RealCase("FramePack", tiny_framepack.make_pipeline, {"max_sequence_length": 8}),
    RealCase("HunyuanVideo 1.5 image", tiny_hunyuan_video15.make_image_pipeline),
    RealCase("Kandinsky image to image", kandinsky_still_from_image, SHORT),
    RealCase(
        "Cosmos 2.5 video",
        test_cosmos.cosmos25,
        {"max_sequence_length": 48, "video": test_cosmos.VIDEO},
        given=2,
        decodes=False,
    ),
    RealCase("Cosmos transfer", test_cosmos.transfer, {"max_sequence_length": 48, "controls": test_cosmos.VIDEO}),
    RealCase(
        "FLUX.1 control net",
        partial(test_flux.pipeline, "FluxControlNetPipeline", controlled=True),
        SHORT | {"control_image": test_flux.IMAGE.mT},
    ),
    RealCase("SD3 control net", sd3_control, SHORT | {"control_image": test_wan.picture()}),
    RealCase("Qwen-Image control net", qwen_control, {"control_image": test_wan.picture()}),
    RealCase(
        "SD3 inpainting",
        partial(sd3_image, diffusers.StableDiffusion3InpaintPipeline, channels=16),
        SHORT,
        decodes=False,
    ),
    RealCase("Chroma inpainting", partial(test_chroma.pipeline, "ChromaInpaintPipeline"), SHORT),
    RealCase("FLUX.2 klein inpainting", partial(test_flux2.klein, "Flux2KleinInpaintPipeline"), SHORT),
    RealCase("Qwen-Image inpainting", partial(qwen_image, diffusers.QwenImageInpaintPipeline)),
    RealCase("LTX-2 conditions", partial(test_ltx2.pipeline, LTX2ConditionPipeline), SHORT),
    RealCase("Wan image", test_wan.image_to_video, {"max_sequence_length": 512}),
    RealCase(
        "Wan 5B image",
        lambda: tiny_wan.silent(
            diffusers.WanImageToVideoPipeline(
                expand_timesteps=True, **tiny_wan.components(transformer=tiny_wan.make_transformer())
            )
        ),
        SHORT,
        given=1,
        decodes=False,
    ),
    RealCase(
        "Wan video",
        lambda: tiny_wan.silent(test_wan.VideoToVideo(**tiny_wan.components(transformer=tiny_wan.make_transformer()))),
        SHORT,
    ),
    RealCase("VACE", test_wan.vace, SHORT),
    RealCase("VACE with references", test_wan.vace, SHORT | {"reference_images": [test_wan.picture()]}),
    RealCase(
        "SkyReels forcing image",
        lambda: tiny_wan.silent(
            diffusers.SkyReelsV2DiffusionForcingImageToVideoPipeline(
                **tiny_wan.components(transformer=tiny_skyreels_v2.make_transformer())
            )
        ),
        SHORT,
        given=1,
        decodes=False,
    ),
    RealCase(
        "HunyuanVideo image, channels",
        partial(test_hunyuan_video.image_to_video, "latent_concat"),
        test_hunyuan_video.prompt_embeds(),
    ),
    RealCase(
        "HunyuanVideo image, token",
        partial(test_hunyuan_video.image_to_video, "token_replace"),
        test_hunyuan_video.prompt_embeds(),
        given=1,
        decodes=False,
    ),
    RealCase("HunyuanVideo SkyReels", test_hunyuan_video.skyreels, test_hunyuan_video.prompt_embeds()),
    RealCase("LTX image", partial(test_ltx.pipeline, test_ltx.LTXImageToVideoPipeline), SHORT, given=1, decodes=False),
    RealCase("LTX conditions", partial(test_ltx.pipeline, test_ltx.LTXConditionPipeline), SHORT),
    RealCase(
        "LTX later condition",
        partial(test_ltx.pipeline, test_ltx.LTXConditionPipeline),
        SHORT | {"conditions": [test_ltx.condition(8)]},
        decodes=False,
    ),
    RealCase(
        "LTX-2 image",
        partial(test_ltx2.pipeline, LTX2ImageToVideoPipeline),
        SHORT | {"image_crf": 0},
        given=1,
        decodes=False,
    ),
    RealCase("Sana image", test_sana_video.image_pipeline, SHORT, given=1, decodes=False),
    RealCase("Kandinsky image", kandinsky_image, SHORT, given=1, decodes=False),
    RealCase("Kandinsky text to image", kandinsky_still, SHORT),
    *(cosmos(case) for case in test_cosmos.VARIANTS),
    *(RealCase(name, partial(test_flux.pipeline, name), SHORT) for name in FLUX),
    RealCase("FLUX.1 fill", partial(test_flux.pipeline, "FluxFillPipeline", channels=48), SHORT),
    RealCase(
        "FLUX.1 control",
        partial(test_flux.pipeline, "FluxControlPipeline", channels=32),
        SHORT | {"control_image": test_flux.IMAGE},
    ),
    RealCase(
        "FLUX.1 Kontext with a reference",
        partial(test_flux.pipeline, "FluxKontextPipeline"),
        SHORT | {"image": test_flux.IMAGE, "_auto_resize": False},
    ),
    RealCase("FLUX.2 klein with a reference", test_flux2.klein, SHORT | {"image": test_flux2.REFERENCE}),
    RealCase(
        "FLUX.2 klein that keeps references",
        partial(test_flux2.klein, "Flux2KleinKVPipeline"),
        SHORT | {"image": test_flux2.REFERENCE},
    ),
    RealCase("Chroma image", partial(test_chroma.pipeline, "ChromaImg2ImgPipeline"), SHORT),
    RealCase("SD3 image", sd3_image, SHORT),
    RealCase("Qwen-Image image", qwen_image),
]
"""Other pipelines than those of the cases."""


def real_cases() -> list[RealCase]:
    """All of them."""
    return [*(of_case(case) for case in find_cases() if case.pipeline), *VARIANTS]


def clip_for(pipe: Any) -> torch.Tensor:
    """Noise `[frame, 3, height, width]` of three by five tokens, in steps of 1/255 as files have."""
    shape = find_backbone(transformer_of(pipe)).clip_shape(pipe)
    block = int(getattr(transformer_of(pipe).config, "num_frame_per_block", 1))  # latent frames come in blocks
    frames = (2 + (block > 1)) * shape.frame_step + 1 if shape.frames > 1 else 1
    multiple = 2 * shape.multiple if isinstance(pipe, diffusers.StableDiffusion3ControlNetPipeline) else shape.multiple
    size = (frames, 3, 3 * multiple, 5 * multiple)
    return torch.randint(0, 256, size, generator=torch.Generator().manual_seed(3)) / 255


def disturb(pipe: Any) -> None:
    """Means, deviations and factors of the VAE that are not those that change nothing."""
    _disturb_means(pipe.vae)
    _disturb_factors(pipe)
    if isinstance(getattr(pipe, "latents_mean", None), torch.Tensor):  # Cosmos 2.5 has copied them
        std = torch.tensor(pipe.vae.config.latents_std).view_as(pipe.latents_std)
        pipe.latents_mean = torch.tensor(pipe.vae.config.latents_mean).view_as(pipe.latents_mean)
        pipe.latents_std = std if isinstance(pipe, diffusers.Cosmos2_5_TransferPipeline) else 1 / std


def _disturb_means(vae: Any) -> None:
    if isinstance(vae, diffusers.AutoencoderKLCosmos):  # of every latent frame
        frames = 17 * vae.config.latent_channels
        vae.register_to_config(latents_mean=[0.0] * frames, latents_std=[1.0] * frames)
    for name, low, high in (("latents_mean", -0.5, 0.5), ("latents_std", 0.5, 2.0)):
        known = getattr(vae.config, name, None)
        if known is not None:
            vae.register_to_config(**{name: torch.linspace(low, high, len(known)).tolist()})
        buffer = dict(vae.named_buffers(recurse=False)).get(name)
        if buffer is not None:
            buffer.copy_(torch.linspace(low, high, buffer.numel()))
    if hasattr(vae, "bn"):
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, vae.bn.running_mean.numel()))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, vae.bn.running_var.numel()))


def _disturb_factors(pipe: Any) -> None:
    vae = pipe.vae
    if getattr(vae.config, "scaling_factor", None) is not None:
        vae.register_to_config(scaling_factor=0.7)
        for name in ("vae_scaling_factor", "vae_scaling_factor_image"):  # some have copied it
            if hasattr(pipe, name):
                setattr(pipe, name, 0.7)
    if getattr(vae.config, "shift_factor", None) is not None:
        vae.register_to_config(shift_factor=0.1)

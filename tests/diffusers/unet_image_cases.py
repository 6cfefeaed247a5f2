# SPDX-License-Identifier: Apache-2.0
"""A table of UNets and their image tasks."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.diffusers.small_pipelines import tiny_pipeline
from tests.diffusers.unet_cases import (
    CHANNELS,
    POOLED,
    Case,
    adapter,
    adapter_xl,
    built_of,
    changed,
    controlnet,
    controlnet_union,
    controls,
    depth,
    image,
    image_embeds,
    image_masks,
    ip_adapter,
    low_rank,
    mask,
    scheduler,
    two_image_embeds,
    unet,
    unet_xl,
    with_options,
)


def _text_encoders(model: Any) -> dict[str, Any]:
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {name: tiny_pipeline().components[name] for name in names}


def _prompts(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
    prompts = ["a red fox", "two boats at dusk"][:samples]
    return {"prompt": prompts, "height": case.pixels[0], "width": case.pixels[1], "clip_skip": 1}


def _pooled(pipe: Any) -> None:
    """Work around diffusers' image-to-image pipeline, which ignores the pooled embeddings that it gets."""

    def encode_prompt(prompt_embeds: Any, negative_prompt_embeds: Any, **options: Any) -> tuple[Any, ...]:
        pooled = torch.randn(2, len(prompt_embeds), POOLED, generator=torch.Generator().manual_seed(2))
        return prompt_embeds, negative_prompt_embeds, *pooled

    pipe.encode_prompt = encode_prompt


def _freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


_SD, _XL = "StableDiffusion", "StableDiffusionXL"
_IMAGE = {"image": image, "strength": 0.7, "num_inference_steps": 3}
_INPAINT = {"image": image, "mask_image": mask, "strength": 0.9, "num_inference_steps": 3}
_UP = {"layers": "up", "modules": ("up_blocks.*",)}
_EVERY = {"layers": ["down", "mid", "up"], "modules": ("*",)}
_FIRST = {"layers": "d0", "modules": ("down_blocks.0.attentions.0.transformer_blocks.0.*",)}
_V = {"prediction_type": "v_prediction"}
_PLAIN = with_options()
_FEW = {"scales": (None, 1.0)}
_BY_TEXT = {"scales": (5.0, None)}  # without classifier-free guidance, no effect could be measured


def _sd2(**options: Any) -> Any:
    return unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True, **options)


def _refiner() -> Any:
    """Return a refiner: no attention at the innermost level except in the middle; five size numbers, not six."""
    return unet_xl(
        ids=5,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        transformer_layers_per_block=2,
    )


def _ssd() -> Any:
    """Return SSD-1B: transformers of different depths in the up part, and none in the middle."""
    return unet_xl(
        layers_per_block=2,
        transformer_layers_per_block=[1, [2, 1]],
        reverse_transformer_layers_per_block=[[1, 2, 1], 1],
        mid_block_type="UNetMidBlock2D",
    )


IMAGES = {
    "sd1": Case(f"{_SD}Pipeline", built_of(unet), _PLAIN, **_EVERY),
    "sd1-odd-sizes": Case(
        f"{_SD}Pipeline", built_of(unet, block_out_channels=(8, 8, 16, 16)), _PLAIN, **_EVERY, size=(12, 20)
    ),
    "sd1-images-per-prompt": Case(
        f"{_SD}Pipeline", built_of(unet), with_options(num_images_per_prompt=2), **_FIRST, **_BY_TEXT
    ),
    "sd1-freeu": Case(f"{_SD}Pipeline", changed(built_of(unet), _freeu), _PLAIN, **_UP),
    "sd1-lora-layers": Case(f"{_SD}Pipeline", changed(built_of(unet), low_rank), _PLAIN, **_EVERY),
    "sd1-image": Case(f"{_SD}Img2ImgPipeline", built_of(unet), with_options(**_IMAGE), **_FIRST),
    "sd1-inpaint-4": Case(f"{_SD}InpaintPipeline", built_of(unet), with_options(**_INPAINT), **_BY_TEXT),
    "sd1-inpaint-9": Case(f"{_SD}InpaintPipeline", built_of(unet, in_channels=9), with_options(**_INPAINT), **_UP),
    "sd1-lcm": Case(
        "LatentConsistencyModelPipeline",
        built_of(unet, lambda: scheduler("LCMScheduler"), time_cond_proj_dim=8),
        with_options(guidance_scale=8.5),
        **_FEW,
    ),
    "sd1-lcm-image": Case(
        "LatentConsistencyModelImg2ImgPipeline",
        built_of(unet, lambda: scheduler("LCMScheduler"), time_cond_proj_dim=8),
        with_options(image=image, strength=0.8, num_inference_steps=3, original_inference_steps=50),
        **_FEW,
        **_UP,
    ),
    "sd1-lcm-lora": Case(f"{_SD}Pipeline", built_of(unet, lambda: scheduler("LCMScheduler")), _PLAIN),
    "sd2": Case(f"{_SD}Pipeline", built_of(_sd2, lambda: scheduler(**_V)), _PLAIN, **_EVERY),
    "sd2-depth": Case(
        f"{_SD}Depth2ImgPipeline",
        built_of(_sd2, in_channels=5),
        with_options(**_IMAGE, depth_map=depth),
        **_UP,
        **_BY_TEXT,
    ),
    "sd2-upscale": Case(
        f"{_SD}UpscalePipeline",
        built_of(
            _sd2,
            lambda: scheduler(**_V),
            lambda _: {"low_res_scheduler": diffusers.DDPMScheduler()},
            in_channels=7,
            num_class_embeds=1000,
        ),
        with_options(image=lambda case, samples, cfg: image(case, samples, cfg, case.size), noise_level=20),
        **_BY_TEXT,
    ),
    "sdxl": Case(f"{_XL}Pipeline", built_of(unet_xl), _PLAIN, **_EVERY),
    "sdxl-clip-skip": Case(
        f"{_XL}Pipeline",
        built_of(unet_xl, parts=_text_encoders, cross_attention_dim=64, projection_class_embeddings_input_dim=32 + 24),
        _prompts,
        **_BY_TEXT,
    ),
    "sdxl-turbo": Case(
        f"{_XL}Pipeline",
        built_of(unet_xl, lambda: scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")),
        _PLAIN,
        steps=1,
        scales=(None, 0.0),
    ),
    "sdxl-lcm": Case(
        f"{_XL}Pipeline",
        built_of(unet_xl, lambda: scheduler("LCMScheduler"), time_cond_proj_dim=8),
        with_options(guidance_scale=8.0),
        **_FEW,
        **_UP,
    ),
    "sdxl-image": Case(f"{_XL}Img2ImgPipeline", built_of(unet_xl), with_options(**_IMAGE), **_UP),
    "sdxl-inpaint-9": Case(
        f"{_XL}InpaintPipeline", built_of(unet_xl, in_channels=9), with_options(**_INPAINT), **_BY_TEXT
    ),
    "sdxl-refiner": Case(
        f"{_XL}Img2ImgPipeline",
        built_of(_refiner, parts=lambda _: {"requires_aesthetics_score": True}),
        with_options(**_IMAGE, aesthetic_score=6.0),
        size=(16, 24),
        **_EVERY,
    ),
    "kolors": Case(
        "KolorsPipeline",
        built_of(
            unet_xl,
            lambda: scheduler("EulerDiscreteScheduler"),
            encoder_hid_dim_type="text_proj",
            encoder_hid_dim=CHANNELS,
        ),
        _PLAIN,
        **_UP,
    ),
    "kolors-image": Case(
        "KolorsImg2ImgPipeline", changed(built_of(unet_xl), _pooled), with_options(**_IMAGE), **_BY_TEXT
    ),
    "ssd-1b": Case(f"{_XL}Pipeline", built_of(_ssd), _PLAIN, **_UP),
    "bk-sdm-tiny": Case(f"{_SD}Pipeline", built_of(unet, mid_block_type=None), _PLAIN, **_FIRST),
    "sd1-controlnet": Case(
        f"{_SD}ControlNetPipeline", built_of(unet, parts=controlnet), with_options(image=image), **_FIRST
    ),
    "sd1-controlnet-guess": Case(
        f"{_SD}ControlNetPipeline", built_of(unet, parts=controlnet), with_options(image=image, guess_mode=True)
    ),
    "sd1-controlnets": Case(
        f"{_SD}ControlNetPipeline",
        built_of(unet, parts=lambda model: controlnet(model, 2)),
        with_options(image=controls, controlnet_conditioning_scale=[1.0, 0.5], control_guidance_end=[0.5, 1.0]),
        **_UP,
    ),
    "sd1-controlnet-image": Case(
        f"{_SD}ControlNetImg2ImgPipeline",
        built_of(unet, parts=controlnet),
        with_options(**_IMAGE, control_image=image),
        **_FIRST,
        **_BY_TEXT,
    ),
    "sd1-controlnet-inpaint": Case(
        f"{_SD}ControlNetInpaintPipeline",
        built_of(unet, parts=controlnet, in_channels=9),
        with_options(**_INPAINT, control_image=image),
        **_BY_TEXT,
    ),
    "sdxl-controlnet": Case(f"{_XL}ControlNetPipeline", built_of(unet_xl, parts=controlnet), with_options(image=image)),
    "sdxl-controlnet-guess": Case(
        f"{_XL}ControlNetPipeline",
        built_of(unet_xl, parts=controlnet),
        with_options(image=image, guess_mode=True),
        **_UP,
    ),
    "sdxl-controlnet-image": Case(
        f"{_XL}ControlNetImg2ImgPipeline",
        built_of(unet_xl, parts=controlnet),
        with_options(**_IMAGE, control_image=image),
        **_UP,
        **_BY_TEXT,
    ),
    "sdxl-controlnet-union": Case(
        f"{_XL}ControlNetUnionPipeline",
        built_of(unet_xl, parts=controlnet_union),
        with_options(control_image=controls, control_mode=[0, 3]),
        **_EVERY,
    ),
    "sdxl-controlnet-union-guess": Case(
        f"{_XL}ControlNetUnionPipeline",
        built_of(unet_xl, parts=controlnet_union),
        with_options(control_image=controls, control_mode=[1, 2], guess_mode=True),
        scales=(None, 1.0),  # diffusers' pipeline itself fails with classifier-free guidance
    ),
    "sd1-adapter": Case(f"{_SD}AdapterPipeline", built_of(unet, parts=adapter), with_options(image=image), **_EVERY),
    "sd1-adapters": Case(
        f"{_SD}AdapterPipeline",
        built_of(unet, parts=lambda model: adapter(model, 2)),
        with_options(image=controls, adapter_conditioning_scale=[0.8, 0.5]),
    ),
    "sdxl-adapter": Case(
        f"{_XL}AdapterPipeline",
        built_of(
            unet_xl,
            parts=adapter_xl,
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            transformer_layers_per_block=(1, 1, 2),
        ),
        with_options(image=image, adapter_conditioning_factor=0.5),
        **_UP,
    ),
    "sd1-ip-adapter": Case(
        f"{_SD}Pipeline", changed(built_of(unet), ip_adapter), with_options(ip_adapter_image_embeds=image_embeds), **_UP
    ),
    "sdxl-ip-adapter-masks": Case(
        f"{_XL}Pipeline",
        changed(built_of(unet_xl), ip_adapter),
        with_options(ip_adapter_image_embeds=two_image_embeds, cross_attention_kwargs=image_masks),
        **_EVERY,
    ),
}

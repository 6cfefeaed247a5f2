# SPDX-License-Identifier: Apache-2.0
"""A table of AnimateDiff tasks: UNets with motion modules, whose batch has every frame."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from diffusers import MotionAdapter, SparseControlNetModel, UNetMotionModel

from tests.diffusers.small_pipelines import tiny_pipeline
from tests.diffusers.unet_cases import (
    CHANNELS,
    Case,
    built_of,
    changed,
    controlnet,
    image,
    image_embeds,
    ip_adapter,
    seen,
    unet,
    unet_xl,
    with_options,
)

FRAMES = 3


def motion_adapter(plain: Any, mid: bool = True) -> MotionAdapter:
    """Return a motion adapter for a UNet; the first versions have no motion modules in the middle."""
    return MotionAdapter(
        block_out_channels=plain.config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=8,
        motion_num_attention_heads=2,
        use_motion_mid_block=mid,
    )


def motion(make: Callable[..., Any] = unet, mid: bool = True, **options: Any) -> UNetMotionModel:
    """Return the model that a pipeline creates from a UNet and a motion adapter."""
    plain = make(**options)
    logger = logging.getLogger("diffusers.models.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it logs that no modules have to stay in float32
    try:
        return UNetMotionModel.from_unet2d(plain, motion_adapter(plain, mid)).eval().requires_grad_(False)
    finally:
        logger.setLevel(level)


def frames(case: Case, samples: int, cfg: bool) -> list[torch.Tensor]:
    """Return one video."""
    return list(image(case, case.frames, cfg))


def video(case: Case, samples: int, cfg: bool) -> torch.Tensor:
    """Return one video per sample, ``[samples, frames, channels, height, width]``."""
    return image(case, samples * case.frames, cfg).unflatten(0, (samples, -1))


def _with_text(model: Any) -> dict[str, Any]:
    """FreeNoise encodes prompts itself, and reads the adapter."""
    components = tiny_pipeline().components
    return {
        "motion_adapter": motion_adapter(model),
        **{name: components[name] for name in ("text_encoder", "tokenizer")},
    }


def _sparse_control(model: Any) -> dict[str, Any]:
    """Control of some frames, with its own motion modules."""
    net = SparseControlNetModel(
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        block_out_channels=model.config.block_out_channels,
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=CHANNELS,
        attention_head_dim=2,
        motion_num_attention_heads=2,
        conditioning_channels=3,
        conditioning_embedding_out_channels=(8, 8),
        use_simplified_condition_embedding=False,  # otherwise the pipeline draws random numbers without its generator
    )
    return {"controlnet": seen(net)}


def _free_noise(pipe: Any) -> None:
    pipe.enable_free_noise(context_length=2, context_stride=1)


def _prompts(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
    negative = {"negative_prompt": "rain"} if cfg else {}
    return {"prompt": {0: "a red fox", 2: "a grey fox"}, "height": case.pixels[0], "width": case.pixels[1], **negative}


_ARGUMENTS = {"num_frames": FRAMES}
_UP = {"layers": "up", "modules": ("up_blocks.*",), "frames": FRAMES}
_EVERY = {"layers": ["down", "mid", "up"], "modules": ("*",), "frames": FRAMES}
_MID = {"frames": FRAMES}

MOTION = {
    "animatediff": Case("AnimateDiffPipeline", built_of(motion), with_options(**_ARGUMENTS), **_EVERY),
    "animatediff-up": Case("AnimateDiffPipeline", built_of(motion), with_options(**_ARGUMENTS), **_UP),
    "animatediff-no-mid": Case("AnimateDiffPipeline", built_of(motion, mid=False), with_options(**_ARGUMENTS), **_MID),
    "animatediff-xl": Case(
        "AnimateDiffSDXLPipeline", built_of(motion, make=unet_xl, mid=False), with_options(**_ARGUMENTS), **_EVERY
    ),
    "animatediff-video": Case(
        "AnimateDiffVideoToVideoPipeline",
        built_of(motion),
        with_options(video=video, strength=0.7, num_inference_steps=3),
        **_MID,
    ),
    "animatediff-ip-adapter": Case(
        "AnimateDiffPipeline",
        changed(built_of(motion), ip_adapter),
        with_options(ip_adapter_image_embeds=image_embeds, **_ARGUMENTS),
        **_UP,
    ),
    "animatediff-free-noise": Case(
        "AnimateDiffPipeline",
        changed(built_of(motion, parts=_with_text, cross_attention_dim=32), _free_noise),
        lambda *given: {**_prompts(*given), **_ARGUMENTS},
        samples=1,
        **_EVERY,
    ),
    # diffusers' ControlNet pipelines use one video for all samples, and support guess mode only without CFG.
    "animatediff-controlnet": Case(
        "AnimateDiffControlNetPipeline",
        built_of(motion, parts=lambda _: controlnet(unet())),
        with_options(conditioning_frames=frames, **_ARGUMENTS),
        samples=1,
        **_MID,
    ),
    "animatediff-controlnet-down": Case(
        "AnimateDiffControlNetPipeline",
        built_of(motion, parts=lambda _: controlnet(unet())),
        with_options(conditioning_frames=frames, **_ARGUMENTS),
        samples=1,
        **_EVERY,
    ),
    "animatediff-controlnet-guess": Case(
        "AnimateDiffControlNetPipeline",
        built_of(motion, parts=lambda _: controlnet(unet())),
        with_options(conditioning_frames=frames, guess_mode=True, **_ARGUMENTS),
        samples=1,
        scales=(None, 1.0),
        **_UP,
    ),
    "animatediff-video-controlnet": Case(
        "AnimateDiffVideoToVideoControlNetPipeline",
        built_of(motion, parts=lambda _: controlnet(unet())),
        with_options(video=frames, conditioning_frames=frames, strength=0.7, num_inference_steps=3),
        samples=1,
        **_MID,
    ),
    "animatediff-sparse-control": Case(
        "AnimateDiffSparseControlNetPipeline",
        built_of(motion, parts=_sparse_control),
        with_options(
            conditioning_frames=lambda *given: [frame[None] for frame in frames(*given)[:2]],
            controlnet_frame_indices=[0, 2],
            **_ARGUMENTS,
        ),
        samples=1,
        **_UP,
    ),
}

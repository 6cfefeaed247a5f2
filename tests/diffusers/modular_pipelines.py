# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines on the small checkpoints of the other tests, with components set manually."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.modular_pipelines import SequentialPipelineBlocks
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base import Flux2KleinBaseCoreDenoiseStep
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise as sdxl
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep
from diffusers.utils import logging

from segkern.integrations.diffusers.guiders.base import SpecGuider
from tests.diffusers.transformer_cases import MODELS

# Guiders warn that they are experimental, components that they were set manually, and blocks log what is raised anyway.
for name in ("guiders.guider_utils", "modular_pipelines.modular_pipeline", "modular_pipelines.modular_pipeline_utils"):
    logging.get_logger(f"diffusers.{name}").setLevel(logging.CRITICAL)

_SDXL = {
    "input": sdxl.StableDiffusionXLInputStep,
    "set_timesteps": sdxl.StableDiffusionXLSetTimestepsStep,
    "prepare_latents": sdxl.StableDiffusionXLPrepareLatentsStep,
    "prepare_add_cond": sdxl.StableDiffusionXLPrepareAdditionalConditioningStep,
    "denoise": StableDiffusionXLDenoiseStep,
}
_TRANSFORMERS: dict[str, type] = {
    "sd3": StableDiffusion3T2ICoreDenoiseStep,
    "sd3.5": StableDiffusion3T2ICoreDenoiseStep,
    "qwen-image": QwenImageCoreDenoiseStep,
    "z-image": ZImageCoreDenoiseStep,
    "wan": WanCoreDenoiseStep,
    "ltx-video": LTXCoreDenoiseStep,
    "flux2-klein": Flux2KleinBaseCoreDenoiseStep,
}
TRANSFORMERS = tuple(_TRANSFORMERS)


def _built(blocks: Any, guider: Any, pipe: Any, **components: Any) -> Any:
    modular = blocks.init_pipeline()
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    if isinstance(guider, SpecGuider):
        guider.scheduler = scheduler
    modular.update_components(scheduler=scheduler, guider=guider, **components)
    modular.set_progress_bar_config(disable=True)
    return modular


def modular_sdxl(pipe: Any, guider: Any) -> Any:
    """Return the modular pipeline with the components of a stock pipeline."""
    blocks = SequentialPipelineBlocks.from_blocks_dict({name: kind() for name, kind in _SDXL.items()})
    return _built(blocks, guider, pipe, unet=pipe.unet, vae=pipe.vae)


def run_sdxl(
    modular: Any, pipe: Any, prompt: str | list[str] = "a red fox", *, latents: torch.Tensor, **arguments: Any
) -> torch.Tensor:
    """Return latents of a short run, like ``small_pipelines.run``."""
    given = dict(zip(("prompt_embeds", "negative_prompt_embeds"), pipe.encode_prompt(prompt)[:2], strict=True))
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    given |= dict(zip(pooled, pipe.encode_prompt(prompt)[2:], strict=True))
    if modular.guider.num_conditions == 1:  # negative prompts are not used
        given = {name: value for name, value in given.items() if not name.startswith("negative_")}
    height, width = (size * pipe.vae_scale_factor for size in latents.shape[2:])
    given |= {"height": height, "width": width, "num_inference_steps": 3, "latents": latents, **arguments}
    return modular(**given, output="latents")


def modular_transformer(name: str, pipe: Any, guider: Any) -> Any:
    """Return the modular pipeline of a stock one of ``transformer_cases``; latents have the model's layout."""
    blocks = _TRANSFORMERS[name]()
    for last in ("after_denoise", "unpack_latents"):
        blocks.sub_blocks.pop(last, None)
    return _built(blocks, guider, pipe, transformer=pipe.transformer)


def run_transformer(
    name: str, modular: Any, rows: int = 6, columns: int = 4, samples: int = 1, cfg: bool = True, **more: Any
) -> torch.Tensor:
    """Return latents of a short run, like ``transformer_cases.run``."""
    model = MODELS[name]
    needs_both = name in ("wan", "ltx-video")  # even if they are not used
    given = model.call(rows, columns, samples, cfg or needs_both)
    given = {key: value for key, value in given.items() if not key.endswith("scale") and value != []}
    given |= {"height": rows * model.factor, "width": columns * model.factor, "num_inference_steps": 3}
    return modular(**given, generator=torch.Generator().manual_seed(5), **more, output="latents")

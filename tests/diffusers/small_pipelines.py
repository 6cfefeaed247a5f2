# SPDX-License-Identifier: Apache-2.0
"""Small pipelines of Stable Diffusion XL and 1, short runs, and the golden cases."""

from __future__ import annotations

import copy
import inspect
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PIPELINE_TOLERANCE = 2e-5  # relative norm of latents after a whole run in float32

logging.disable_progress_bar()


@lru_cache(maxsize=1)
def _components() -> dict[str, Any]:
    pipe = StableDiffusionXLPipeline.from_pretrained(GOLDEN / "tiny-sdxl")
    return pipe.components


def tiny_pipeline(kind: type = StableDiffusionXLPipeline, own_unet: bool = False, **components: Any) -> Any:
    """Return a pipeline on the tiny checkpoint. Use ``own_unet`` if the test changes more than guidance does."""
    parts = {**_components(), **components}
    parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
    if own_unet and "unet" not in components:
        parts["unet"] = copy.deepcopy(parts["unet"])
    taken = inspect.signature(kind.__init__).parameters
    pipe = kind(**{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_pipeline_of_embeddings() -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a pipeline without text encoders and with its own denoiser, and prompt embeddings for its call."""
    texts = tiny_pipeline().encode_prompt("a red fox")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    pipe = tiny_pipeline(own_unet=True, text_encoder=None, text_encoder_2=None)
    return pipe, dict(zip(names, texts, strict=True))


def smaller_pipeline() -> Any:
    """Return a pipeline whose denoiser has few layers, because tracing takes seconds."""
    torch.manual_seed(0)
    config = {
        **tiny_pipeline().unet.config,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
    }
    return tiny_pipeline(unet=UNet2DConditionModel.from_config(config).eval())


@lru_cache(maxsize=1)
def _sd_unet() -> UNet2DConditionModel:
    """Return a UNet in Stable Diffusion 1's layout with fixed random weights and far from uniform attention."""
    text = tiny_pipeline().text_encoder.config.hidden_size
    with torch.random.fork_rng():
        torch.manual_seed(5)
        unet = UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            layers_per_block=1,
            norm_num_groups=8,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=4,  # diffusers uses this name for the number of heads
            cross_attention_dim=text,
        )
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.data *= 3.0
    return unet.eval().requires_grad_(False)


def tiny_sd(kind: type = StableDiffusionPipeline, *, prediction_type: str = "epsilon", **options: Any) -> Any:
    """Return a pipeline like Stable Diffusion 1 with DDIM."""
    parts = tiny_pipeline().components
    scheduler = options.pop("scheduler", None) or DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipe = kind(
        vae=parts["vae"],
        text_encoder=parts["text_encoder"],
        tokenizer=parts["tokenizer"],
        unet=options.pop("unet", None) or _sd_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, prompt: str | list[str] = "a red fox", *, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Return latents of a short run. Height and width follow from the initial latents."""
    factor = pipe.vae_scale_factor
    defaults = {
        "height": latents.shape[2] * factor,
        "width": latents.shape[3] * factor,
        "num_inference_steps": 3,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    return pipe(prompt, latents=latents, **{**defaults, **arguments}).images


def noise(batch: int = 1, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Return initial latents ``[batch, 4, height, width]``."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative L2 distance."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def golden_cases() -> list[dict[str, Any]]:
    """Return the arguments of the golden pipeline runs, with ``latents``, ``output`` and ``unguided`` tensors."""
    with safe_open(GOLDEN / "official_pipeline.safetensors", "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        for index, case in enumerate(cases):
            case.pop("seed")
            case.update({name: file.get_tensor(f"{index}.{name}") for name in ("latents", "output", "unguided")})
    return cases

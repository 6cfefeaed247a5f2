# SPDX-License-Identifier: Apache-2.0
"""Pipelines under any scheduler, and a denoising loop that shares nothing with the package."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from segkern.integrations.diffusers import SEG, list_layers
from tests.diffusers.diffusers_tools import DenseProcessor, tiny_pipeline

PROMPT = "a red fox"
CALLS_PER_STEP = {"HeunDiscreteScheduler": 2, "KDPM2DiscreteScheduler": 2, "KDPM2AncestralDiscreteScheduler": 2}


def _sd_unet() -> UNet2DConditionModel:
    """A random denoiser of the first Stable Diffusion's kind: text alone conditions it."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


@lru_cache(maxsize=4)
def _networks(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a pipeline computes with, in this type."""
    parts = tiny_pipeline().components
    if model == "sd":
        parts = {**parts, "unet": _sd_unet()}
    networks = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {name: copy.deepcopy(network).to(dtype) for name, network in networks.items()}


def sampled_pipeline(model: str, kind: Any, prediction: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A tiny pipeline, ``"sd"`` or ``"sdxl"``, whose scheduler takes its denoiser's output for ``prediction``."""
    networks = _networks(model, dtype)
    if model == "sdxl":
        pipe = tiny_pipeline(StableDiffusionXLPipeline, **networks)
    else:
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = tiny_pipeline(StableDiffusionPipeline, **networks, **nothing)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, prediction_type=prediction, **options)
    return pipe


def calls_per_step(scheduler: Any) -> int:
    """How often the scheduler calls the denoiser in each step but the last, which it calls it once in."""
    return CALLS_PER_STEP.get(type(scheduler).__name__, 1)


@torch.no_grad()
def slow_run(
    pipe: Any,
    spec: SEG,
    *,
    latents: torch.Tensor,
    steps: int,
    guidance_scale: float,
    acts: Callable[[int], bool] = lambda step: True,
    computes: Callable[[int], bool] = lambda step: True,
    seed: int = 0,
    eta: float = 0.0,
) -> torch.Tensor:
    """What a guided run must return: each branch in full and alone, the sum by the formula, the scheduler's own step.

    Args:
        pipe: a pipeline of :func:`sampled_pipeline`.
        spec: its scale, sigma and layers (a part's name); when it acts is told by ``acts``.
        latents: before they are scaled to the first noise level.
        steps: of the run.
        guidance_scale: of classifier-free guidance; not above 1 there is none.
        acts: whether guidance acts in a step, by its number.
        computes: whether the perturbed branch is computed in a step; else the last difference is taken.
        seed: of the noise that an SDE sampler draws.
        eta: of DDIM.
    """
    cfg = guidance_scale > 1.0
    conditional, unconditional = _conditions(pipe, latents, cfg)
    perturbed_unet = _copy(pipe.unet)
    perturbed_unet.set_attn_processor(AttnProcessor2_0())
    size = [length * pipe.vae_scale_factor for length in latents.shape[2:]]
    for layer in list_layers(pipe, *size):
        if layer.part == spec.layers:
            assert layer.grid is not None
            processor = DenseProcessor(layer.grid.height, layer.grid.width)
            processor.sigmas = [spec.sigma] * len(latents)
            perturbed_unet.get_submodule(layer.module).set_processor(processor)

    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    known = {"generator": torch.Generator().manual_seed(seed), "eta": eta}
    taken = inspect.signature(scheduler.step).parameters
    extra = {name: value for name, value in known.items() if name in taken}
    x, difference = latents * scheduler.init_noise_sigma, torch.zeros_like(latents)
    for call, t in enumerate(scheduler.timesteps):
        step = call // calls_per_step(scheduler)
        model_input = scheduler.scale_model_input(x, t)
        c = pipe.unet(model_input, t, **conditional).sample
        guided = c
        if cfg:
            u = pipe.unet(model_input, t, **unconditional).sample
            guided = u + guidance_scale * (c - u)
        if acts(step):
            if computes(step):
                difference = c - perturbed_unet(model_input, t, **conditional).sample
            guided = guided + spec.scale * difference
        x = scheduler.step(guided, t, x, **extra).prev_sample
    return x


@lru_cache(maxsize=4)
def _copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    return copy.deepcopy(unet)


def _conditions(pipe: Any, latents: torch.Tensor, cfg: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The denoiser's arguments for the prompt and for no prompt."""
    if not isinstance(pipe, StableDiffusionXLPipeline):
        texts = pipe.encode_prompt(PROMPT, "cpu", 1, cfg)
        return {"encoder_hidden_states": texts[0]}, {"encoder_hidden_states": texts[1]}
    texts = pipe.encode_prompt(PROMPT, do_classifier_free_guidance=cfg)
    height, width = (length * pipe.vae_scale_factor for length in latents.shape[2:])
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=latents.dtype)
    conditional, unconditional = (
        {"encoder_hidden_states": text, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
        for text, pooled in zip(texts[:2], texts[2:], strict=True)
    )
    return conditional, unconditional

# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the whole family: a small Stable Diffusion 1 checkpoint, and slow layers for any branch."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

from tests.diffusers.diffusers_tools import dense_blur, tiny_pipeline

Entry = float | tuple[float, ...] | str


@lru_cache(maxsize=1)
def _unet() -> UNet2DConditionModel:
    """In Stable Diffusion 1's layout with random weights, the same ones each time; attention is far from uniform."""
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
            attention_head_dim=4,  # diffusers' name for the number of heads
            cross_attention_dim=text,
        )
        for name, parameter in unet.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.data *= 3.0
    return unet.eval().requires_grad_(False)


def tiny_sd(kind: type = StableDiffusionPipeline, *, prediction_type: str = "epsilon", **options: Any) -> Any:
    """A pipeline of Stable Diffusion 1's kind, with DDIM."""
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
        unet=options.pop("unet", None) or _unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **options,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def _blur(height: int, width: int, sigma: float) -> torch.Tensor:
    return dense_blur(height, width, sigma) if sigma else torch.eye(height * width, dtype=torch.float64)


class SlowProcessor:
    """Self-attention in float64 by matrices; one entry and one blend for each sample.

    An entry is a sigma, a tuple of one for each head, or ``"identity"``.
    """

    def __init__(self, height: int, width: int) -> None:
        self.shape = (height, width)
        self.entries: list[Entry] = []
        self.blends: list[float] = []

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).double()
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        logits = query @ key.transpose(-2, -1) * attn.scale
        outputs = []
        for sample, (entry, blend) in enumerate(zip(self.entries, self.blends, strict=True)):
            own = logits[sample].softmax(dim=-1) @ value[sample]
            outputs.append(blend * self._perturbed(entry, logits[sample], value[sample]) + (1.0 - blend) * own)
        output = torch.stack(outputs).transpose(1, 2).flatten(2)
        return attn.to_out[0](output.to(hidden_states.dtype))

    def _perturbed(self, entry: Entry, logits: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if entry == "identity":
            return value
        sigmas = entry if isinstance(entry, tuple) else (entry,) * len(logits)
        blurs = [_blur(*self.shape, s) for s in sigmas]  # type: ignore[arg-type]
        return (torch.stack(blurs) @ logits).softmax(dim=-1) @ value

# SPDX-License-Identifier: Apache-2.0
"""Denoisers in Stable Diffusion XL's layout with random weights, and minimal pipelines around them.

The cost of guidance does not depend on the weights. The reduced denoiser has SDXL's blocks and number of layers, with a
fifth of its channels and half of its grid's sides, so attention and projections keep roughly their proportion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

_SHARED: dict[str, Any] = {
    "addition_embed_type": "text_time",
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
}


@dataclass(frozen=True)
class Size:
    """The size of a denoiser.

    Attributes:
        name: Name of the size.
        latent: Height and width of the latents.
        config: Arguments of ``UNet2DConditionModel``.
    """

    name: str
    latent: tuple[int, int]
    config: dict[str, Any]

    @property
    def pooled(self) -> int:
        """Channels of the pooled text embedding."""
        ids = 6 * self.config["addition_time_embed_dim"]
        return int(self.config["projection_class_embeddings_input_dim"]) - ids


SDXL = Size(
    "sdxl",
    (128, 128),
    _SHARED
    | {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),  # diffusers' name for the number of heads
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
)
SDXL_SMALL_IMAGE = replace(SDXL, name="sdxl-416x608", latent=(52, 76))  # takes seconds on a CPU
REDUCED = Size(
    "sdxl-reduced",
    (64, 64),
    _SHARED
    | {
        "sample_size": 64,
        "block_out_channels": (64, 128, 256),
        "attention_head_dim": (1, 2, 4),
        "cross_attention_dim": 416,
        "addition_time_embed_dim": 64,
        "projection_class_embeddings_input_dim": 640,
    },
)
TINY = Size(
    "sdxl-tiny",
    (16, 24),
    _SHARED
    | {
        "sample_size": 16,
        "block_out_channels": (32, 32, 64),
        "attention_head_dim": (2, 2, 4),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 32,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
)
SIZES = {size.name: size for size in (SDXL, SDXL_SMALL_IMAGE, REDUCED, TINY)}
_TEXT_TOKENS = 77


def denoiser(size: Size, device: torch.device | str, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """Return a denoiser with random weights, which are equal at every call."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(0)
        return UNet2DConditionModel(**size.config).to(dtype).eval().requires_grad_(False)


def pipeline(unet: UNet2DConditionModel, kind: type = StableDiffusionXLPipeline, **options: Any) -> Any:
    """Return a stock pipeline with a denoiser and a scheduler. Prompts are embeddings, and images stay latents."""
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = kind(**parts, unet=unet, scheduler=EulerDiscreteScheduler(timestep_spacing="leading"), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(size: Size, device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return the arguments of a pipeline call: latents, and embeddings of a prompt and a negative prompt."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    text = 1, _TEXT_TOKENS, size.config["cross_attention_dim"]
    return {
        "latents": normal(1, 4, *size.latent),
        "prompt_embeds": normal(*text),
        "negative_prompt_embeds": normal(*text),
        "pooled_prompt_embeds": normal(1, size.pooled),
        "negative_pooled_prompt_embeds": normal(1, size.pooled),
    }


# Names of a denoiser's samples, by presence of CFG and of a perturbed branch, as prefixes of a call's arguments.
BRANCHES = {
    (True, True): ("negative_", "", ""),
    (True, False): ("negative_", ""),
    (False, True): ("", ""),
    (False, False): ("",),
}


def conditions(
    size: Size, given: dict[str, torch.Tensor], order: Sequence[str]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the text and added conditions of a denoiser call for samples in an order of ``BRANCHES``."""
    text = torch.cat([given[f"{name}prompt_embeds"] for name in order])
    pooled = torch.cat([given[f"{name}pooled_prompt_embeds"] for name in order])
    height, width = (8 * pixels for pixels in size.latent)
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=text.dtype, device=text.device)
    return text, {"text_embeds": pooled, "time_ids": ids.repeat(len(order), 1)}


def forward(pipe: Any, size: Size, guidance_scale: float) -> torch.Tensor:
    """Call a pipeline's denoiser once, as in a run, on the denoiser's device; also without data (meta)."""
    unet, batch = pipe.unet, 2 if guidance_scale > 1.0 else 1
    device, dtype = next(unet.parameters()).device, next(unet.parameters()).dtype
    with torch.device(device), torch.no_grad():
        output = unet(
            torch.empty(batch, 4, *size.latent, dtype=dtype),
            torch.tensor(1.0),
            encoder_hidden_states=torch.empty(batch, _TEXT_TOKENS, size.config["cross_attention_dim"], dtype=dtype),
            added_cond_kwargs={
                "text_embeds": torch.empty(batch, size.pooled, dtype=dtype),
                "time_ids": torch.empty(batch, 6, dtype=dtype),
            },
            return_dict=False,
        )
    assert isinstance(output[0], torch.Tensor)
    return output[0]

# SPDX-License-Identifier: Apache-2.0
"""Shared by the diffusers tests: tiny checkpoint, golden cases, and a slow, independent way to guide."""

from __future__ import annotations

import copy
import inspect
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from safetensors import safe_open

from segkern.integrations.diffusers import SEG, list_layers

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
PIPELINE_TOLERANCE = 2e-5  # relative norm of latents after a whole run in float32

# Many small operations and several test processes: more threads only wait for each other.
torch.set_num_threads(1)
logging.disable_progress_bar()


@lru_cache(maxsize=1)
def _components() -> dict[str, Any]:
    pipe = StableDiffusionXLPipeline.from_pretrained(GOLDEN / "tiny-sdxl")
    return pipe.components


def tiny_pipeline(kind: type = StableDiffusionXLPipeline, own_unet: bool = False, **components: Any) -> Any:
    """A pipeline on the tiny checkpoint; ``own_unet`` when the test changes more than guidance does."""
    parts = {**_components(), **components}
    parts["scheduler"] = type(parts["scheduler"]).from_config(parts["scheduler"].config)
    if own_unet and "unet" not in components:
        parts["unet"] = copy.deepcopy(parts["unet"])
    taken = inspect.signature(kind.__init__).parameters
    pipe = kind(**{name: part for name, part in parts.items() if name in taken})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def smaller_pipeline() -> Any:
    """A pipeline whose denoiser has few layers, because tracing takes seconds."""
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


def run(pipe: Any, prompt: str | list[str] = "a red fox", *, latents: torch.Tensor, **arguments: Any) -> torch.Tensor:
    """Latents of a short run. Height and width follow from the initial latents."""
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
    """Initial latents ``[batch, 4, height, width]``."""
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative L2 distance."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def golden_cases() -> list[dict[str, Any]]:
    """Arguments of the golden pipeline runs, with their ``latents``, ``output`` and ``unguided`` tensors."""
    with safe_open(GOLDEN / "official_pipeline.safetensors", "pt") as file:
        cases = json.loads(file.metadata()["cases"])
        for index, case in enumerate(cases):
            case.pop("seed")
            case.update({name: file.get_tensor(f"{index}.{name}") for name in ("latents", "output", "unguided")})
    return cases


# The independent way: every branch runs in full, logits are blurred by an N x N matrix in float64.


def dense_blur(height: int, width: int, sigma: float) -> torch.Tensor:
    """The 2-D Gaussian blur with reflect padding as ``[tokens, tokens]``, by blurring every unit image."""
    tokens = height * width
    if math.isinf(sigma):
        return torch.full((tokens, tokens), 1.0 / tokens, dtype=torch.float64)
    kernels = []
    for length in (height, width):
        taps = math.ceil(6 * sigma) + 1 - math.ceil(6 * sigma) % 2
        taps = min(taps, length - (length % 2 - 1))
        x = torch.arange(taps, dtype=torch.float64) - taps // 2
        weights = torch.exp(-(x**2) / (2 * sigma**2))
        kernels.append(weights / weights.sum())
    units = torch.eye(tokens, dtype=torch.float64).view(tokens, 1, height, width)
    rows, columns = len(kernels[0]) // 2, len(kernels[1]) // 2
    padded = F.pad(units, (columns, columns, rows, rows), mode="reflect")
    blurred = F.conv2d(padded, torch.outer(*kernels)[None, None])
    return blurred.view(tokens, tokens).T


class DenseProcessor:
    """Attention with blurred logits in float64; ``sigmas`` has one entry per sample of the batch."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = (height, width)
        self.sigmas: Sequence[float] = ()

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2).double()
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        logits = query @ key.transpose(-2, -1) * attn.scale
        blurs = [dense_blur(*self.shape, s) if s else torch.eye(logits.shape[2]).double() for s in self.sigmas]
        logits = torch.stack(blurs)[:, None] @ logits
        output = (logits.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        return attn.to_out[0](output.to(hidden_states.dtype))


@torch.no_grad()
def reference_run(
    pipe: Any,
    specs: Sequence[SEG],
    prompt: str | list[str] = "a red fox",
    *,
    latents: torch.Tensor,
    guidance_scale: float = 5.0,
    guidance_rescale: float = 0.0,
    num_inference_steps: int = 3,
    num_images_per_prompt: int = 1,
) -> torch.Tensor:
    """What ``run`` must return under ``guide(pipe, *specs)``, from a denoising loop of its own."""
    height, width = (size * pipe.vae_scale_factor for size in latents.shape[2:])
    cfg = guidance_scale > 1.0
    texts = pipe.encode_prompt(prompt, num_images_per_prompt=num_images_per_prompt, do_classifier_free_guidance=cfg)
    conditional, unconditional, pooled, unconditional_pooled = texts
    ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).repeat(len(latents), 1)

    unet = copy.deepcopy(pipe.unet)
    chosen = [set(_modules(pipe, spec)) for spec in specs]
    processors: dict[str, DenseProcessor] = {}
    for layer in list_layers(pipe, height, width):
        if any(layer.module in names for names in chosen):
            assert layer.grid is not None
            processors[layer.module] = DenseProcessor(layer.grid.height, layer.grid.width)
            unet.get_submodule(layer.module).set_processor(processors[layer.module])

    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(num_inference_steps)
    x = latents * scheduler.init_noise_sigma
    acted, differences = [0] * len(specs), {}
    for step, t in enumerate(scheduler.timesteps):
        active = [i for i, s in enumerate(specs) if s.start <= step / len(scheduler.timesteps) < s.stop]
        branches = [
            *([(unconditional, unconditional_pooled)] if cfg else []),
            *[(conditional, pooled)] * (1 + len(active)),
        ]
        plain = len(branches) - len(active)
        for name, processor in processors.items():
            acting = [specs[i].sigma if name in chosen[i] else 0.0 for i in active]
            processor.sigmas = [s for s in [*[0.0] * plain, *acting] for _ in range(len(x))]
        predictions = unet(
            scheduler.scale_model_input(torch.cat([x] * len(branches)), t),
            t,
            encoder_hidden_states=torch.cat([text for text, _ in branches]),
            added_cond_kwargs={
                "text_embeds": torch.cat([embeds for _, embeds in branches]),
                "time_ids": ids.repeat(len(branches), 1),
            },
        ).sample.chunk(len(branches))
        c = predictions[plain - 1]
        guided = predictions[0] + guidance_scale * (c - predictions[0]) if cfg else c
        for i, perturbed in zip(active, predictions[plain:], strict=True):
            if acted[i] % specs[i].reuse == 0:
                differences[i] = c - perturbed
            acted[i] += 1
            guided = guided + specs[i].scale * differences[i]
        if cfg and guidance_rescale:
            ratio = c.std(dim=(1, 2, 3), keepdim=True) / guided.std(dim=(1, 2, 3), keepdim=True)
            guided = guidance_rescale * guided * ratio + (1 - guidance_rescale) * guided
        x = scheduler.step(guided, t, x).prev_sample
    return x


def _modules(pipe: Any, spec: SEG) -> list[str]:
    """Module names of a spec that names its layers by part or by single official indices."""
    names = [spec.layers] if isinstance(spec.layers, str) else spec.layers
    return [layer.module for layer in list_layers(pipe) if layer.part in names or layer.name in names]

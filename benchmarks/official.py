# SPDX-License-Identifier: Apache-2.0
"""Blur and whole runs by the official algorithm, written from the method's description and fixed for any grid.

A run computes every branch in full and blurs by a two-dimensional convolution. Its loop does less around the denoiser
than a pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from segkern import Grid
from segkern.core.gaussian import gaussian_taps

if TYPE_CHECKING:  # the blur needs no diffusers
    from diffusers.models.attention_processor import Attention

    from benchmarks.sdxl import Size


def official_blur(image: torch.Tensor, grid: Grid, sigma: float) -> torch.Tensor:
    """Blur image tokens ``[batch, heads, tokens, dim]``, with a kernel that is built on the host at every call."""
    if math.isinf(sigma):
        return image.mean(dim=2, keepdim=True).expand_as(image)
    batch, heads, tokens, dim = image.shape
    planes = image.transpose(2, 3).reshape(batch, heads * dim, grid.height, grid.width)
    rows, columns = gaussian_taps(sigma, grid.height), gaussian_taps(sigma, grid.width)
    kernel = torch.outer(rows, columns).to(image.device, image.dtype)
    kernel = kernel.expand(heads * dim, 1, *kernel.shape)
    pad_w, pad_h = columns.numel() // 2, rows.numel() // 2
    planes = F.conv2d(F.pad(planes, (pad_w, pad_w, pad_h, pad_h), mode="reflect"), kernel, groups=heads * dim)
    return planes.view(batch, heads, dim, tokens).transpose(2, 3)


class OfficialProcessor:
    """Attention that blurs the queries of the last of ``branches`` equal parts of the batch."""

    def __init__(self, grid: Grid, sigma: float, branches: int) -> None:
        self.grid = grid
        self.sigma = sigma
        self.branches = branches

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = (
            linear(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        plain = len(query) - len(query) // self.branches
        query = torch.cat([query[:plain], official_blur(query[plain:], self.grid, self.sigma)])
        output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](output))


@torch.no_grad()
def official_run(
    pipe: Any,
    size: Size,
    given: dict[str, torch.Tensor],
    *,
    sigma: float,
    layers: tuple[str, ...],
    scale: float,
    guidance_scale: float,
    steps: int,
    after_step: Callable[[], None],
) -> torch.Tensor:
    """Return the latents after this number of steps. ``after_step`` is called at the end of each step."""
    from benchmarks.sdxl import BRANCHES, conditions

    cfg = guidance_scale > 1.0
    order = BRANCHES[cfg, True]
    text, added = conditions(size, given, order)
    with processors(pipe, size, layers, lambda grid: OfficialProcessor(grid, sigma, len(order))):
        pipe.scheduler.set_timesteps(steps, device=text.device)
        x = given["latents"] * pipe.scheduler.init_noise_sigma
        for t in pipe.scheduler.timesteps:
            batch = pipe.scheduler.scale_model_input(torch.cat([x] * len(order)), t)
            predictions = pipe.unet(batch, t, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False)[0]
            x = pipe.scheduler.step(guided(predictions, guidance_scale, scale), t, x, return_dict=False)[0]
            after_step()
    return x


def guided(predictions: torch.Tensor, guidance_scale: float, scale: float) -> torch.Tensor:
    """Combine [unconditional, conditional, perturbed] predictions; the first one is present only with CFG."""
    *unconditional, c, p = predictions.chunk(3 if guidance_scale > 1.0 else 2)
    total = unconditional[0] + guidance_scale * (c - unconditional[0]) if unconditional else c
    return total + scale * (c - p)


@contextmanager
def processors(pipe: Any, size: Size, layers: Sequence[str], make: Callable[[Grid], Any]) -> Iterator[None]:
    """Set processors made for the grid on the self-attention layers of these parts of the denoiser."""
    from segkern.integrations.diffusers import list_layers
    from segkern.integrations.diffusers.models.layers import find_unet

    unet = find_unet(pipe)
    before = unet.attn_processors
    for layer in list_layers(pipe, *(8 * pixels for pixels in size.latent)):
        if layer.part in layers:
            assert layer.grid is not None
            unet.get_submodule(layer.module).set_processor(make(layer.grid))
    try:
        yield
    finally:
        unet.set_attn_processor(dict(before))

# SPDX-License-Identifier: Apache-2.0
"""Denoisers with known results: stock UNets whose single self-attention layer computes an exact posterior mean.

The input of such a denoiser is ``x_t = a x_0 + s n`` with ``a = 1 / sqrt(1 + sigma^2)`` and ``s = a sigma``. Its text
embedding holds the parameters of the distribution of ``x_0``, so classifier-free guidance combines two distributions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class _Sigma(nn.Module):
    """Replaces the time embedding: the noise level ``sigma`` of each timestep, linearly interpolated."""

    def __init__(self, levels: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("levels", levels)

    def forward(self, timesteps: torch.Tensor, condition: Any = None) -> torch.Tensor:
        below = timesteps.floor().long().clamp(0, len(self.levels) - 2)
        return torch.lerp(self.levels[below], self.levels[below + 1], timesteps.double() - below)[:, None]


class ExactBlock(nn.Module):
    """The mid block, which is the whole model: an ``attn1`` that selects queries, keys and values from its input."""

    has_cross_attention = True

    def __init__(self, channels: int, features: int, prediction: str) -> None:
        super().__init__()
        self.channels, self.features, self.prediction = channels, features, prediction
        self.attn1 = Attention(query_dim=3 * features, heads=1, dim_head=features).double()
        with torch.no_grad():
            for place, linear in enumerate((self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)):
                linear.weight.zero_()[:, place * features : (place + 1) * features] = torch.eye(features)
            self.attn1.to_q.weight *= math.sqrt(features)  # the layer divides logits by this
            self.attn1.to_out[0].weight.zero_()[:features] = torch.eye(features)
            self.attn1.to_out[0].bias.zero_()

    def forward(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, encoder_hidden_states: torch.Tensor, **rest: Any
    ) -> torch.Tensor:
        sigma = temb[:, :, None]
        a = (1 + sigma**2).rsqrt()
        s = a * sigma
        height, width = hidden_states.shape[2:]
        x = hidden_states.flatten(2).transpose(1, 2)  # [batch, tokens, channels], like all tensors below
        x0 = self.posterior_mean(x, a, s, encoder_hidden_states, (height, width))
        noise = (x - a * x0) / s
        prediction = {"epsilon": noise, "v_prediction": a * noise - s * x0, "sample": x0}[self.prediction]
        return prediction.transpose(1, 2).unflatten(2, (height, width))

    def posterior_mean(
        self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor, text: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Return ``E[x_0 | x_t]``, ``[batch, tokens, channels]``."""
        raise NotImplementedError

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        """Return ``softmax(query key^T) value``, computed by the layer."""
        padded = [nn.functional.pad(part, (0, self.features - part.shape[2])) for part in (query, key, value)]
        image = torch.cat(padded, dim=2).transpose(1, 2).unflatten(2, size)
        return self.attn1(image).flatten(2).transpose(1, 2)[:, :, : self.channels]


class MixtureBlock(ExactBlock):
    """Pixels are drawn independently from one mixture, which has as many Gaussians as the grid has tokens.

    Gaussian ``k`` is ``N(means[k] + shift, v)`` with weight ``weights[k]``; the text is ``[*shift, v]``. With
    ``V = a^2 v + s^2`` the posterior of the component is a softmax of ``a x.m / V - a^2 |m|^2 / 2V + log w``. Tokens
    are therefore keys for the means, and queries are affine in the pixels, so blurred queries are those of the blurred
    image.
    """

    def __init__(self, means: torch.Tensor, weights: torch.Tensor, prediction: str) -> None:
        super().__init__(means.shape[1], means.shape[1] + 1, prediction)
        self.register_buffer("means", means)
        self.register_buffer("weights", weights)

    def posterior_mean(
        self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor, text: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        means, v = self.means + text[:, :, :-1], text[:, :, -1:]
        variance = a**2 * v + s**2
        bias = self.weights.log()[:, None] - a**2 * means.square().sum(2, keepdim=True) / (2 * variance)
        query = torch.cat([a * x / variance, torch.ones_like(x[:, :, :1])], dim=2)
        component = self.attend(query, torch.cat([means, bias], dim=2), means, size)
        return (a * v * x + s**2 * component) / variance


class GaussianBlock(ExactBlock):
    """All pixels are jointly Gaussian: covariance ``rest``, except for the means of the halves, which have ``half``.

    Columns of the left half have mean ``m``, those of the right half ``-m``; the text is ``[m, rest, half]``. The layer
    computes the mean of a token's half, because logits across halves are very small. With infinite sigma all logits are
    equal and it computes the mean of the image. This is the exact denoiser of another Gaussian, in which the contrast
    between halves also has variance ``rest``.
    """

    def __init__(self, channels: int, prediction: str) -> None:
        super().__init__(channels, max(2, channels), prediction)

    def posterior_mean(
        self, x: torch.Tensor, a: torch.Tensor, s: torch.Tensor, text: torch.Tensor, size: tuple[int, int]
    ) -> torch.Tensor:
        mean, rest, half = (text[:, :, i : i + 1] for i in range(3))
        pattern = contrast(*size)[:, None]
        sides = torch.cat([pattern > 0, pattern < 0], dim=1).to(x.dtype).expand(len(x), -1, -1)
        centred = x - a * mean * pattern
        of_half = self.attend(100.0 * sides, sides, centred, size)
        gains = [a * value / (a**2 * value + s**2) for value in (rest, half)]
        return mean * pattern + gains[0] * centred + (gains[1] - gains[0]) * of_half


def contrast(height: int, width: int) -> torch.Tensor:
    """Return 1 for tokens of the left half and -1 for tokens of the right half, ``[tokens]``."""
    return torch.where(torch.arange(width) < width // 2, 1.0, -1.0).double().repeat(height)


def exact_pipeline(block: ExactBlock, scheduler: Any, text_size: int) -> StableDiffusionPipeline:
    """Return a stock pipeline in float64 whose denoiser is a stock UNet with this block."""
    unet = UNet2DConditionModel(
        in_channels=block.channels,
        out_channels=block.channels,
        block_out_channels=(4,),
        norm_num_groups=1,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        cross_attention_dim=text_size,
    )
    levels = ((1 - scheduler.alphas_cumprod.double()) / scheduler.alphas_cumprod.double()).sqrt()
    unet.time_proj, unet.time_embedding = nn.Identity(), _Sigma(levels)
    unet.down_blocks, unet.mid_block, unet.up_blocks = nn.ModuleList(), block, nn.ModuleList()
    unet.conv_in, unet.conv_norm_out, unet.conv_out = nn.Identity(), None, nn.Identity()
    pipe = StableDiffusionPipeline(
        None, None, None, unet.double().eval(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: StableDiffusionPipeline,
    latents: torch.Tensor,
    conditional: Sequence[float],
    unconditional: Sequence[float] | None = None,
    cfg: float = 1.0,
    **arguments: Any,
) -> torch.Tensor:
    """Return samples for these texts, ``[batch, channels, height, width]``."""
    texts = [
        None if text is None else torch.tensor(text, dtype=torch.float64).expand(len(latents), 1, -1)
        for text in (conditional, unconditional)
    ]
    return pipe(
        prompt_embeds=texts[0],
        negative_prompt_embeds=texts[1],
        guidance_scale=cfg,
        latents=latents,
        height=8 * latents.shape[2],
        width=8 * latents.shape[3],
        output_type="latent",
        **arguments,
    ).images


def record_steps(scheduler: Any) -> list[Step]:
    """Record each future step of the scheduler: prediction, sample, next sample."""
    made: list[Step] = []
    step = scheduler.step

    @functools.wraps(step)
    def recorded(prediction: torch.Tensor, t: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = step(prediction, t, sample, *args, **kwargs)
        made.append((prediction, sample, result[0]))
        return result

    scheduler.step = recorded
    return made


# Independent of the above: scores from log densities, moments from differential equations.


def mixture_score(
    x: torch.Tensor, a: float, s: float, means: torch.Tensor, weights: torch.Tensor, v: float
) -> torch.Tensor:
    """Return the gradient of ``log p_t`` at pixels ``[..., channels]``, by automatic differentiation."""
    x = x.detach().requires_grad_()
    squares = (x[..., None, :] - a * means).square().sum(-1)
    density = (weights.log() - squares / (2 * (a**2 * v + s**2))).logsumexp(-1)
    (gradient,) = torch.autograd.grad(density.sum(), x)
    return gradient


def degraded_score(
    x: torch.Tensor, blur: torch.Tensor, score: Callable[[torch.Tensor], torch.Tensor], variance: float
) -> torch.Tensor:
    """Return the field with blurred queries: components are selected by the blurred image, pixels are not blurred.

    Args:
        x: ``[..., tokens, channels]``.
        blur: ``[tokens, tokens]``.
        score: Score of the mixture at this time.
        variance: Variance of its components at this time.
    """
    blurred = blur @ x
    return score(blurred) + (blurred - x) / variance


@dataclass(frozen=True)
class Line:
    """A one-dimensional Gaussian.

    Attributes:
        mean: Mean.
        variance: Variance.
        weight: Weight of its score in the guided sum.
    """

    mean: float
    variance: float
    weight: float


def guided_moments(
    lines: Sequence[Line], sigma: float, variance: float, random: bool, steps: int = 500
) -> tuple[float, float]:
    """Return mean and variance at sigma = 0 of the guided process that begins at a noise level with mean 0.

    In ``y = x_t / a`` the guided score is ``-e(y) / sigma`` with ``e = sum w_j sigma (y - m_j) / (v_j + sigma^2)``.
    The reverse SDE has ``dm = 2 e(m) dsigma`` and ``dV = (4 e' V - 2 sigma) dsigma``, the probability flow
    ``dm = e(m) dsigma`` and ``dV = 2 e' V dsigma``; sigma decreases. Integrated by the classical Runge-Kutta method.
    """
    slope, noise = (2.0, 2.0) if random else (1.0, 0.0)

    def rates(w: float, mean: float, spread: float) -> tuple[float, float]:
        level = math.sinh(w)
        pulls = [line.weight * level / (line.variance + level**2) for line in lines]
        towards = sum(pull * (mean - line.mean) for pull, line in zip(pulls, lines, strict=True))
        change = (slope * towards, 2 * slope * sum(pulls) * spread - noise * level)
        return change[0] * math.cosh(w), change[1] * math.cosh(w)

    w, state = math.asinh(sigma), (0.0, variance)
    h = -w / steps
    for _ in range(steps):
        k1 = rates(w, *state)
        k2 = rates(w + h / 2, *(y + h / 2 * k for y, k in zip(state, k1, strict=True)))
        k3 = rates(w + h / 2, *(y + h / 2 * k for y, k in zip(state, k2, strict=True)))
        k4 = rates(w + h, *(y + h * k for y, k in zip(state, k3, strict=True)))
        state = tuple(y + h / 6 * sum(k) for y, *k in zip(state, k1, k2, k2, k3, k3, k4, strict=True))
        w += h
    return state

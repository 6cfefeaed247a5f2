# SPDX-License-Identifier: Apache-2.0
"""Self-Attention Guidance's degraded image: blurred where a layer attends, noised again with the predicted noise.

All of it is in the variance-preserving form that the denoiser sees, ``x = signal * x0 + noise * eps`` with
``signal^2 + noise^2 = 1``, whatever form the scheduler keeps its latents in: schedulers of the other form scale
them to this one before they call the denoiser.

Source: SAG (arXiv 2210.00939), section 4; diffusers' ``StableDiffusionSAGPipeline``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from segkern.blur import blur_matrix

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_scheduler(scheduler: Any) -> None:
    """Raise a ValueError unless it diffuses in a way that an image can be noised again by."""
    config, name = scheduler.config, type(scheduler).__name__
    if getattr(scheduler, "alphas_cumprod", None) is None or config.get("use_flow_sigmas", False):
        raise ValueError(f"SAG needs a scheduler with alphas_cumprod (a variance-preserving diffusion), got a {name}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"SAG knows the prediction types {', '.join(map(repr, PREDICTIONS))}, got {prediction!r} of a {name}"
        )


def levels(scheduler: Any, timestep: float) -> tuple[float, float]:
    """Signal and noise of the denoiser's input at a timestep.

    Schedulers with sigmas know the exact one at each of their timesteps, which may lie between whole ones. For others
    it is interpolated, in the logarithm, between the whole timesteps around.
    """
    sigmas, timesteps = getattr(scheduler, "sigmas", None), scheduler.timesteps
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(timesteps) and not hasattr(scheduler, "sigmas_interpol"):
        sigma = float(sigmas[(timesteps.cpu().double() - timestep).abs().argmin()])
    else:
        kept = scheduler.alphas_cumprod.cpu().double()
        logarithms = 0.5 * torch.log((1.0 - kept) / kept)
        below = min(int(timestep), len(kept) - 1)
        above = min(below + 1, len(kept) - 1)
        sigma = math.exp(torch.lerp(logarithms[below], logarithms[above], timestep - below))
    signal = 1.0 / math.sqrt(1.0 + sigma * sigma)
    return signal, sigma * signal


def clean_and_noise(
    x: torch.Tensor, output: torch.Tensor, signal: float, noise: float, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The clean image and the noise that a denoiser's output says its input consists of."""
    if prediction == "epsilon":
        return (x - noise * output) / signal, output
    if prediction == "sample":
        return output, (x - signal * output) / noise
    return signal * x - noise * output, noise * x + signal * output


def attended(mass: torch.Tensor, shape: tuple[int, int], threshold: float, size: tuple[int, int]) -> torch.Tensor:
    """Where tokens receive more attention than the threshold, ``[samples, 1, *size]`` of 0 and 1.

    Args:
        mass: ``[samples, heads, tokens]``, what each token receives, summed over queries.
        shape: height and width of the tokens' grid.
        threshold: of its mean over heads.
        size: of the latents; nearest neighbours carry it there.
    """
    mask = (mass.mean(dim=1) > threshold).unflatten(1, shape)[:, None]
    return F.interpolate(mask.to(mass.dtype), size)


def blurred(x: torch.Tensor, sigma: float, kernel_size: int) -> torch.Tensor:
    """A Gaussian of so many taps over the last two dimensions, with reflected edges."""
    if min(x.shape[-2:]) <= kernel_size // 2:
        raise ValueError(
            f"SAG.kernel_size={kernel_size} does not fit latents of {x.shape[-2]} x {x.shape[-1]}: reflection needs "
            f"more than {kernel_size // 2} pixels on a side"
        )
    rows, columns = (
        blur_matrix(length, sigma, "reflect", taps=kernel_size, dtype=x.dtype, device=x.device)
        for length in x.shape[-2:]
    )
    return rows @ x @ columns.T


def degrade(
    x: torch.Tensor,
    output: torch.Tensor,
    mask: torch.Tensor,
    at: tuple[float, float],
    prediction: str,
    blur: tuple[float, int],
) -> torch.Tensor:
    """The input of the second forward.

    Args:
        x: input of the first, ``[samples, channels, height, width]``. Channels that are not predicted (of inpainting)
            stay.
        output: of the first.
        mask: :func:`attended`.
        at: :func:`levels`.
        prediction: type of the output.
        blur: its sigma and number of taps.
    """
    channels = output.shape[1]
    signal, noise = at
    compute = torch.promote_types(x.dtype, torch.float32)
    own = x[:, :channels].to(compute)
    clean, eps = clean_and_noise(own, output.to(compute), signal, noise, prediction)
    mask = mask.to(compute)
    clean = blurred(clean, *blur) * mask + clean * (1.0 - mask)
    again = (signal * clean + noise * eps).to(x.dtype)
    return torch.cat([again, x[:, channels:]], dim=1) if x.shape[1] > channels else again

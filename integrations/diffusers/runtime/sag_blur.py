# SPDX-License-Identifier: Apache-2.0
"""The degraded image of Self-Attention Guidance: blurred where a layer attends, then noised with the predicted noise.

All computations use the variance-preserving form that the denoiser gets, ``x = signal * x0 + noise * eps`` with
``signal^2 + noise^2 = 1``. Schedulers that store latents in another form scale them to this form before they call the
denoiser.
Source: SAG (arXiv 2210.00939), section 4; diffusers' ``StableDiffusionSAGPipeline``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from segkern.core.bounded_cache import call_in_own_thread
from segkern.core.gaussian import blur_matrix
from segkern.integrations.diffusers.runtime.steps import timestep_value

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def check_scheduler(scheduler: Any) -> None:
    """Raise a ValueError if images cannot be noised again for this scheduler."""
    config, name = scheduler.config, type(scheduler).__name__
    if getattr(scheduler, "alphas_cumprod", None) is None or config.get("use_flow_sigmas", False):
        raise ValueError(f"SAG needs a scheduler with alphas_cumprod (a variance-preserving diffusion), got a {name}")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise ValueError(
            f"SAG supports the prediction types {', '.join(map(repr, PREDICTIONS))}, got {prediction!r} of a {name}"
        )


def levels(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """Return signal and noise of the denoiser's input in the current call.

    If the scheduler scales latents for the denoiser, the scale factor is the signal. Otherwise, latents are stored in
    the denoiser's form. Signal and noise then follow from the sigma of the current step, or, if the scheduler has no
    sigmas, from ``alphas_cumprod`` at the timestep. Synchronises with the timestep's device.
    """
    one = torch.ones(1, dtype=torch.float64)
    scaled = float(scheduler.scale_model_input(one, timestep))
    if scaled != 1.0:
        return scaled, math.sqrt(1.0 - scaled * scaled)
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, torch.Tensor) and len(sigmas) >= len(scheduler.timesteps):
        sigma = float(sigmas[_step_index(scheduler, timestep)])
        signal = 1.0 / math.sqrt(1.0 + sigma * sigma)
        return signal, sigma * signal
    kept, at = scheduler.alphas_cumprod.cpu().double(), timestep_value(timestep)[0]
    below = min(int(at), len(kept) - 1)
    signal_squared = float(torch.lerp(kept[below], kept[min(below + 1, len(kept) - 1)], at - below))
    return math.sqrt(signal_squared), math.sqrt(1.0 - signal_squared)


def _step_index(scheduler: Any, timestep: Any) -> int:
    """Return the index of the current step. Schedulers do not set it before their first step."""
    for name in ("step_index", "begin_index"):
        index = getattr(scheduler, name, None)
        if index is not None:
            return int(index)
    return int((scheduler.timesteps.cpu().double() - timestep_value(timestep)[0]).abs().argmin())


def clean_and_noise(
    x: torch.Tensor, output: torch.Tensor, signal: float, noise: float, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the clean image and the noise that a denoiser's output implies for its input."""
    if prediction == "epsilon":
        if signal == 0.0:
            raise ValueError(
                "SAG cannot compute the clean image from predicted noise if the input is pure noise (zero terminal "
                "signal-to-noise ratio); use a later start"
            )
        return (x - noise * output) / signal, output
    if prediction == "sample":
        return output, (x - signal * output) / noise
    return signal * x - noise * output, noise * x + signal * output


def attended(mass: torch.Tensor, shape: tuple[int, int], threshold: float, size: tuple[int, int]) -> torch.Tensor:
    """Return a mask of tokens that receive more attention than the threshold, ``[samples, 1, *size]`` of 0 and 1.

    Args:
        mass: ``[samples, heads, tokens]``, the attention that each token receives, summed over queries.
        shape: Height and width of the token grid.
        threshold: Threshold of the mean over heads.
        size: Size of the latents, to which the mask is resized by nearest neighbours.
    """
    mask = (mass.mean(dim=1) > threshold).unflatten(1, shape)[:, None]
    return F.interpolate(mask.to(mass.dtype), size)


def blurred(x: torch.Tensor, sigma: float, kernel_size: int) -> torch.Tensor:
    """Return ``x`` blurred over its last two dimensions by a Gaussian with reflected edges."""
    if min(x.shape[-2:]) <= kernel_size // 2:
        raise ValueError(
            f"SAG.kernel_size={kernel_size} does not fit latents of {x.shape[-2]} x {x.shape[-1]}: reflection needs "
            f"more than {kernel_size // 2} pixels on a side"
        )
    rows, columns = (_matrix(length, sigma, kernel_size, x.dtype, x.device) for length in x.shape[-2:])
    return rows @ x @ columns.T


@lru_cache(maxsize=64)
def _matrix(length: int, sigma: float, taps: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return call_in_own_thread(
        lambda: blur_matrix(length, sigma, "reflect", taps=taps, dtype=dtype, device=device), device
    )


def blurred_input(
    x: torch.Tensor,
    output: torch.Tensor,
    mask: torch.Tensor,
    at: tuple[float, float],
    prediction: str,
    blur: tuple[float, int],
) -> torch.Tensor:
    """Return the input of the second call.

    Args:
        x: Input of the first call, ``[samples, channels, height, width]``. Channels that are not predicted (for
            inpainting) are unchanged.
        output: Output of the first call.
        mask: Result of :func:`attended`.
        at: Result of :func:`levels`.
        prediction: Prediction type of the output.
        blur: Sigma and number of taps of the blur.
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

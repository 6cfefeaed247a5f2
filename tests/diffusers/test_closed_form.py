# SPDX-License-Identifier: Apache-2.0
"""Guidance with a known result: the reverse SDE ``dx = [f - g^2 (gamma s - (gamma - 1) s~)] dt + g dw``.

The stock pipeline, its schedulers, ``guide``'s hooks and the guided sum are real; only the denoiser is a closed form.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import diffusers
import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.exact_denoisers import (
    ExactBlock,
    GaussianBlock,
    Line,
    MixtureBlock,
    contrast,
    degraded_score,
    draw,
    exact_pipeline,
    guided_moments,
    mixture_score,
    record_steps,
)
from tests.diffusers.slow_guidance import dense_blur
from tests.diffusers.small_pipelines import relative

SIZE = (3, 5)
MIXED = ([0.3, -0.2, 0.05], [-0.1, 0.0, 0.3])  # shifts and variance of the conditional and the unconditional mixture
JOINT = ([1.0, 1.0, 4.0], [-0.5, 2.0, 6.0])  # mean of the contrast, variances of the rest and of the halves


def scheduler(name: str, prediction: str = "epsilon", **options: Any) -> Any:
    """Return a scheduler with Stable Diffusion's noise levels, starting at the noisiest."""
    known = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    kind = getattr(diffusers, name)
    return kind(**known, timestep_spacing="trailing", prediction_type=prediction, **options)


def ddim(prediction: str) -> Any:
    return scheduler("DDIMScheduler", prediction, clip_sample=False)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_mixture() -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and weights of as many components as the grid has tokens."""
    tokens = SIZE[0] * SIZE[1]
    return normal(tokens, 2, seed=1), normal(tokens, seed=2).softmax(0)


def guided_score(x: torch.Tensor, sigma: float, spec: SEG, cfg: float) -> torch.Tensor:
    """Return ``gamma s - (gamma - 1) s~`` with classifier-free guidance, at ``[batch, tokens, channels]``."""
    means, weights = some_mixture()
    a = 1 / math.sqrt(1 + sigma**2)
    s, gamma = a * sigma, spec.scale + 1
    (shift, v), (other_shift, other_v) = ((torch.tensor(text[:-1], dtype=torch.float64), text[-1]) for text in MIXED)
    score = partial(mixture_score, a=a, s=s, means=means + shift, weights=weights, v=v)
    degraded = degraded_score(x, dense_blur(*SIZE, spec.sigma), score, a**2 * v + s**2)
    unconditional = mixture_score(x, a, s, means + other_shift, weights, other_v)
    return gamma * score(x) - (gamma - 1) * degraded + (cfg - 1) * (score(x) - unconditional)


def tokens_of(image: torch.Tensor) -> torch.Tensor:
    return image.flatten(2).transpose(1, 2)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("gamma", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("blur", [1.0, math.inf], ids=str)
@pytest.mark.parametrize("cfg", [1.0, 3.0], ids=["no cfg", "cfg"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_prediction_is_that_of_the_guided_score(prediction: str, cfg: float, blur: float, gamma: float) -> None:
    """Compares every step of an SDE sampler, up to float64 rounding."""
    spec = SEG(gamma - 1, blur)
    pipe = exact_pipeline(MixtureBlock(*some_mixture(), prediction), ddim(prediction), 3)
    made = record_steps(pipe.scheduler)
    with guide(pipe, spec, trust=[ExactBlock]) as guidance:
        draw(pipe, normal(3, 2, *SIZE), MIXED[0], MIXED[1], cfg, num_inference_steps=4, eta=1.0)
    assert [layer.fired for layer in guidance.report().layers] == [4]
    for t, (predicted, x, _) in zip(pipe.scheduler.timesteps, made, strict=True):
        sigma = pipe.unet.time_embedding.levels[t].item()
        a, x = 1 / math.sqrt(1 + sigma**2), tokens_of(x)
        s = a * sigma
        score = guided_score(x, sigma, spec, cfg)
        x0 = (x + s**2 * score) / a
        expected = {"epsilon": -s * score, "v_prediction": -a * s * score - s * x0, "sample": x0}[prediction]
        assert relative(tokens_of(predicted), expected) < 1e-12
        plain = guided_score(x, sigma, SEG(0.0, blur), cfg)
        assert relative(score, plain) > (1e-3 if sigma < 5 else 0), "the case does not detect guidance"


@pytest.mark.parametrize("gamma", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("cfg", [1.0, 3.0], ids=["no cfg", "cfg"])
def test_a_step_drifts_by_the_guided_score_and_diffuses_by_noise(cfg: float, gamma: float) -> None:
    """In ``y = x / a`` there is no f, ``g^2 dt = d(sigma^2)``, and an ancestral step is an Euler-Maruyama step."""
    spec = SEG(gamma - 1, math.inf)
    pipe = exact_pipeline(
        MixtureBlock(*some_mixture(), "v_prediction"), scheduler("EulerAncestralDiscreteScheduler", "v_prediction"), 3
    )
    made = record_steps(pipe.scheduler)
    generator, same = (torch.Generator().manual_seed(7) for _ in range(2))
    with guide(pipe, spec, trust=[ExactBlock]):
        draw(pipe, normal(3, 2, *SIZE), MIXED[0], MIXED[1], cfg, num_inference_steps=5, generator=generator, eta=0.0)
    levels = pipe.scheduler.sigmas.double().tolist()
    for (_, y, following), sigma, lower in zip(made, levels, levels[1:], strict=False):
        a = 1 / math.sqrt(1 + sigma**2)
        noise = torch.randn(y.shape, generator=same, dtype=y.dtype)
        drift = (sigma**2 - lower**2) * a * guided_score(a * tokens_of(y), sigma, spec, cfg)
        spread = lower * math.sqrt(sigma**2 - lower**2) / sigma
        assert relative(tokens_of(following - y - spread * noise), drift) < 1e-5  # the scheduler computes in float32


# Gaussian data: the guided process is linear, so its moments are known.

HEIGHT, WIDTH, CHANNELS = 1, 4, 4
MODES = {
    "contrast": contrast(HEIGHT, WIDTH) / 2,
    "whole": torch.full((4,), 0.5, dtype=torch.float64),
    "within": torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64) / math.sqrt(2),
}
ODES = {"euler": "EulerDiscreteScheduler", "heun": "HeunDiscreteScheduler", "ddim": "DDIMScheduler"}
SDES = {
    "euler ancestral": ("EulerAncestralDiscreteScheduler", {}, "epsilon", 1.5),
    "ddim, eta 1": ("DDIMScheduler", {"clip_sample": False}, "v_prediction", 1.0),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "sample", 1.5),
}
SCALE = 1.0


def lines(mode: str, scale: float, cfg: float) -> list[Line]:
    """Return the Gaussians of a mode, with the weight of each score in the guided score."""
    (mean, rest, half), (other_mean, other_rest, other_half) = JOINT
    length = 2.0 if mode == "contrast" else 0.0
    of_half = mode != "within"
    return [
        Line(length * mean, half if of_half else rest, cfg + scale),
        Line(length * other_mean, other_half if of_half else other_rest, 1 - cfg),
        Line(length * mean, half if mode == "whole" else rest, -scale),
    ]


def expected_moments(pipe: Any, mode: str, cfg: float, random: bool) -> tuple[float, float]:
    sigma = pipe.unet.time_embedding.levels[-1].item()
    # Latents that are scaled to the noise level begin as pure noise, others as x with variance 1.
    begin = sigma**2 if hasattr(pipe.scheduler, "sigmas") and pipe.scheduler.init_noise_sigma > 1 else sigma**2 + 1
    return guided_moments(lines(mode, SCALE, cfg), sigma, begin, random)


def test_the_moments_themselves() -> None:
    """Checks the integrator with a known formula: v = 4, v~ = 1, gamma = 2, starting far away."""
    (mean, variance), far = guided_moments(lines("contrast", 1.0, 1.0), 1e4, 1e8, random=False), 1e-3
    assert variance == pytest.approx(4**2 / 1, rel=far)  # v^gamma / v~^(gamma - 1)
    assert mean == pytest.approx(2.0, rel=far)  # twice the pixels' mean: the contrast has length 2
    # For the SDE: v^4 / v~^2 times the integral of (v~ + u)^2 / (v + u)^4 over u = sigma^2, here 7 / 64 of it.
    _, variance = guided_moments(lines("contrast", 1.0, 1.0), 1e4, 1e8, random=True)
    assert variance == pytest.approx(256 * (1 / 4 - 3 / 16 + 3 / 64), rel=far)
    for mode in ("whole", "within"):  # the degraded score equals the score, so guidance has no effect
        _, variance = guided_moments(lines(mode, 1.0, 1.0), 1e4, 1e8, random=True)
        assert variance == pytest.approx(lines(mode, 1.0, 1.0)[0].variance, rel=far)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("cfg", [1.0, 1.5], ids=["no cfg", "cfg"])
@pytest.mark.parametrize("sampler", ODES)
def test_ode_samplers_tend_to_the_guided_probability_flow(sampler: str, cfg: float) -> None:
    """A run is affine in its noise, so the results for 0 and for each mode define its moments without sampling."""
    options = {"clip_sample": False} if sampler == "ddim" else {}
    pipe = exact_pipeline(GaussianBlock(CHANNELS, "epsilon"), scheduler(ODES[sampler], **options), 3)
    latents = torch.stack([torch.zeros(4, dtype=torch.float64), *MODES.values()])[:, None, None].expand(-1, 4, 1, -1)
    exact = {mode: expected_moments(pipe, mode, cfg, random=False) for mode in MODES}
    errors: dict[tuple[str, str], list[float]] = {}
    for steps in (50, 100, 200):
        with guide(pipe, SEG(SCALE, math.inf), trust=[ExactBlock]):
            made = draw(pipe, latents, *JOINT, cfg, num_inference_steps=steps)[:, 0, 0]
        for place, (mode, direction) in enumerate(MODES.items()):
            mean, variance = exact[mode]
            gain = ((made[1 + place] - made[0]) @ direction).item()
            errors.setdefault((mode, "mean"), []).append((made[0] @ direction).item() - mean)
            errors.setdefault((mode, "variance"), []).append(gain**2 / variance - 1)
    for (mode, moment), values in errors.items():
        if moment == "mean" and mode != "contrast":
            assert max(map(abs, values)) < 1e-6  # it is 0 and remains 0
            continue
        assert abs(values[1]) < 0.65 * abs(values[0]), (mode, moment, values)
        assert abs(values[2]) < 0.65 * abs(values[1]), (mode, moment, values)
        assert abs(values[2]) < 0.02, (mode, moment, values)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sampler", SDES)
def test_sde_samplers_tend_to_the_guided_sde(sampler: str) -> None:
    """Up to 4 standard errors, doubling the steps reduces the error, and the error is at most the last change.

    The number of steps divides 1000. Otherwise DDIM steps to a noise level that is not its next one.
    """
    name, options, prediction, cfg = SDES[sampler]
    pipe = exact_pipeline(GaussianBlock(CHANNELS, prediction), scheduler(name, prediction, **options), 3)
    eta = {"eta": 1.0} if sampler == "ddim, eta 1" else {}
    count = 1500
    estimates: dict[tuple[str, str], list[tuple[float, float]]] = {}  # value and its standard error
    for steps in (25, 50, 100):
        with guide(pipe, SEG(SCALE, math.inf), trust=[ExactBlock]):
            made = draw(
                pipe,
                normal(count, CHANNELS, HEIGHT, WIDTH, seed=steps),
                *JOINT,
                cfg,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(steps + 1),
                **eta,
            )[:, :, 0]
        for mode, direction in MODES.items():
            values, number = made @ direction, count * CHANNELS
            mean, variance = values.mean().item(), values.var().item()
            estimates.setdefault((mode, "mean"), []).append((mean, math.sqrt(variance / number)))
            estimates.setdefault((mode, "variance"), []).append((variance, variance * math.sqrt(2 / number)))
    for (mode, moment), ((first, e1), (second, e2), (third, e3)) in estimates.items():
        mean, variance = expected_moments(pipe, mode, cfg, random=True)
        exact = mean if moment == "mean" else variance
        left = [abs(value - exact) for value in (first, second, third)]
        case = (mode, moment, exact, first, second, third)
        assert left[1] < 0.7 * left[0] + 4 * math.hypot(e1, e2), case
        assert left[2] < 0.7 * left[1] + 4 * math.hypot(e2, e3), case
        assert left[2] < abs(third - second) + 4 * math.hypot(e2, e3), case
        assert left[2] < 0.1 * math.sqrt(variance) * (1 if moment == "mean" else math.sqrt(variance)), case

# SPDX-License-Identifier: Apache-2.0
"""Guidance under ODE and SDE samplers, for all prediction types, and under samplers that call the denoiser twice."""

from __future__ import annotations

import copy
import math
from functools import lru_cache
from typing import Any

import diffusers
import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.slow_guidance import looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline, tiny_sd

# KDPM2's set_timesteps makes NumPy warn about torch tensors.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

EVERY = ("epsilon", "v_prediction", "sample")

# Name -> class, prediction types, options, and additional arguments of a run.
SAMPLERS: dict[str, tuple[str, tuple[str, ...], dict[str, Any], dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", EVERY, {}, {}),
    "euler ancestral": ("EulerAncestralDiscreteScheduler", EVERY[:2], {}, {}),
    "ddim": ("DDIMScheduler", EVERY, {"clip_sample": False}, {}),
    "ddim, eta 1": ("DDIMScheduler", EVERY, {"clip_sample": False}, {"eta": 1.0}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", EVERY, {}, {}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", EVERY, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "heun": ("HeunDiscreteScheduler", EVERY, {}, {}),
    "pndm": ("PNDMScheduler", EVERY[:2], {"skip_prk_steps": True}, {}),
    "lcm": ("LCMScheduler", EVERY, {}, {}),
}
DRAWS_NOISE = {"euler ancestral", "ddim, eta 1", "dpm++ 2m sde", "lcm"}
FORWARDS = {"heun": 5, "pndm": 4}  # calls in a run of 3 steps; the other samplers have one per step
TWICE = ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]

CASES = [(sampler, prediction) for sampler, (_, known, _, _) in SAMPLERS.items() for prediction in known]
STEPS = 3


@lru_cache(maxsize=4)
def networks(model: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the networks of a pipeline in this dtype."""
    parts = (tiny_pipeline() if model == "sdxl" else tiny_sd()).components
    modules = {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}
    return {name: copy.deepcopy(module).to(dtype) for name, module in modules.items()}


def sampled_pipeline(model: str, kind: Any, prediction: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Return a tiny pipeline, ``"sd"`` or ``"sdxl"``, whose scheduler assumes this prediction type."""
    pipe = tiny_pipeline() if model == "sdxl" else tiny_sd()
    for name, module in networks(model, dtype).items():
        setattr(pipe, name, module)
    pipe.scheduler = kind.from_config(pipe.scheduler.config, prediction_type=prediction, **options)
    return pipe


def pipeline(model: str, sampler: str, prediction: str, dtype: torch.dtype = torch.float32) -> Any:
    kind, _, options, _ = SAMPLERS[sampler]
    return sampled_pipeline(model, getattr(diffusers, kind), prediction, dtype, **options)


def sample(pipe: Any, latents: torch.Tensor, cfg: float, seed: int = 0, **arguments: Any) -> torch.Tensor:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": cfg, **arguments}
    return run(pipe, latents=latents, generator=torch.Generator().manual_seed(seed), **arguments)


def distance(model: str, sampler: str, prediction: str, dtype: torch.dtype, spec: SEG, cfg: float) -> float:
    """Return the distance between a guided run and the slow computation."""
    pipe = pipeline(model, sampler, prediction, dtype)
    latents, arguments = noise(1, 12, 16).to(dtype), SAMPLERS[sampler][3]
    with guide(pipe, spec) as guidance:
        output = sample(pipe, latents, cfg, **arguments)
    assert output.dtype == dtype
    expected = looped_run(pipe, [spec], latents=latents, num_inference_steps=STEPS, guidance_scale=cfg, **arguments)
    report = guidance.report()
    assert report.forwards == FORWARDS.get(sampler, STEPS)
    for layer in report.layers:
        assert layer.fired == report.forwards
        assert layer.moved is not None
        assert layer.moved > 1e-3
    assert relative(sample(pipe, latents, cfg, **arguments), expected) > 1e-3, "the case does not detect guidance"
    return relative(output, expected)


@pytest.mark.one_in(7)
@pytest.mark.parametrize("cfg", [5.0, 1.0], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("sampler, prediction", CASES, ids=map(" - ".join, CASES))
def test_guided_runs_are_those_of_a_loop_of_its_own(sampler: str, prediction: str, cfg: float) -> None:
    """In float64, two correct ways differ by much less than any mistake would cause."""
    spec = SEG(2.0, 1.0) if cfg > 1.0 else SEG(2.0, math.inf)
    assert distance("sd", sampler, prediction, torch.float64, spec, cfg) < 1e-11


@pytest.mark.one_in(4)
@pytest.mark.parametrize("sampler, sigma", [(name, (1.0, math.inf)[i % 2]) for i, name in enumerate(SAMPLERS)])
def test_in_float32_they_differ_by_rounding(sampler: str, sigma: float) -> None:
    assert distance("sdxl", sampler, "epsilon", torch.float32, SEG(2.0, sigma), 5.0) < PIPELINE_TOLERANCE


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sde_samplers_draw_noise_and_the_others_do_not(sampler: str) -> None:
    """Checks that the table's SDE samplers are such: a guided run that ignored its generator would pass otherwise."""
    pipe, arguments = pipeline("sd", sampler, "epsilon"), SAMPLERS[sampler][3]
    with guide(pipe, SEG(2.0, 1.0)):
        first, second = (sample(pipe, noise(), 5.0, seed, **arguments) for seed in (1, 2))
    assert (relative(first, second) > 1e-2) == (sampler in DRAWS_NOISE)


@pytest.mark.parametrize("sampler", [name for name, (_, known, _, _) in SAMPLERS.items() if known != EVERY])
def test_what_a_case_leaves_out_the_scheduler_refuses(sampler: str) -> None:
    pipe = pipeline("sd", sampler, "sample")
    with guide(pipe, SEG()), pytest.raises((NotImplementedError, ValueError), match="prediction_type"):
        sample(pipe, noise(), 1.0)


def guided_calls(pipe: Any, spec: SEG, steps: int) -> tuple[torch.Tensor, list[bool]]:
    """Return latents of a run, and for each denoiser call whether it had a perturbed branch."""
    calls: list[bool] = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda module, args, output: calls.append(len(output) == 3))
    with guide(pipe, spec):
        output = sample(pipe, noise(), 5.0, num_inference_steps=steps)
    handle.remove()
    return output, calls


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind, steps", [(TWICE[0], 3), (TWICE[0], 4), (TWICE[1], 3), (TWICE[2], 3)])
def test_both_calls_of_a_step_are_guided_or_neither(kind: str, steps: int) -> None:
    pipe = sampled_pipeline("sd", getattr(diffusers, kind), "epsilon")
    for start, stop in [(0.0, 0.5), (0.5, 1.0)]:
        spec = SEG(2.0, 1.0, start=start, stop=stop)
        inside = [start <= step / steps < stop for step in range(steps)]
        output, calls = guided_calls(pipe, spec, steps)
        assert calls == [inside[call // 2] for call in range(2 * steps - 1)]
        expected = looped_run(pipe, [spec], latents=noise(), num_inference_steps=steps)
        assert relative(output, expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("reuse, start", [(2, 0.0), (3, 0.2)])
def test_a_branch_serves_steps_and_not_calls(reuse: int, start: float) -> None:
    """A corrector that reused its predictor's difference would correct nothing."""
    pipe, steps = sampled_pipeline("sd", diffusers.HeunDiscreteScheduler, "epsilon"), 5
    first = math.ceil(start * steps)
    spec = SEG(2.0, 1.0, reuse=reuse, start=start)
    computes = [step >= first and (step - first) % reuse == 0 for step in range(steps)]
    output, calls = guided_calls(pipe, spec, steps)
    assert calls == [computes[call // 2] for call in range(2 * steps - 1)]
    expected = looped_run(pipe, [spec], latents=noise(), num_inference_steps=steps)
    assert relative(output, expected) < PIPELINE_TOLERANCE


def test_a_run_that_starts_late_counts_its_own_steps() -> None:
    """Image to image under Heun begins with a predictor, at any starting step."""
    pipe = sampled_pipeline("sd", diffusers.HeunDiscreteScheduler, "epsilon")
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    calls: list[bool] = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda module, args, output: calls.append(len(output) == 3))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with guide(pipe, SEG(2.0, 1.0, stop=0.5)):
        pipe("a red fox", image=image, strength=0.6, num_inference_steps=5, output_type="latent")
    handle.remove()
    assert calls == [True] * 4 + [False]  # three of five steps are left, of which the first two begin before the middle

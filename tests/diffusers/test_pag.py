# SPDX-License-Identifier: Apache-2.0
"""Perturbed-Attention Guidance on stock pipelines equals diffusers' own PAG pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline

from segkern.integrations.diffusers import PAG, guide
from tests.compatibility import proves
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline, tiny_sd

MODELS = {"SDXL": (tiny_pipeline, StableDiffusionXLPAGPipeline), "SD 1": (tiny_sd, StableDiffusionPAGPipeline)}

PROVED = [
    pytest.param("SDXL", marks=proves(model="Stable Diffusion XL")),
    pytest.param("SD 1", marks=proves(model="Stable Diffusion 1")),
]


def theirs(
    model: str, layers: str | list[str], scale: float, adaptive: float, parts: Any = None, **arguments: Any
) -> torch.Tensor:
    make, kind = MODELS[model]
    pipe = make(kind, **(parts or {}))
    pipe.set_pag_applied_layers(layers)
    original = dict(pipe.unet.attn_processors)
    try:
        return run(pipe, pag_scale=scale, pag_adaptive_scale=adaptive, **arguments)
    finally:
        pipe.unet.set_attn_processor(original)


@pytest.mark.one_in(5)
@proves(task="text to image", guidance="PAG")
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "without CFG"])
@pytest.mark.parametrize(
    ("layers", "share"), [("mid", True), ("mid", False), ("up", True), (["down", "mid"], True)], ids=str
)
@pytest.mark.parametrize("model", PROVED)
def test_it_is_that_of_the_pipelines_with_pag(
    model: str, layers: str | list[str], guidance_scale: float, share: bool
) -> None:
    """Compares with latents of diffusers' own PAG pipelines."""
    arguments = {"latents": noise(2, 8, 12), "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    pipe = MODELS[model][0]()
    with guide(pipe, PAG(scale=2.5, layers=layers), share=share):
        ours = run(pipe, **arguments)
    expected = theirs(model, layers, 2.5, 0.0, **arguments)
    assert relative(ours, expected) < PIPELINE_TOLERANCE
    assert relative(ours, run(pipe, **arguments)) > 1e-3


@pytest.mark.one_in(3)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "without CFG"])
@pytest.mark.parametrize("model", MODELS)
def test_the_adaptive_scale_is_theirs(model: str, guidance_scale: float) -> None:
    """In the last of four steps the scale is cut to 0, where diffusers computes an unused branch."""
    arguments = {"latents": noise(1, 8, 12), "guidance_scale": guidance_scale, "num_inference_steps": 4}
    pipe = MODELS[model][0]()
    with guide(pipe, PAG(scale=3.0, adaptive_scale=0.0035)) as guidance:
        ours = run(pipe, **arguments)
    assert relative(ours, theirs(model, "mid", 3.0, 0.0035, **arguments)) < PIPELINE_TOLERANCE
    assert relative(ours, theirs(model, "mid", 3.0, 0.0, **arguments)) > 1e-4
    assert all(row.fired < 4 for row in guidance.report().layers)


def test_rescaled_guidance_is_theirs() -> None:
    arguments = {"latents": noise(1, 8, 12), "guidance_rescale": 0.7}
    pipe = tiny_pipeline()
    with guide(pipe, PAG(scale=3.0)):
        ours = run(pipe, **arguments)
    assert relative(ours, theirs("SDXL", "mid", 3.0, 0.0, **arguments)) < PIPELINE_TOLERANCE


def test_a_scheduler_that_scales_its_latents() -> None:
    arguments = {"latents": noise(1, 8, 12), "num_inference_steps": 3}
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    pipe = tiny_sd(scheduler=scheduler)
    with guide(pipe, PAG(scale=3.0)):
        ours = run(pipe, **arguments)
    expected = theirs("SD 1", "mid", 3.0, 0.0, {"scheduler": scheduler}, **arguments)
    assert relative(ours, expected) < PIPELINE_TOLERANCE

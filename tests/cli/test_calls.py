# SPDX-License-Identifier: Apache-2.0
"""Arguments of pipelines' calls: every pipeline receives the request under its own parameter names."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from segkern.generation.calls import (
    call_arguments,
    check_text_guidance,
    default_guidance_scale,
    needs_image,
    step_callback,
)
from segkern.generation.drawing import ImageRequest
from tests.diffusers.small_pipelines import tiny_pipeline
from tests.diffusers.transformer_cases import MODELS

SIZE = {"width": 64, "height": 48, "num_inference_steps": 3}


def request(scale: float = 4.0, negative: str = "") -> ImageRequest:
    return ImageRequest("a fox", negative, 64, 48, 1, 3, scale)


def test_a_unet_receives_its_usual_arguments() -> None:
    pipe = tiny_pipeline()
    assert call_arguments(pipe, request()) == {**SIZE, "guidance_scale": 4.0}
    assert call_arguments(pipe, request(negative="blue")) == {**SIZE, "guidance_scale": 4.0, "negative_prompt": "blue"}


@pytest.mark.parametrize(
    "name, scale, expected",
    [
        ("sd3", 4.0, {"guidance_scale": 4.0}),
        ("flux", 4.0, {"true_cfg_scale": 4.0, "negative_prompt": ""}),
        ("flux", 1.0, {"true_cfg_scale": 1.0}),
        ("qwen-image", 4.0, {"true_cfg_scale": 4.0, "negative_prompt": ""}),
        ("z-image", 4.0, {"guidance_scale": 3.0}),
        ("z-image", 1.0, {"guidance_scale": 0.0}),
        ("chroma", 4.0, {"guidance_scale": 4.0}),
        ("flux2-klein", 4.0, {"guidance_scale": 4.0}),
        ("lumina2", 1.0, {"guidance_scale": 1.0}),
        ("pixart-sigma", 4.0, {"guidance_scale": 4.0, "use_resolution_binning": False}),
        ("hunyuan-dit", 4.0, {"guidance_scale": 4.0, "use_resolution_binning": False}),
    ],
)
def test_transformers_receive_cfg_under_their_own_names(name: str, scale: float, expected: dict[str, Any]) -> None:
    assert call_arguments(MODELS[name].build(), request(scale)) == SIZE | expected


@pytest.mark.parametrize(
    "name, scale", [("sd3", 7.0), ("flux", 1.0), ("qwen-image", 4.0), ("z-image", 6.0), ("chroma", 5.0)]
)
def test_the_default_cfg_scale_gives_the_default_arguments(name: str, scale: float) -> None:
    pipe = MODELS[name].build()
    assert default_guidance_scale(pipe) == scale
    defaults = inspect.signature(type(pipe).__call__).parameters
    for parameter, value in call_arguments(pipe, request(scale)).items():
        if parameter in ("guidance_scale", "true_cfg_scale"):
            assert value == defaults[parameter].default


def flux2(kind: str, **settings: Any) -> Any:
    klein = MODELS["flux2-klein"].build()
    return getattr(diffusers, kind)(**klein.components, **settings)


@pytest.mark.parametrize(
    ("kind", "settings"), [("Flux2Pipeline", {}), ("Flux2KleinPipeline", {"is_distilled": True})], ids=["dev", "klein"]
)
def test_pipelines_without_cfg_receive_no_scale(kind: str, settings: dict[str, Any]) -> None:
    """Flux.2's ``guidance_scale`` is an input of the model; a distilled Klein ignores it."""
    pipe = flux2(kind, **settings)
    assert default_guidance_scale(pipe) == 1.0
    assert call_arguments(pipe, request(1.0)) == SIZE
    with pytest.raises(ValueError, match=f"CFG scale must be 1, because this {type(pipe).__name__} has no .*, got 4"):
        check_text_guidance(pipe, 4.0, "", ("CFG scale", "Negative prompt"))
    with pytest.raises(ValueError, match=r"Negative prompt must be empty, because a Flux2.* accepts none, got 'blue'"):
        check_text_guidance(pipe, 1.0, "blue", ("CFG scale", "Negative prompt"))


def test_flux_kontext_keeps_the_requested_size() -> None:
    pipe = diffusers.FluxKontextPipeline(**MODELS["flux"].build().components)
    assert call_arguments(pipe, request(1.0))["max_area"] == 64 * 48


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("flux2-klein", "Flux2KleinPipeline", False),
        ("flux2-klein", "Flux2Pipeline", False),
        ("flux", "FluxKontextPipeline", False),
        ("flux", "FluxPipeline", False),
        ("flux", "FluxImg2ImgPipeline", True),
        ("chroma", "ChromaImg2ImgPipeline", True),
        ("sd3", "StableDiffusion3InpaintPipeline", True),
    ],
)
def test_pipelines_that_need_an_image_are_recognised(name: str, kind: str, expected: bool) -> None:
    parts = MODELS[name].build().components
    assert needs_image(getattr(diffusers, kind)(**parts)) == expected


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])
def test_every_step_is_reported(name: str) -> None:
    case = MODELS[name]
    pipe, steps = case.build(), []

    def on_step(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        steps.append(index)
        return tensors

    given = case.call(6, 4, 1, True) | {"height": 96, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    pipe(**given, generator=torch.Generator().manual_seed(5), **step_callback(pipe, on_step))
    assert steps == [0, 1, 2]

# SPDX-License-Identifier: Apache-2.0
"""Arguments of a pipeline's call, under the names that the pipeline has for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from segkern.generation.drawing import ImageRequest


def call_parameters(pipe: Any) -> frozenset[str]:
    """Return the names of the parameters of a pipeline's call."""
    return frozenset(inspect.signature(type(pipe).__call__).parameters)


def execution_device(pipe: Any) -> torch.device:
    """Return the device on which a pipeline computes. The weights can be on another device until they are needed."""
    device: torch.device = getattr(pipe, "_execution_device", pipe.device)
    return device


def needs_image(pipe: Any) -> bool:
    """Return True if a pipeline's call requires an input image.

    Most pipelines that require an image have a call with ``image=None``, so the default does not say. The input is
    optional if diffusers lists the pipeline for text-to-image, as it does Flux.2's, and the pipeline has no ControlNet.
    """
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    optional = type(pipe) in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values() and not hasattr(pipe, "controlnet")
    return "image" in call_parameters(pipe) and not optional


def has_cfg(pipe: Any) -> bool:
    """Return True if a pipeline can apply classifier-free guidance (CFG).

    A distilled Flux.2 Klein ignores the scale of CFG. Flux.2's ``guidance_scale`` is an input of the model.
    """
    if getattr(getattr(pipe, "config", None), "is_distilled", False):
        return False
    return any(name.startswith("negative_prompt") for name in call_parameters(pipe))


def check_text_guidance(pipe: Any, scale: float, negative_prompt: str, names: tuple[str, str]) -> None:
    """Raise a ValueError if a pipeline does not support a CFG scale or a negative prompt.

    Args:
        pipe: Pipeline that generates images, with or without weights.
        scale: CFG scale.
        negative_prompt: Negative prompt.
        names: Names of the two settings in error messages.
    """
    kind = type(pipe).__name__
    if scale > 1.0 and not has_cfg(pipe):
        raise ValueError(f"{names[0]} must be 1, because this {kind} has no classifier-free guidance, got {scale:g}")
    if negative_prompt and "negative_prompt" not in call_parameters(pipe):
        raise ValueError(f"{names[1]} must be empty, because a {kind} accepts none, got {negative_prompt!r}")


def call_arguments(pipe: Any, request: ImageRequest) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for a request, without the prompt, generator and callback.

    Pipelines define the scale of classifier-free guidance (CFG) in different ways. A request's scale always means
    ``u + scale (c - u)``: 1 is no CFG. Flux and Qwen-Image call it ``true_cfg_scale`` and also need a negative prompt.
    Z-Image computes ``c + scale (c - u)``, so its scale is smaller by 1. Pipelines without CFG get no scale.

    Args:
        pipe: Pipeline that generates images, with or without weights.
        request: Image to generate.
    """
    from diffusers import ZImagePipeline

    parameters = call_parameters(pipe)
    arguments: dict[str, Any] = {}
    scale = request.guidance_scale
    if request.negative_prompt or ("true_cfg_scale" in parameters and scale > 1):
        arguments["negative_prompt"] = request.negative_prompt
    arguments |= {"width": request.width, "height": request.height, "num_inference_steps": request.steps}
    if not has_cfg(pipe):
        pass  # its guidance_scale, if any, is not the scale of CFG
    elif "true_cfg_scale" in parameters:
        arguments["true_cfg_scale"] = scale
    elif isinstance(pipe, ZImagePipeline):
        arguments["guidance_scale"] = max(0.0, scale - 1.0)
    else:
        arguments["guidance_scale"] = scale
    if "use_resolution_binning" in parameters:  # it would change the requested size
        arguments["use_resolution_binning"] = False
    if "max_area" in parameters:  # so would this
        arguments["max_area"] = request.width * request.height
    return arguments


def default_guidance_scale(pipe: Any) -> float:
    """Return a pipeline's default CFG scale, in the convention of requests; 1 without CFG."""
    from diffusers import ZImagePipeline

    if not has_cfg(pipe):
        return 1.0
    parameters = inspect.signature(type(pipe).__call__).parameters
    name = "true_cfg_scale" if "true_cfg_scale" in parameters else "guidance_scale"
    return float(parameters[name].default) + isinstance(pipe, ZImagePipeline)


def step_callback(pipe: Any, on_step: Callable[..., Any]) -> dict[str, Any]:
    """Return the argument of a pipeline's call that runs ``on_step``, a ``callback_on_step_end``, after every step.

    PixArt's pipelines have an older interface for it.
    """
    if "callback_on_step_end" in call_parameters(pipe):
        return {"callback_on_step_end": on_step}
    return {"callback": lambda index, timestep, latents: on_step(pipe, index, timestep, {"latents": latents})}

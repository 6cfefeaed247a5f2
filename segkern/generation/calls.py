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


def call_arguments(pipe: Any, request: ImageRequest) -> dict[str, Any]:
    """Return the arguments of a pipeline's call for a request, without the prompt, generator and callback.

    Pipelines define the scale of classifier-free guidance (CFG) in different ways. A request's scale always means
    ``u + scale (c - u)``: 1 is no CFG. Flux and Qwen-Image call it ``true_cfg_scale`` and also need a negative prompt.
    Z-Image computes ``c + scale (c - u)``, so its scale is smaller by 1.

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
    if "true_cfg_scale" in parameters:
        arguments["true_cfg_scale"] = scale
    elif isinstance(pipe, ZImagePipeline):
        arguments["guidance_scale"] = max(0.0, scale - 1.0)
    else:
        arguments["guidance_scale"] = scale
    if "use_resolution_binning" in parameters:  # it would change the requested size
        arguments["use_resolution_binning"] = False
    return arguments


def default_guidance_scale(pipe: Any) -> float:
    """Return a pipeline's default CFG scale, in the convention of requests."""
    from diffusers import ZImagePipeline

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

# SPDX-License-Identifier: Apache-2.0
"""Pipelines without weights, UNets' and transformers' alike, from configuration files alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from segkern.generation import loading
from segkern.generation.loading import Source

# Of pipelines that neither say a size nor have a model that does.
_PIXELS = 1024


def outline(source: Source) -> Any:
    """What ``list_layers`` takes like a pipeline: the denoiser on PyTorch's meta device and what a VAE's size tells.

    Raises:
        OSError: when configuration files are missing or cannot be fetched.
        ValueError: when diffusers does not have a class that they name.
    """
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(source.config)
    except OSError:
        return loading.outline(source)  # which says what is missing
    if _class(index, "unet") is not None and _class(index, "unet") != "UNetMotionModel":
        return loading.outline(source)
    if _class(index, "unet") is None and _class(index, "transformer") is None:
        return loading.outline(source)
    kind = _find(source, index["_class_name"])
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: None for name in list(taken)[1:] if taken[name].default is inspect.Parameter.empty}
    parts |= {name: _part(source, index, name) for name in ("unet", "transformer", "vae") if name in taken}
    quiet: dict[str, Any] = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    return kind(**parts, **quiet)


def image_size(pipe: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels: the ones asked for, else the pipeline's own.

    Args:
        pipe: a pipeline or an outline.
        width: asked for.
        height: asked for.

    Raises:
        ValueError: for a size that the pipeline cannot draw; the message quotes it.
    """
    if getattr(pipe, "unet", None) is not None:
        return loading.image_size(pipe, width, height)
    from segkern.integrations.diffusers.models.layers import pixels

    latent, side = pixels(pipe)
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value <= 0 or value % side):
            below = max(side, value // side * side)
            raise ValueError(f"--{name} must be a positive multiple of {side}, such as {below}, got {value}")
    own = getattr(pipe, "default_sample_size", None) or getattr(pipe.transformer.config, "sample_size", None)
    own = own * latent if isinstance(own, int) else _PIXELS
    return width or _default(pipe, "width") or own, height or _default(pipe, "height") or own


def video_frames(pipe: Any, frames: int | None) -> int | None:
    """Pictures in a video: those asked for, else the pipeline's own number; None of a pipeline for single pictures.

    Raises:
        ValueError: for a number that is not positive, or of such a pipeline.
    """
    own = _default(pipe, "num_frames")
    if frames is not None and (own is None or frames <= 0):
        reason = (
            f"a positive number, got {frames}" if own is not None else f"a pipeline for videos, got --frames {frames}"
        )
        raise ValueError(f"--frames needs {reason}")
    return frames or own


def _default(pipe: Any, argument: str) -> int | None:
    """Of an argument of a pipeline's call, where it is a number."""
    taken = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    value = taken[argument].default if argument in taken else None
    return value if isinstance(value, int) else None


def _class(index: dict[str, Any], part: str) -> str | None:
    """The class of a component, as the pipeline's own configuration has it."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, (list, tuple)) else None


def _part(source: Source, index: dict[str, Any], name: str) -> Any:
    """A component on PyTorch's meta device; None where the pipeline has none."""
    kind = _class(index, name)
    if kind is None:
        return None
    found = _find(source, kind)
    config = found.load_config(source.config, subfolder=name)
    with torch.device("meta"):
        return found.from_config(config)


def _find(source: Source, name: str) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"{source.name!r} has a {name}, which diffusers {diffusers.__version__} does not have")
    return found

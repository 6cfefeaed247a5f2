# SPDX-License-Identifier: Apache-2.0
"""Width, height and number of frames that a pipeline draws."""

from __future__ import annotations

import inspect
from typing import Any

_UNET_LATENTS = 64  # of a UNet whose configuration names no size
_TRANSFORMER_PIXELS = 1024  # of a pipeline whose transformer names none


def image_size(pipe: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels: the ones asked for, else the pipeline's own.

    Args:
        pipe: a pipeline, with or without weights.
        width: asked for.
        height: asked for.

    Raises:
        ValueError: for a size that the pipeline cannot draw; the message quotes it.
    """
    unet = getattr(pipe, "unet", None)
    if unet is not None:
        factor, multiple = pipe.vae_scale_factor, max(8, pipe.vae_scale_factor)  # diffusers takes no other size
    else:
        from segkern.integrations.diffusers.models.layers import pixels

        factor, multiple = pixels(pipe)
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value <= 0 or value % multiple):
            below = max(multiple, value // multiple * multiple)
            raise ValueError(f"{name} must be a positive multiple of {multiple}, such as {below}, got {value}")
    sample = getattr(pipe, "default_sample_size", None)
    if sample is None:
        sample = getattr((unet if unet is not None else pipe.transformer).config, "sample_size", None)
    if sample is None:
        sample = _UNET_LATENTS if unet is not None else _TRANSFORMER_PIXELS // factor
    own_height, own_width = (sample, sample) if isinstance(sample, int) else sample
    return (
        width or _default(pipe, "width") or own_width * factor,
        height or _default(pipe, "height") or own_height * factor,
    )


def video_frames(pipe: Any, frames: int | None) -> int | None:
    """Pictures in a video: those asked for, else the pipeline's own number; None of a pipeline for single pictures.

    Raises:
        ValueError: for a number that is not positive, or of such a pipeline.
    """
    own = _default(pipe, "num_frames")
    if frames is not None and own is None:
        raise ValueError(f"frames are of pipelines for videos, got {frames} for a {type(pipe).__name__}")
    if frames is not None and frames <= 0:
        raise ValueError(f"frames must be a positive number, got {frames}")
    return frames or own


def _default(pipe: Any, argument: str) -> int | None:
    """The default of an argument of the pipeline's call, where it is a number."""
    parameters = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    value = parameters[argument].default if argument in parameters else None
    return value if isinstance(value, int) else None

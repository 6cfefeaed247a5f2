# SPDX-License-Identifier: Apache-2.0
"""Width, height and number of frames of the images that a pipeline generates."""

from __future__ import annotations

import inspect
from typing import Any

_UNET_LATENTS = 64  # sample size if a UNet's configuration has none
_TRANSFORMER_PIXELS = 1024  # image size if a transformer's configuration has none


def image_size(pipe: Any, width: int | None, height: int | None, *, prefix: str = "") -> tuple[int, int]:
    """Return the width and height of an image in pixels.

    Args:
        pipe: Pipeline, with or without weights.
        width: Requested width; None for the pipeline's default.
        height: Requested height; None for the pipeline's default.
        prefix: Prefix of ``width`` and ``height`` in error messages, such as ``--``.

    Raises:
        ValueError: If the pipeline cannot generate the requested size.
    """
    unet = getattr(pipe, "unet", None)
    if unet is not None:
        factor, multiple = pipe.vae_scale_factor, max(8, pipe.vae_scale_factor)  # diffusers requires multiples of 8
    else:
        from segkern.integrations.diffusers.models.layers import pixels

        factor, multiple = pixels(pipe)
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value <= 0 or value % multiple):
            below = max(multiple, value // multiple * multiple)
            raise ValueError(f"{prefix}{name} must be a positive multiple of {multiple}, such as {below}, got {value}")
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
    """Return the number of frames of a video, or None if the pipeline generates single images.

    Args:
        pipe: Pipeline, with or without weights.
        frames: Requested number; None for the pipeline's default.

    Raises:
        ValueError: If the number is not positive, or if it is given for a pipeline that generates single images.
    """
    own = _default(pipe, "num_frames")
    if frames is not None and own is None:
        raise ValueError(f"--frames {frames} needs a video pipeline, got {type(pipe).__name__}")
    if frames is not None and frames <= 0:
        raise ValueError(f"--frames must be a positive number, got {frames}")
    return frames or own


def _default(pipe: Any, argument: str) -> int | None:
    """Return the default of an argument of the pipeline's call, or None if it is not an integer."""
    parameters = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    value = parameters[argument].default if argument in parameters else None
    return value if isinstance(value, int) else None

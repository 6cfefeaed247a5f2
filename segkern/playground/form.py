# SPDX-License-Identifier: Apache-2.0
"""The page's fields, checked and turned into a request and its guidance; every error quotes the field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from segkern.generation.drawing import ImageRequest, Specs, check_layers
from segkern.generation.options import GUIDANCES, guidance_scales, make_specs
from segkern.generation.sizes import image_size

_LARGEST_SEED = 2**32 - 1
_MOST_STEPS = 1000  # the noise levels that models are trained with; the scheduler's tables grow with the number
_MOST_PIXELS = 16  # times the model's own number of pixels, so that a slip does not fill the machine's memory
_SIZE = re.compile(r"\s*(-?\d+)\s*[x×*]\s*(-?\d+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """The checked fields.

    Attributes:
        request: whatever the guidance.
        specs: the guidance, at least one.
        layers: whose energy is mapped; none if that was not asked for.
        unshared: whether to time guidance with a branch computed in full, too.
    """

    request: ImageRequest
    specs: Specs
    layers: tuple[str, ...]
    unshared: bool


def read(fields: Mapping[str, Any], pipe: Any, device: torch.device, dtype: torch.dtype) -> Settings:
    """Check every field.

    Args:
        fields: values as the page has them (texts, numbers, nothing) by the names of ``layout.Controls.fields``.
        pipe: that draws, with or without weights.
        device: that it is on.
        dtype: of its weights.

    Raises:
        ValueError: for the first field that does not fit; the message quotes it.
    """
    from segkern.integrations.diffusers.models.layers import list_layers, select_layers

    seed = _whole("seed", fields["seed"], 0, _LARGEST_SEED)
    steps = _whole("steps", fields["steps"], 1, _MOST_STEPS)
    size = _size(fields["size"], pipe)
    guidance_scale = number("text guidance (CFG)", fields["guidance_scale"])
    if not math.isfinite(guidance_scale):
        raise ValueError(f"text guidance (CFG) must be a finite number, got {_text(fields['guidance_scale'])!r}")
    texts = _text(fields["prompt"]), _text(fields["negative_prompt"])
    request = ImageRequest(*texts, *size, seed, steps, guidance_scale)

    names = [str(name).lower() for name in fields["guidances"] or ()]
    if not names or set(names) - set(GUIDANCES):
        raise ValueError(f"choose at least one guidance of SEG, PAG and SAG, got {', '.join(names) or 'none'}")
    scales = guidance_scales(
        names, {name: number(f"scale of {name.upper()}", fields[f"{name}_scale"]) for name in names}
    )
    layers = _layers(fields["layers"]) if {"seg", "pag"} & set(names) else []
    sigma = number("sigma", fields["sigma"]) if "seg" in names else 0.0
    part = {"start": number("from", fields["start"]), "stop": number("until", fields["stop"])}
    specs = make_specs(scales, layers, sigma, **part)
    check_layers(pipe, specs, device, dtype)
    guided = [*layers, *(spec.layer for spec in specs if hasattr(spec, "layer"))]
    mapped = select_layers(list_layers(pipe), guided) if fields["energy"] else ()
    return Settings(request, specs, tuple(layer.name for layer in mapped), bool(fields["unshared"]))


def number(name: str, value: Any) -> float:
    """The number in a field, ``inf`` and ``∞`` among them.

    Raises:
        ValueError: for anything else, NaN included; the message quotes it.
    """
    text = _text(value)
    try:
        result = float(text.replace("∞", "inf"))
    except ValueError:
        result = math.nan
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, got {text!r}")
    return result


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _whole(name: str, value: Any, least: int, most: int) -> int:
    result = number(name, value)
    if not (result.is_integer() and least <= result <= most):
        raise ValueError(f"{name} must be a whole number from {least} to {most}, got {_text(value)!r}")
    return int(result)


def _size(value: Any, pipe: Any) -> tuple[int, int]:
    """Width and height in pixels."""
    match = _SIZE.fullmatch(_text(value))
    if match is None:
        raise ValueError(f"size must be width x height in pixels, such as 832 x 1216, got {_text(value)!r}")
    width, height = image_size(pipe, int(match[1]), int(match[2]))
    own_width, own_height = image_size(pipe, None, None)
    if width * height > _MOST_PIXELS * own_width * own_height:
        raise ValueError(
            f"size {width} x {height} is more than {_MOST_PIXELS} times the model's own {own_width} x {own_height}; "
            f"take a smaller one"
        )
    return width, height


def _layers(value: Any) -> list[str]:
    """Names of a list, each of which may hold several with commas."""
    words = [value] if isinstance(value, str) else list(value or ())
    names = [name.strip() for word in words for name in str(word).split(",") if name.strip()]
    if not names:
        raise ValueError("choose at least one layer, such as mid")
    return names

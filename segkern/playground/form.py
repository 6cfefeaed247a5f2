# SPDX-License-Identifier: Apache-2.0
"""Validation of the page's fields; every error names the field by its label and quotes the value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from segkern.generation.calls import check_text_guidance
from segkern.generation.drawing import ImageRequest, Specs, check_layers
from segkern.generation.options import LAYERED, guidance_scales, make_specs
from segkern.generation.sizes import image_size
from segkern.playground import choices

# Labels of the fields, on the page and in errors.
LABELS = {
    "seed": "Seed",
    "steps": "Steps",
    "size": "Size",
    "guidance_scale": "CFG scale",
    "guidances": "Guidance",
    "sigma": "SEG sigma",
    "seg_scale": "SEG scale",
    "pag_scale": "PAG scale",
    "sag_scale": "SAG scale",
    "slg_scale": "SLG scale",
    "tpg_scale": "TPG scale",
    "layers": "Layers",
    "start": "Start",
    "stop": "Stop",
}

_LARGEST_SEED = 2**32 - 1
_MOST_STEPS = 1000  # the number of noise levels in training
_MOST_PIXELS = 16  # multiple of the model's default area, so that a typing error does not exhaust the memory
_SIZE = re.compile(r"\s*(-?\d+)\s*[x×*]\s*(-?\d+)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Settings:
    """Validated fields.

    Attributes:
        request: Settings that do not depend on guidance.
        specs: Guidance methods, at least one.
        layers: Layers whose attention energy to record; empty for no energy maps.
        unshared: Whether to also time guidance without branch sharing.
    """

    request: ImageRequest
    specs: Specs
    layers: tuple[str, ...]
    unshared: bool


def read(fields: Mapping[str, Any], pipe: Any, device: torch.device, dtype: torch.dtype) -> Settings:
    """Return the settings in the page's fields.

    Args:
        fields: Values of the page (text, numbers or None) by the names of ``layout.build_controls``.
        pipe: Pipeline that will generate the images, with or without weights.
        device: Device of the pipeline.
        dtype: Data type of the weights.

    Raises:
        ValueError: If a field is invalid; the message quotes the first invalid field.
    """
    from segkern.integrations.diffusers import list_layers
    from segkern.integrations.diffusers.models.layers import select_layers

    seed = _whole("seed", fields, 0, _LARGEST_SEED)
    steps = _whole("steps", fields, 1, _MOST_STEPS)
    size = _size(fields["size"], pipe)
    prompts = _text(fields["prompt"]), _text(fields["negative_prompt"])
    guidance_scale = _finite("guidance_scale", fields)
    check_text_guidance(pipe, guidance_scale, prompts[1], (LABELS["guidance_scale"], "Negative prompt"))
    request = ImageRequest(*prompts, *size, seed, steps, guidance_scale)

    available = choices.guidances(pipe)
    chosen = [str(name).upper() for name in fields["guidances"] or ()]
    if not chosen or set(chosen) - set(available):
        got = ", ".join(chosen) or "none"
        raise ValueError(f"{LABELS['guidances']}: select at least one of {', '.join(available)}, got {got}")
    names = [name.lower() for name in chosen]
    scales = guidance_scales(names, {name: _finite(f"{name}_scale", fields) for name in names})
    layers = _layers(fields["layers"]) if LAYERED & set(names) else []
    select_layers(list_layers(pipe), layers, "select layers from the list")
    sigma = number("sigma", fields["sigma"]) if "seg" in names else 0.0
    if sigma < 0:
        raise ValueError(f"{LABELS['sigma']} must be 0 or greater, or inf, got {_text(fields['sigma'])!r}")
    specs = make_specs(scales, dict.fromkeys(LAYERED, layers), sigma, **_range(fields))
    check_layers(pipe, specs, device, dtype)
    guided = [*layers, *(spec.layer for spec in specs if hasattr(spec, "layer"))]
    has_maps = fields["energy"] and choices.has_unet(pipe)  # energies of transformers cannot be recorded
    mapped = select_layers(list_layers(pipe), guided) if has_maps else ()
    return Settings(request, specs, tuple(layer.name for layer in mapped), bool(fields["unshared"]))


def number(field: str, value: Any) -> float:
    """Return the number in a field; ``inf`` and ``∞`` are numbers too.

    Raises:
        ValueError: If the value is not a number, or is NaN; the message quotes it.
    """
    text = _text(value)
    try:
        result = float(text.replace("∞", "inf"))
    except ValueError:
        result = math.nan
    if math.isnan(result):
        raise ValueError(f"{LABELS[field]} must be a number, got {text!r}")
    return result


def _text(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # the page sends every number as a float
    return "" if value is None else str(value).strip()


def _finite(field: str, fields: Mapping[str, Any]) -> float:
    result = number(field, fields[field])
    if math.isinf(result):
        raise ValueError(f"{LABELS[field]} must be a finite number, got {_text(fields[field])!r}")
    return result


def _whole(field: str, fields: Mapping[str, Any], least: int, most: int) -> int:
    result = number(field, fields[field])
    if not (result.is_integer() and least <= result <= most):
        got = _text(fields[field])
        raise ValueError(f"{LABELS[field]} must be a whole number from {least} to {most}, got {got!r}")
    return int(result)


def _range(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the range of steps with guidance, as fractions; empty for all steps, so that SLG keeps its own range."""
    start, stop = (number(name, fields[name]) for name in ("start", "stop"))
    if not 0 <= start < stop <= 1:
        raise ValueError(
            f"{LABELS['start']} must be less than {LABELS['stop']}, both from 0 to 1, got {start:g} and {stop:g}"
        )
    return {} if (start, stop) == (0, 1) else {"start": start, "stop": stop}


def _size(value: Any, pipe: Any) -> tuple[int, int]:
    """Return width and height in pixels."""
    label = LABELS["size"]
    match = _SIZE.fullmatch(_text(value))
    if match is None:
        raise ValueError(f"{label} must be width x height in pixels, such as 832 x 1216, got {_text(value)!r}")
    try:
        width, height = image_size(pipe, int(match[1]), int(match[2]))
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from None
    own_width, own_height = image_size(pipe, None, None)
    if width * height > _MOST_PIXELS * own_width * own_height:
        raise ValueError(
            f"{label} {width} x {height} is more than {_MOST_PIXELS} times the model's default "
            f"{own_width} x {own_height}; choose a smaller size"
        )
    return width, height


def _layers(value: Any) -> list[str]:
    """Return the names in a list whose items may hold several, separated by commas."""
    words = [value] if isinstance(value, str) else list(value or ())
    names = [name.strip() for word in words for name in str(word).split(",") if name.strip()]
    if not names:
        raise ValueError(f"{LABELS['layers']}: select at least one layer, such as mid")
    return names

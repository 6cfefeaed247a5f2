# SPDX-License-Identifier: Apache-2.0
"""From what stands in the page's fields to what is drawn; every refusal quotes the field."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from segkern.generation.drawing import Job, Specs, check_layers
from segkern.generation.guidance_options import names_of, scales_of, specs_of
from segkern.generation.sizes import image_size

if TYPE_CHECKING:
    pass

_LARGEST_SEED = 2**32 - 1
_MOST_STEPS = 1000  # the noise levels that models are trained with; the scheduler's tables grow with the number
_LARGEST = 16  # times the model's own number of pixels, so that a slip does not fill the machine's memory
_SIZE = re.compile(r"\s*(-?\d+)\s*[x×*]\s*(-?\d+)\s*", re.IGNORECASE)
# Words of the checks that the command line and Python share with the page, which has neither dashes nor functions.
_FOR_PYTHON = "; list_layers(pipe) lists every layer"
_OPTIONS = re.compile(r"--(?=(width|height|config|guidance)\b)")


@dataclass(frozen=True)
class Form:
    """What stands in the fields, as the page has it: texts, numbers, nothing.

    Attributes:
        prompt: what the picture shows.
        negative_prompt: what it does not show.
        seed: of the noise.
        steps: of the scheduler.
        guidance_scale: of classifier-free guidance.
        size: such as ``832 x 1216``.
        kinds: of guidance, such as ``["SEG", "PAG"]``.
        sigma: of SEG's blur.
        seg_scale: of SEG.
        pag_scale: of PAG.
        sag_scale: of SAG.
        layers: names, each of which may hold several with commas.
        start: fraction of the run at which guidance begins.
        stop: fraction of the run at which it ends.
        energy: whether to map the energy of attention.
        unshared: whether to time guidance with a branch computed in full, too.
    """

    prompt: Any
    negative_prompt: Any
    seed: Any
    steps: Any
    guidance_scale: Any
    size: Any
    kinds: Any
    sigma: Any
    seg_scale: Any
    pag_scale: Any
    sag_scale: Any
    layers: Any
    start: Any
    stop: Any
    energy: Any
    unshared: Any


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Attributes:
        job: whatever the guidance.
        specs: the guidance, at least one.
        layers: whose energy is mapped; none if that was not asked for.
        unshared: whether to time guidance with a branch computed in full, too.
    """

    job: Job
    specs: Specs
    layers: tuple[str, ...]
    unshared: bool


def read(form: Form, pipe: Any, device: torch.device, dtype: torch.dtype) -> Settings:
    """Check every field.

    Args:
        form: the fields.
        pipe: that draws, with or without weights.
        device: that it is on.
        dtype: of its weights.

    Raises:
        ValueError: for the first field that does not fit; the message quotes it.
    """
    from segkern.integrations.diffusers.models.layers import list_layers, select_layers

    seed = _whole("seed", form.seed, 0, _LARGEST_SEED)
    steps = _whole("steps", form.steps, 1, _MOST_STEPS)
    width, height = _size(form.size)
    size = image_size(pipe, width, height)
    own_width, own_height = image_size(pipe, None, None)
    if width * height > _LARGEST * own_width * own_height:
        raise ValueError(
            f"size {width} x {height} is more than {_LARGEST} times the model's own {own_width} x {own_height}; "
            f"take a smaller one"
        )
    guidance_scale = number("text guidance (CFG)", form.guidance_scale)
    if not math.isfinite(guidance_scale):
        raise ValueError(f"text guidance (CFG) must be a finite number, got {_quoted(form.guidance_scale)}")
    job = Job(_text(form.prompt), _text(form.negative_prompt), *size, seed, steps, guidance_scale)

    kinds = [str(kind) for kind in form.kinds or ()]
    if not kinds:
        raise ValueError("choose at least one kind of guidance: SEG, PAG or SAG")
    names = names_of(",".join(kinds))
    given = {"seg": form.seg_scale, "pag": form.pag_scale, "sag": form.sag_scale}
    scales = {name: number(f"scale of {name.upper()}", given[name]) for name in names}
    chosen = _layers(form.layers) if {"seg", "pag"} & set(names) else []
    blur = {"sigma": number("sigma", form.sigma)} if "seg" in names else {}
    common = {"start": number("from", form.start), "stop": number("until", form.stop)}
    specs = specs_of(names, scales_of(names, {**dict.fromkeys(given), **scales}), chosen, common, blur)
    check_layers(pipe, specs, device, dtype)
    where = [*chosen, *(spec.layer for spec in specs if hasattr(spec, "layer"))]
    guided = select_layers(list_layers(pipe), where)
    return Settings(job, specs, tuple(layer.name for layer in guided) if form.energy else (), bool(form.unshared))


def words(error: BaseException) -> str:
    """A refusal as the page shows it: in one line, without the dashes of the command line's options.

    Example:
        >>> words(ValueError("--width must be a positive multiple of 8, such as 96, got 100"))
        'width must be a positive multiple of 8, such as 96, got 100'
    """
    return " ".join(_OPTIONS.sub("", str(error)).removesuffix(_FOR_PYTHON).split())


def _text(value: Any) -> str:
    text = "" if value is None else str(value).strip()
    if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{text!r} holds half of a character, which is no text; type it anew")
    return text


def _quoted(value: Any) -> str:
    return repr(_text(value))


def number(name: str, value: Any) -> float:
    """The number in a field, ``inf`` and ``∞`` among them.

    Raises:
        ValueError: for anything else, NaN included; the message quotes it.
    """
    try:
        found = float(_text(value).replace("∞", "inf"))
    except ValueError:
        found = math.nan
    if math.isnan(found):
        raise ValueError(f"{name} must be a number, got {_quoted(value)}")
    return found


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    found = number(name, value)
    if not (math.isfinite(found) and found.is_integer() and least <= found and (most is None or found <= most)):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number {limit}, got {_quoted(value)}")
    return int(found)


def _size(value: Any) -> tuple[int, int]:
    found = _SIZE.fullmatch(_text(value))
    if found is None:
        raise ValueError(f"size must be width x height in pixels, such as 832 x 1216, got {_quoted(value)}")
    return int(found[1]), int(found[2])


def _layers(value: Any) -> list[str]:
    given = [value] if isinstance(value, str) else list(value or ())
    names = [name.strip() for each in given for name in str(each).split(",") if name.strip()]
    if not names:
        raise ValueError("choose at least one layer, such as mid")
    return names

# SPDX-License-Identifier: Apache-2.0
"""Conversion of option values to guidance specs.

Error messages name options as on the command line, such as ``--sigma``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from segkern.generation.drawing import Specs

GUIDANCES = ("seg", "pag", "sag", "slg", "tpg")
LAYERED = frozenset(GUIDANCES) - {"sag"}  # methods that accept --layers
SCALE_OPTIONS = {"seg": "--scale"} | {name: f"--{name}-scale" for name in GUIDANCES[1:]}
_DEFAULT_SCALES = {"seg": 3.0, "pag": 3.0, "sag": 0.75, "slg": 2.8, "tpg": 3.0}

T = TypeVar("T", int, float, str)


def parse_list(
    option: str, text: str, kind: Callable[[str], T], expected: str, *, empty: bool = False
) -> tuple[T, ...]:
    """Return the values in a comma-separated list such as ``1,2,3``.

    Args:
        option: Name of the option, for error messages.
        text: Value of the option.
        kind: Function that converts one item.
        expected: Description of valid items, for error messages.
        empty: Whether an empty list is valid.

    Raises:
        ValueError: If an item is invalid or repeated, or if the list is empty and ``empty`` is false.

    Example:
        >>> parse_list("--sigma", "1, 4,inf", float, "numbers such as 4 or inf")
        (1.0, 4.0, inf)
    """
    if not text.strip():
        if empty:
            return ()
        raise ValueError(f"{option} must not be empty; it accepts {expected}")
    values: list[T] = []
    for word in (part.strip() for part in text.split(",")):
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(f"{option} accepts {expected}, got {word!r}") from None
        if value in values:
            raise ValueError(f"{option} contains {word} twice, got {text!r}")
        values.append(value)
    return tuple(values)


def parse_guidance(text: str) -> tuple[str, ...]:
    """Return the names of the guidance methods in a list such as ``seg,pag``; an empty tuple for ``none``.

    Raises:
        ValueError: If a name is unknown or repeated.

    Example:
        >>> parse_guidance("seg, PAG")
        ('seg', 'pag')
    """
    expected = f"{', '.join(GUIDANCES)}, a comma-separated list of them, or none"
    names = parse_list("--guidance", text.lower(), str, expected)
    if names == ("none",):
        return ()
    for name in names:
        if name not in GUIDANCES:
            raise ValueError(f"--guidance accepts {expected}, got {name!r} in {text!r}")
    return names


def guidance_scales(names: Sequence[str], given: Mapping[str, float | None]) -> dict[str, float]:
    """Return the scale of each guidance method, or its default if no scale is given.

    Raises:
        ValueError: If a scale is given for a method that is not in ``names``.
    """
    for name, scale in given.items():
        if scale is not None and name not in names:
            option, chosen = SCALE_OPTIONS[name], ",".join(names) or "none"
            raise ValueError(f"{option} {scale:g} has no effect without {name} in --guidance, got --guidance {chosen}")
    scales = {name: given.get(name) for name in names}
    return {name: _DEFAULT_SCALES[name] if scale is None else scale for name, scale in scales.items()}


def check_finite(option: str, value: float) -> None:
    """Raise a ValueError if the value of an option is infinite or NaN."""
    if not math.isfinite(value):
        raise ValueError(f"{option} must be a finite number, got {value:g}")


def make_specs(
    scales: Mapping[str, float],
    layers: Mapping[str, list[str]],
    sigma: float,
    *,
    start: float | None = None,
    stop: float | None = None,
    schedule: str = "constant",
) -> Specs:
    """Return one guidance spec for each scale.

    Args:
        scales: Scales by the names of the guidance methods.
        layers: Layers of each guidance method that has any.
        sigma: Blur of SEG.
        start: Fraction of the steps after which guidance starts; None for 0.
        stop: Fraction of the steps after which guidance stops; None for 1. If both are None, SLG has its own range.
        schedule: Schedule of the scales.

    Raises:
        ValueError: If a value is invalid.
    """
    from segkern.integrations.diffusers import PAG, SAG, SEG, SLG, TPG
    from segkern.integrations.specs.schedules import SCHEDULES

    for name, scale in scales.items():
        check_finite(SCALE_OPTIONS[name], scale)
    if "seg" in scales and not sigma >= 0:
        raise ValueError(f"--sigma must be 0, a positive number or inf, got {sigma:g}")
    steps = {"start": 0.0 if start is None else start, "stop": 1.0 if stop is None else stop}
    if not 0.0 <= steps["start"] < steps["stop"] <= 1.0:
        raise ValueError(
            f"--start and --stop must satisfy 0 <= start < stop <= 1, got --start {steps['start']:g} and --stop "
            f"{steps['stop']:g}"
        )
    if schedule not in SCHEDULES:
        raise ValueError(f"--schedule must be {', '.join(SCHEDULES[:-1])} or {SCHEDULES[-1]}, got {schedule!r}")
    common: dict[str, Any] = {**steps, "schedule": schedule}
    of_slg = common if (start, stop) != (None, None) else {"schedule": schedule}
    constructors = {
        "seg": lambda scale: SEG(scale, sigma, layers["seg"], **common),
        "pag": lambda scale: PAG(scale, layers["pag"], **common),
        "sag": lambda scale: SAG(scale, **common),
        "slg": lambda scale: SLG(scale, layers["slg"], **of_slg),
        "tpg": lambda scale: TPG(scale, layers["tpg"], **common),
    }
    return tuple(constructors[name](scale) for name, scale in scales.items())

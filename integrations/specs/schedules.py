# SPDX-License-Identifier: Apache-2.0
"""Schedules of the guidance scale over the inference steps. This module does not import diffusers."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, TypeGuard

Schedule = Literal["constant", "linear", "cosine"] | Callable[[float], float]

SCHEDULES = ("constant", "linear", "cosine")


def check_schedule(owner: str, schedule: object) -> None:
    """Raise a ValueError if ``schedule`` is not a schedule."""
    if not (callable(schedule) or (isinstance(schedule, str) and schedule in SCHEDULES)):
        raise ValueError(
            f"{owner}.schedule must be one of {', '.join(map(repr, SCHEDULES))}, or a function from the completed "
            f"fraction of the steps to a factor of the scale, got {schedule!r}"
        )


def factor(owner: str, schedule: Schedule, fraction: float, start: float, stop: float) -> float:
    """Return the factor of the scale at a fraction of the steps in ``[start, stop)``.

    ``"constant"`` returns 1. ``"linear"`` and ``"cosine"`` fall from 1 at ``start`` to 0 at ``stop``, along a straight
    line and half a cosine wave. A function receives the fraction and returns the factor.

    Raises:
        ValueError: If a function returns anything but a finite number. The message quotes it.

    Example:
        >>> [factor("SEG", "linear", x, 0.0, 0.5) for x in (0.0, 0.25)]
        [1.0, 0.5]
    """
    if callable(schedule):
        answer = schedule(fraction)
        try:
            value = float(answer)  # also accepts NumPy numbers and one-element tensors
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{owner}.schedule must return a finite number, got {answer!r} at fraction {fraction:g}")
        return value
    if schedule == "constant":
        return 1.0
    done = (fraction - start) / (stop - start)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def is_number(value: object) -> TypeGuard[float]:
    """Return True for real numbers, including NumPy numbers, but not for booleans."""
    return isinstance(value, Real) and not isinstance(value, bool)

# SPDX-License-Identifier: Apache-2.0
"""Schedules of a guidance's scale over a run. No diffusers in here."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Literal, TypeGuard

Schedule = Literal["constant", "linear", "cosine"] | Callable[[float], float]

SCHEDULES = ("constant", "linear", "cosine")


def check_schedule(owner: str, schedule: object) -> None:
    """Raise a ValueError that quotes what is no schedule."""
    if not (callable(schedule) or (isinstance(schedule, str) and schedule in SCHEDULES)):
        raise ValueError(
            f"{owner}.schedule must be one of {', '.join(map(repr, SCHEDULES))}, or a function from the fraction of "
            f"the run done to a factor of the scale, got {schedule!r}"
        )


def factor(owner: str, schedule: Schedule, fraction: float, start: float, stop: float) -> float:
    """The factor of the scale at a fraction of the run in ``[start, stop)``.

    ``"constant"`` is 1; ``"linear"`` falls from 1 at ``start`` to 0 at ``stop`` in a straight line, ``"cosine"`` in
    half a wave; a function is given the fraction and answers with the factor.

    Raises:
        ValueError: when a function's answer is not a finite number; the message quotes it.

    Example:
        >>> [factor("SEG", "linear", x, 0.0, 0.5) for x in (0.0, 0.25)]
        [1.0, 0.5]
    """
    if callable(schedule):
        answer = schedule(fraction)
        try:
            value = float(answer)  # NumPy's numbers and tensors of one element too
        except (TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{owner}.schedule must give a finite number, got {answer!r} at fraction {fraction:g}")
        return value
    if schedule == "constant":
        return 1.0
    done = (fraction - start) / (stop - start)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def is_number(value: object) -> TypeGuard[float]:
    """True if it is a real number, NumPy's too, and not a truth value."""
    return isinstance(value, Real) and not isinstance(value, bool)

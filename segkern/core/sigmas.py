# SPDX-License-Identifier: Apache-2.0
"""Checks of sigma, the blur's standard deviation in tokens: one number, one per sample, or one per head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, TypeGuard, TypeVar

import torch

T = TypeVar("T")


def is_finite_blur(sigma: float) -> bool:
    """True if sigma is neither 0 (no blur) nor infinite (the mean)."""
    return 0.0 < sigma < math.inf


def check_sigma(sigma: float | Iterable[float], batch: int) -> tuple[float, ...]:
    """One checked float per sample from a number or one number per sample.

    Raises:
        ValueError: for a negative sigma, NaN, or a number of sigmas that is not the batch size.

    Example:
        >>> check_sigma((0, 0, math.inf), 3)
        (0.0, 0.0, inf)
    """
    if isinstance(sigma, torch.Tensor):
        sigma = sigma.tolist()
    if _is_number(sigma):
        sigmas = (float(sigma),) * batch
    elif isinstance(sigma, Iterable) and not isinstance(sigma, (str, bytes)):
        values = tuple(sigma)
        if not all(_is_number(value) for value in values):
            raise ValueError(f"sigma must be one number or one per sample, got {values}")
        sigmas = tuple(float(value) for value in values)
        if len(sigmas) != batch:
            raise ValueError(
                f"sigma must be one number or one per sample: got {len(sigmas)} numbers {sigmas} for a batch of {batch}"
            )
    else:
        raise ValueError(f"sigma must be a number or a sequence of one number per sample, got {sigma!r}")
    for value in sigmas:
        if not value >= 0.0:  # true for NaN as well
            raise ValueError(f"sigma must be 0 (no blur), positive, or math.inf (mean query); got {value}")
    return sigmas


def has_head_sigmas(sigma: object) -> bool:
    """True if any sample has a sequence of sigmas, one for each head."""
    dimensions = getattr(sigma, "ndim", None)  # of a tensor or a NumPy array
    if dimensions is not None:
        return bool(dimensions > 1)
    return isinstance(sigma, (list, tuple)) and any(map(_is_sequence, sigma))


def _is_sequence(entry: Any) -> bool:
    if isinstance(entry, (int, float)):  # a graph's numbers too, which may be asked nothing else
        return False
    return isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) > 0


def head_sigmas(sigma: Any, batch: int, heads: int) -> tuple[tuple[float, ...], ...]:
    """One checked float per sample and head; see :func:`has_head_sigmas`.

    Raises:
        ValueError: for another number of samples (a single one serves all) or heads, and as :func:`check_sigma` does.

    Example:
        >>> head_sigmas([0, (1, math.inf)], batch=2, heads=2)
        ((0.0, 0.0), (1.0, inf))
    """
    samples = sigma.tolist() if hasattr(sigma, "tolist") else sigma
    if len(samples) not in (1, batch):
        raise ValueError(f"sigma must have one entry per sample, got {len(samples)} for a batch of {batch}: {sigma}")
    rows = [tuple(entry) if _is_sequence(entry) else (entry,) * heads for entry in samples]
    if any(len(row) != heads for row in rows):
        raise ValueError(f"sigma must have one number per sample or one per head, of which there are {heads}: {sigma}")
    return tuple(check_sigma(row, heads) for row in rows) * (batch if len(rows) == 1 else 1)


def _is_number(value: object) -> TypeGuard[float]:
    # torch.SymFloat while compiling; Real covers NumPy's numbers as well.
    return isinstance(value, (int, float, torch.SymFloat, Real)) and not isinstance(value, bool)


def equal_runs(sigmas: Sequence[T]) -> list[tuple[slice, T]]:
    """Consecutive samples of equal sigma, or of whatever one value per sample says, as slices of the batch.

    Example:
        >>> equal_runs((0.0, 0.0, 3.0))
        [(slice(0, 2, None), 0.0), (slice(2, 3, None), 3.0)]
    """
    slices: list[tuple[slice, T]] = []
    first = 0
    for last in range(1, len(sigmas) + 1):
        if last == len(sigmas) or sigmas[last] != sigmas[first]:
            slices.append((slice(first, last), sigmas[first]))
            first = last
    return slices

# SPDX-License-Identifier: Apache-2.0
"""Checks of sigma, the blur's standard deviation in tokens: one number, one per sample, or one per head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch

from segkern.core.numbers import check_no_gradient, holds_real_numbers, real_number

T = TypeVar("T")

_NO_SEQUENCE = (str, bytes, Mapping, Set)  # although they can be iterated over


def is_finite_blur(sigma: float) -> bool:
    """True if sigma is neither 0 (no blur) nor infinite (the mean)."""
    return 0.0 < sigma < math.inf


def check_sigma(sigma: float | Iterable[float], batch: int) -> tuple[float, ...]:
    """One checked float per sample from a number or one number per sample.

    Raises:
        ValueError: for a negative sigma, NaN, what is no number, or a number of sigmas that is not the batch size.

    Example:
        >>> check_sigma((0, 0, math.inf), 3)
        (0.0, 0.0, inf)
    """
    return for_batch(given_sigmas(sigma, batch), batch)


def given_sigmas(sigma: float | Iterable[float], batch: int) -> tuple[float, ...]:
    """The checked floats of ``sigma``: one for all samples of the batch, or one per sample.

    Raises:
        ValueError: as :func:`check_sigma` does.

    Example:
        >>> given_sigmas(2, 3), given_sigmas((0, 2, 2), 3)
        ((2.0,), (0.0, 2.0, 2.0))
    """
    check_no_gradient("sigma", sigma, "pass sigma.detach()")
    number = real_number(sigma) if getattr(sigma, "ndim", 0) == 0 else None
    if number is not None:
        sigmas: tuple[float, ...] = (number,)
    elif isinstance(sigma, _NO_SEQUENCE) or not isinstance(sigma, Iterable) or getattr(sigma, "ndim", 1) == 0:
        raise ValueError(f"sigma must be a number or a sequence of one number per sample, got {sigma!r}")
    else:
        entries = _entries(sigma)
        for entry in entries:
            check_no_gradient("sigma", entry, "pass sigma.detach()")
        numbers = [real_number(entry) for entry in entries]
        sigmas = tuple(value for value in numbers if value is not None)
        if len(sigmas) != len(entries):
            raise ValueError(f"sigma must be one number or one per sample, got {entries}")
        if len(sigmas) != batch:
            raise ValueError(
                f"sigma must be one number or one per sample: got {len(sigmas)} numbers {sigmas} for a batch of {batch}"
            )
    for value in sigmas:
        if not value >= 0.0:  # true for NaN as well
            raise ValueError(f"sigma must be 0 (no blur), positive, or math.inf (mean query); got {value}")
    return sigmas


def check_traced_sigma(sigma: torch.Tensor, batch: int) -> torch.Tensor:
    """A tensor of sigmas that is read when a compiled or traced graph runs, ``[1]`` for all samples or ``[batch]``.

    Raises:
        ValueError: unless it lies on the CPU, wants no derivative, and has one number or one per sample.
    """
    check_no_gradient("sigma", sigma, "pass sigma.detach()")
    if sigma.device.type != "cpu" or sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] != batch):
        raise ValueError(
            f"a tensor of sigmas lies on the CPU and has one number or one per sample while a call is compiled or "
            f"traced, got shape {tuple(sigma.shape)} on {sigma.device} for a batch of {batch}"
        )
    return sigma.reshape(1) if sigma.dim() == 0 else sigma


def for_batch(sigmas: Sequence[float], batch: int) -> tuple[float, ...]:
    """One sigma per sample, from one for all or one each.

    Raises:
        ValueError: for another number of sigmas than 1 or the batch size.
    """
    if len(sigmas) == 1:
        return tuple(sigmas) * batch
    if len(sigmas) != batch:
        raise ValueError(f"sigma must be one number or one per sample: got {len(sigmas)} for a batch of {batch}")
    return tuple(sigmas)


def _entries(sigma: Iterable[Any]) -> tuple[Any, ...]:
    """The entries of a sequence, numbers of a tensor as Python's."""
    if not isinstance(sigma, torch.Tensor):
        return tuple(sigma)
    if not holds_real_numbers(sigma):
        raise ValueError(f"a tensor of sigmas must be a dense one of real numbers, got {sigma!r}")
    return tuple(sigma.tolist())


def has_head_sigmas(sigma: object) -> bool:
    """True if any sample has a sequence of sigmas, one for each head."""
    if isinstance(sigma, (int, float)):  # a graph's numbers too, which may be asked nothing else
        return False
    dimensions = getattr(sigma, "ndim", None)  # of a tensor or a NumPy array
    if dimensions is not None:
        return bool(dimensions > 1)
    return isinstance(sigma, (list, tuple)) and any(map(is_sequence, sigma))


def is_sequence(entry: Any) -> bool:
    """True if a sample's entry has one sigma for each head."""
    if isinstance(entry, (int, float)):
        return False
    return isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) > 0


def head_sigmas(sigma: Any, batch: int, heads: int) -> tuple[tuple[float, ...], ...]:
    """One checked float per head, for all samples (a single entry) or for each; see :func:`has_head_sigmas`.

    Raises:
        ValueError: for another number of samples or heads, and as :func:`check_sigma` does.

    Example:
        >>> head_sigmas([0, (1, math.inf)], batch=2, heads=2), head_sigmas([(1, 2)], batch=2, heads=2)
        (((0.0, 0.0), (1.0, inf)), ((1.0, 2.0),))
    """
    check_no_gradient("sigma", sigma, "pass sigma.detach()")
    samples = _entries(sigma)
    if len(samples) != 1 and len(samples) != batch:
        raise ValueError(f"sigma must have one entry per sample, got {len(samples)} for a batch of {batch}: {sigma}")
    rows = [tuple(entry) if is_sequence(entry) else (entry,) * heads for entry in samples]
    if any(len(row) != heads for row in rows):
        raise ValueError(f"sigma must have one number per sample or one per head, of which there are {heads}: {sigma}")
    return tuple([given_sigmas(row, heads) for row in rows])


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

# SPDX-License-Identifier: Apache-2.0
"""Checks of sigma, the blur's standard deviation in tokens: one number, one per sample, or one per head."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, TypeVar

import torch

from segkern.core.numbers import check_no_gradient, holds_real_numbers, real_number

T = TypeVar("T")

_NO_SEQUENCE = (str, bytes, Mapping, Set)  # iterable, but not sequences of sigmas


def is_finite_blur(sigma: float) -> bool:
    """Return True if sigma is neither 0 (no blur) nor infinite (the mean)."""
    return 0.0 < sigma < math.inf


def check_sigma(sigma: float | Iterable[float], batch: int) -> tuple[float, ...]:
    """Return one checked float per sample, from a number or one number per sample.

    Raises:
        ValueError: If a sigma is negative, NaN or not a number, or if the number of sigmas is not the batch size.

    Example:
        >>> check_sigma((0, 0, math.inf), 3)
        (0.0, 0.0, inf)
    """
    return for_batch(given_sigmas(sigma, batch), batch)


def given_sigmas(sigma: float | Iterable[float], batch: int) -> tuple[float, ...]:
    """Return the checked floats of ``sigma``: one for all samples of the batch, or one per sample.

    Raises:
        ValueError: If a sigma or the number of sigmas is invalid; see :func:`check_sigma`.

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
        if not value >= 0.0:  # also catches NaN
            raise ValueError(f"sigma must be 0 (no blur), positive, or math.inf (mean query); got {value}")
    return sigmas


def check_traced_sigma(sigma: torch.Tensor, batch: int) -> torch.Tensor:
    """Return a tensor of sigmas that a compiled or traced graph reads when it runs, ``[1]`` or ``[batch]``.

    Raises:
        ValueError: If the tensor is not on the CPU, requires a derivative, or does not have one number or one per
            sample.
    """
    check_no_gradient("sigma", sigma, "pass sigma.detach()")
    if sigma.device.type != "cpu" or sigma.dim() > 1 or (sigma.dim() == 1 and sigma.shape[0] != batch):
        raise ValueError(
            f"while a call is compiled or traced, a tensor of sigmas must be on the CPU and have one number or one per "
            f"sample, got shape {tuple(sigma.shape)} on {sigma.device} for a batch of {batch}"
        )
    return sigma.reshape(1) if sigma.dim() == 0 else sigma


def for_batch(sigmas: Sequence[float], batch: int) -> tuple[float, ...]:
    """Return one sigma per sample, from one for all samples or one per sample.

    Raises:
        ValueError: If the number of sigmas is neither 1 nor the batch size.
    """
    if len(sigmas) == 1:
        return tuple(sigmas) * batch
    if len(sigmas) != batch:
        raise ValueError(f"sigma must be one number or one per sample: got {len(sigmas)} for a batch of {batch}")
    return tuple(sigmas)


def _entries(sigma: Iterable[Any]) -> tuple[Any, ...]:
    """Return the entries of a sequence; the numbers of a tensor become Python numbers."""
    if not isinstance(sigma, torch.Tensor):
        return tuple(sigma)
    if not holds_real_numbers(sigma):
        raise ValueError(f"a tensor of sigmas must be dense and contain real numbers, got {sigma!r}")
    return tuple(sigma.tolist())


def has_head_sigmas(sigma: object) -> bool:
    """Return True if any sample has a sequence of sigmas, one for each head."""
    if isinstance(sigma, (int, float)):  # includes a graph's symbolic numbers, which support no other check
        return False
    dimensions = getattr(sigma, "ndim", None)  # of a tensor or NumPy array
    if dimensions is not None:
        return bool(dimensions > 1)
    return isinstance(sigma, (list, tuple)) and any(map(is_sequence, sigma))


def is_sequence(entry: Any) -> bool:
    """Return True if a sample's entry has one sigma for each head."""
    if isinstance(entry, (int, float)):
        return False
    return isinstance(entry, (list, tuple)) or getattr(entry, "ndim", 0) > 0


def head_sigmas(sigma: Any, batch: int, heads: int) -> tuple[tuple[float, ...], ...]:
    """Return one checked float per head, for all samples (a single entry) or per sample; see :func:`has_head_sigmas`.

    Raises:
        ValueError: If the number of samples or heads does not match, or if a sigma is invalid; see :func:`check_sigma`.

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
        raise ValueError(f"sigma must have one number per sample or one for each of the {heads} heads, got {sigma}")
    return tuple([given_sigmas(row, heads) for row in rows])


def equal_runs(sigmas: Sequence[T]) -> list[tuple[slice, T]]:
    """Return slices of the batch over consecutive samples with equal sigma (or another per-sample value).

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

# SPDX-License-Identifier: Apache-2.0
"""Reuse of a perturbed branch: which steps compute it, and the last difference for the other steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from segkern.integrations.specs.base import Spec


@dataclass
class _Last:
    """The result of the last computed branch.

    Attributes:
        shape: Shape of the pipeline's own sample at that time.
        step: The last guided step.
        age: Number of guided steps since the branch was computed.
        difference: ``c - p``.
    """

    shape: torch.Size
    step: int
    age: int = 0
    difference: torch.Tensor | None = None


class Differences:
    """The last difference ``c - p`` of each guidance method that is not computed in every step."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._specs = specs
        self._last: dict[int, _Last] = {}

    def due(self, index: int, step: int, shape: torch.Size) -> bool:
        """Return True if an active spec computes its branch in the next call.

        The result is the same for all calls of a step.

        Args:
            index: Index of the spec.
            step: Number of the call's step.
            shape: Shape of the pipeline's own sample.
        """
        if self._specs[index].reuse == 1:
            return True
        last = self._last.get(index)
        if last is None or last.difference is None or last.shape != shape:
            self._last[index] = _Last(shape, step)
            return True
        if step != last.step:
            last.step = step
            last.age = (last.age + 1) % self._specs[index].reuse
        return last.age == 0

    def keep(self, index: int, difference: torch.Tensor) -> None:
        """Store the difference of the current call if later calls reuse it."""
        if index in self._last:
            self._last[index].difference = difference.detach()

    def last(self, index: int) -> torch.Tensor:
        """Return the difference to reuse."""
        difference = self._last[index].difference
        assert difference is not None
        return difference

    def forget(self) -> None:
        """Discard all differences, because a new run begins."""
        self._last.clear()

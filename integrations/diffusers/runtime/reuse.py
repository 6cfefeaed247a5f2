# SPDX-License-Identifier: Apache-2.0
"""Reuse of a perturbed branch: steps that compute it, and the difference that others take from the last of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from segkern.integrations.specs.base import Spec


@dataclass
class _Last:
    """The result of the last computed branch.

    Attributes:
        shape: of the pipeline's own sample then.
        step: the last one in which the guidance acted.
        age: steps since it was computed, in which the guidance acted.
        difference: ``c - p``.
    """

    shape: torch.Size
    step: int
    age: int = 0
    difference: torch.Tensor | None = None


class Differences:
    """The last difference ``c - p`` of each guidance that is not computed in every step."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._specs = specs
        self._last: dict[int, _Last] = {}

    def due(self, index: int, step: int, shape: torch.Size) -> bool:
        """True if a guidance that acts in the coming forward computes its branch there.

        All forwards of a step are treated alike.

        Args:
            index: of the guidance.
            step: number of the step that the forward belongs to.
            shape: of the pipeline's own sample.
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
        """Take the difference of the forward under way, if later ones want it."""
        if index in self._last:
            self._last[index].difference = difference.detach()

    def last(self, index: int) -> torch.Tensor:
        """The difference to take."""
        difference = self._last[index].difference
        assert difference is not None
        return difference

    def forget(self) -> None:
        """Free what was kept: it is of another run."""
        self._last.clear()

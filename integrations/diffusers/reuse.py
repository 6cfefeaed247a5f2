# SPDX-License-Identifier: Apache-2.0
"""Which forwards compute a perturbed branch, and the difference that others take from the last one that did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from segkern.integrations.diffusers.spec import Spec


@dataclass
class _Last:
    """What the last computed branch gave.

    Attributes:
        shape: of the pipeline's own sample then.
        age: forwards since, in which the guidance acted.
        found: ``c - p``.
    """

    shape: torch.Size
    age: int = 0
    found: torch.Tensor | None = None


class Differences:
    """The last difference ``c - p`` of each guidance that is not computed in every forward."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._specs = specs
        self._last: dict[int, _Last] = {}

    def due(self, index: int, shape: torch.Size) -> bool:
        """Whether a guidance that acts in the coming forward computes its branch there.

        Args:
            index: of the guidance.
            shape: of the pipeline's own sample.
        """
        if self._specs[index].reuse == 1:
            return True
        last = self._last.get(index)
        if last is None or last.found is None or last.shape != shape:
            self._last[index] = _Last(shape)
            return True
        last.age += 1
        if last.age < self._specs[index].reuse:
            return False
        self._last[index] = _Last(shape)
        return True

    def keep(self, index: int, found: torch.Tensor) -> None:
        """Take the difference of the forward under way, if later ones want it."""
        if index in self._last:
            self._last[index].found = found.detach()

    def last(self, index: int) -> torch.Tensor:
        """The difference to take."""
        found = self._last[index].found
        assert found is not None
        return found

    def forget(self) -> None:
        """Free what was kept: it is of another run."""
        self._last.clear()

# SPDX-License-Identifier: Apache-2.0
"""Which stride of query rows each guidance takes at each layer, and how large its error was estimated.

The first guided forwards at an image size estimate the error, later ones use what they found: a layer's choice is
made once, between two forwards, and stays, so that a compiled denoiser settles too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch

from segkern.core.coarse_queries import check_query_stride, coarse_grid
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.query_rows import EVERY_ROW, Stride
from segkern.integrations.diffusers.specs.base import Spec
from segkern.integrations.diffusers.specs.guidances import SEG

FORWARDS = 3  # with estimates, before the choice
MARGIN = 4.0  # times the estimate must hold the tolerance: 2 for the estimate itself, 2 for what comes later

CANDIDATES: tuple[Stride, ...] = ((2, 2), (3, 3), (4, 4), (6, 6), (8, 8))  # finest first
WIDEST = 0.75  # of sigma: logits swing more as a picture takes shape, and the error of wider strides grows with them


@dataclass(frozen=True)
class Choice:
    """What a layer settled on.

    Attributes:
        stride: of its query rows.
        error: the largest estimate of that stride in those forwards; None for every row.
    """

    stride: Stride
    error: float | None


@dataclass
class _Layer:
    """Estimates of one layer at one image size, still on their device, until the choice is made."""

    forwards: int = 0
    largest: torch.Tensor | None = None  # [candidates]
    grid: Grid | None = None
    choice: Choice | None = None

    def error(self) -> float | None:
        """The largest estimate so far of the only stride. Waits for the device."""
        return None if self.largest is None else self.largest[0].item()


@dataclass
class Calibration:
    """Strides by guidance, module and image size.

    Attributes:
        specs: the guidances.
        size: height and width of the denoiser's image in the forward under way, which say what grids its layers have.
    """

    specs: tuple[Spec, ...]
    size: tuple[int, int] = (0, 0)
    _layers: dict[tuple[int, str, tuple[int, int]], _Layer] = field(default_factory=dict, init=False)

    def stride(self, spec: int, module: str) -> Stride:
        """The stride of the coming forward."""
        wanted = getattr(self.specs[spec], "query_stride", 1)
        if wanted != "auto":
            return check_query_stride(wanted)
        choice = self._layer(spec, module).choice
        return EVERY_ROW if choice is None else choice.stride

    def candidates(self, spec: int, module: str) -> tuple[Stride, ...]:
        """The strides whose error the coming forward estimates; none once the layer has settled."""
        chosen = self._strided(spec)
        if chosen is None or self._layer(spec, module).choice is not None:
            return ()
        return _candidates(chosen)

    def add(self, spec: int, module: str, grid: Grid, errors: torch.Tensor) -> None:
        """Take the estimates ``[candidates, samples]`` of the forward under way, without waiting for the device."""
        layer = self._layer(spec, module)
        largest = errors.amax(dim=1)
        layer.largest = largest if layer.largest is None else torch.maximum(layer.largest, largest)
        layer.grid = grid
        layer.forwards += 1

    def settle(self) -> None:
        """Make the choices that are due. Only then the device is waited for, once for all layers."""
        due = {
            key: layer.largest
            for key, layer in self._layers.items()
            if layer.choice is None and layer.largest is not None and layer.forwards >= FORWARDS
        }
        if not due:
            return
        device = next(iter(due.values())).device
        found = torch.cat([largest.to(device) for largest in due.values()]).tolist()
        for key, largest in due.items():
            layer, errors = self._layers[key], [found.pop(0) for _ in range(len(largest))]
            chosen = self._strided(key[0])
            assert chosen is not None
            layer.choice = _choose(chosen, layer, errors)

    def report(self, spec: int, module: str) -> Choice | None:
        """What a layer runs with at the latest image size; None without a stride, and until one is chosen."""
        chosen, layer = self._strided(spec), self._layer(spec, module)
        if layer.choice is not None or chosen is None:
            return layer.choice
        if chosen.query_stride != "auto":
            return Choice(check_query_stride(chosen.query_stride), layer.error())
        return None if _candidates(chosen) else Choice(EVERY_ROW, None)

    def _strided(self, spec: int) -> SEG | None:
        """The guidance, if it leaves out rows."""
        found = self.specs[spec]
        return found if isinstance(found, SEG) and found.leaves_out_rows() else None

    def _layer(self, spec: int, module: str) -> _Layer:
        return self._layers.setdefault((spec, module, self.size), _Layer())


def _candidates(spec: SEG) -> tuple[Stride, ...]:
    if spec.query_stride != "auto":
        return (check_query_stride(spec.query_stride),)
    return tuple(stride for stride in CANDIDATES if max(stride) <= WIDEST * cast(float, spec.sigma))


def _choose(spec: SEG, layer: _Layer, errors: list[float]) -> Choice:
    """The widest stride of which it and every finer one hold the tolerance; or the one that was asked for."""
    assert layer.grid is not None
    if spec.query_stride != "auto":
        return Choice(check_query_stride(spec.query_stride), errors[0])
    best = Choice(EVERY_ROW, None)
    for stride, error in zip(_candidates(spec), errors, strict=True):
        points = coarse_grid(layer.grid, stride, spec.boundary)
        if points.tokens == layer.grid.tokens or MARGIN * error > spec.tolerance:
            break
        best = Choice(stride, error)
    return best

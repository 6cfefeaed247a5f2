# SPDX-License-Identifier: Apache-2.0
"""The report of a guidance: how often each layer fired and how far it moved the attention output."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from segkern.integrations.specs import CFG, SAG
from segkern.integrations.specs.base import PlacedSpec, Spec

_ROUNDING = 1e-6  # the least relative distance that counts as moved; more for types whose own rounding is coarser

# What a guidance moves, where it is not the outputs of its layers.
_SUBJECTS: dict[type, str] = {SAG: "its degraded images", CFG: "its predictions"}


class GuidanceWarning(UserWarning):
    """A guidance that never fired, or changed nothing."""


@dataclass(frozen=True)
class LayerReport:
    """The effect of one guidance at one layer.

    Attributes:
        spec: index of the guidance among those given to ``guide``.
        layer: official index of the layer; ``"text"`` for ``CFG``, which has no layer.
        module: name of the layer's attention module; empty for ``CFG``.
        fired: forwards in which the guidance acted there.
        moved: mean over those forwards and the samples of ``|perturbed - conditional| / |conditional|``, L2
            norms of the layer's output; for ``SAG`` of the denoiser's input, for ``CFG`` of its prediction; None when
            it never fired.
    """

    spec: int
    layer: str
    module: str
    fired: int
    moved: float | None


@dataclass(frozen=True)
class Report:
    """The effects of all guidances since ``guide``; ``print`` it for a table.

    Attributes:
        forwards: of the denoiser, guided or not.
        specs: the guidances.
        layers: one entry for each guidance and layer.
        problems: one sentence for each guidance that fired never or moved nothing.
        notes: one sentence for each attention kernel that was chosen for some layers and that guidance replaced there.
    """

    forwards: int
    specs: tuple[Spec, ...]
    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dictionaries and lists, ready for JSON but for infinite sigmas.

        A guidance's functions are told by name, its tensors not at all.
        """
        return {
            "forwards": self.forwards,
            "specs": [_plain(spec.to_dict()) for spec in self.specs],
            "layers": [asdict(row) for row in self.layers],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        blocks = [f"{self.forwards} forwards of the denoiser"]
        for index, spec in enumerate(self.specs):
            rows = [row for row in self.layers if row.spec == index]
            width = max(len("layer"), *(len(row.layer) for row in rows))
            lines = [str(spec), f"  {'layer':<{width}}  {'fired':>5}  {'moved':>8}  module"]
            for row in rows:
                moved = "-" if row.moved is None else f"{row.moved:.2%}"
                lines.append(f"  {row.layer:<{width}}  {row.fired:>5}  {moved:>8}  {row.module}")
            blocks.append("\n".join(lines))
        told = [*(f"warning: {problem}" for problem in self.problems), *(f"note: {note}" for note in self.notes)]
        return "\n\n".join([*blocks, *told])


def _plain(value: Any) -> Any:
    """A spec's value in JSON's types."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return str(value) if isinstance(value, str) else value


@dataclass
class Recorder:
    """Collects what the layers report, on their device and without waiting for it.

    Attributes:
        placed: the guidances and their layers.
        forwards: of the denoiser so far.
        kernels: of attention that were chosen for layers, by the name of the module.
    """

    placed: tuple[PlacedSpec, ...]
    forwards: int = 0
    kernels: dict[str, str] = field(default_factory=dict)
    # Which (guidance, module) pairs fired together -> in how many forwards, and the sum of their relative
    # distances.
    _sums: dict[tuple[tuple[int, str], ...], tuple[int, torch.Tensor]] = field(default_factory=dict, init=False)
    _dtype: torch.dtype = field(default=torch.float32, init=False)

    def add(self, moved: dict[tuple[int, str], torch.Tensor], dtype: torch.dtype) -> None:
        """Take one forward's norms ``[2, samples]`` of each guidance and layer that fired."""
        if not moved:
            return
        self._dtype = dtype
        device = next(iter(moved.values())).device
        norms = torch.stack([pair.to(device) for pair in moved.values()]).float()
        ratios = (norms[:, 0] / norms[:, 1].clamp_min(torch.finfo(torch.float32).tiny)).mean(dim=1)
        fired, total = self._sums.get(tuple(moved), (0, torch.zeros_like(ratios)))
        self._sums[tuple(moved)] = (fired + 1, total + ratios)

    def report(self) -> Report:
        """The report so far. Waits for the device."""
        fired: dict[tuple[int, str], int] = {}
        totals: dict[tuple[int, str], float] = {}
        for pairs, (count, total) in self._sums.items():
            for pair in pairs:
                fired[pair] = fired.get(pair, 0) + count
            if total.is_meta:  # a denoiser without data moves nothing that could be told
                continue
            for pair, value in zip(pairs, total.tolist(), strict=True):
                totals[pair] = totals.get(pair, 0.0) + value
        rows = []
        for index, placed_spec in enumerate(self.placed):
            for name, module in [(layer.name, layer.module) for layer in placed_spec.layers] or [("text", "")]:
                pair = (index, module)
                count = fired.get(pair, 0)
                moved = totals[pair] / count if pair in totals else None
                rows.append(LayerReport(index, name, module, count, moved))
        specs = tuple(placed_spec.spec for placed_spec in self.placed)
        return Report(self.forwards, specs, tuple(rows), self._problems(rows), self._notes(rows))

    def _notes(self, rows: list[LayerReport]) -> tuple[str, ...]:
        layers: dict[str, dict[str, None]] = {}
        for row in rows:
            if row.fired and row.module in self.kernels:
                layers.setdefault(self.kernels[row.module], {})[row.layer] = None
        return tuple(
            f"in guided steps the attention of layers {', '.join(names)} ran on PyTorch's and segkern's kernels, "
            f"not on {kernel}, which was chosen for it"
            for kernel, names in layers.items()
        )

    def warn(self, report: Report, stacklevel: int) -> None:
        """Warn of each problem, at the caller ``stacklevel - 1`` calls above this one."""
        for problem in report.problems:
            warnings.warn(problem, GuidanceWarning, stacklevel=stacklevel)

    def _problems(self, rows: list[LayerReport]) -> tuple[str, ...]:
        problems = []
        for index, spec in enumerate(placed_spec.spec for placed_spec in self.placed):
            moves = [row.moved for row in rows if row.spec == index and row.moved is not None]
            subject = _SUBJECTS.get(type(spec), "its layers")
            rounding = 0.0 if type(spec) in _SUBJECTS else torch.finfo(self._dtype).eps
            if not any(row.fired for row in rows if row.spec == index):
                problems.append(f"{spec} fired in none of {self.forwards} forwards of the denoiser")
            elif any(math.isnan(moved) for moved in moves):
                problems.append(f"{spec} met NaN: the outputs of {subject} are not numbers")
            elif moves and not any(moved > max(_ROUNDING, rounding) for moved in moves):
                problems.append(f"{spec} changed nothing: {subject} moved by {max(moves):.1e} at most")
        return tuple(problems)

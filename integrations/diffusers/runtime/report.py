# SPDX-License-Identifier: Apache-2.0
"""The guidance report: how often each layer was guided and how far its attention output moved."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from segkern.integrations.specs import CFG, SAG
from segkern.integrations.specs.base import PlacedSpec, Spec

_ROUNDING = 1e-6  # smallest relative distance that counts as an effect, unless the dtype rounds more coarsely

# What moves under methods that do not change the outputs of layers.
_SUBJECTS: dict[type, str] = {SAG: "its degraded images", CFG: "its predictions"}


class GuidanceWarning(UserWarning):
    """Guidance had no effect or encountered NaN."""


@dataclass(frozen=True)
class LayerReport:
    """The effect of one guidance spec on one layer.

    Attributes:
        spec: Index of the spec among those passed to ``guide``.
        layer: Official index of the layer; ``"text"`` for ``CFG``, which uses no layer.
        module: Name of the layer's attention module; for ``SLG`` and ``TPG``, of its transformer block; empty for
            ``CFG``.
        fired: Number of denoiser calls in which the spec acted on the layer.
        moved: Relative change ``|perturbed - conditional| / |conditional|``, averaged over those calls and all samples.
            The L2 norms are of the layer's output; for ``SLG`` and ``TPG``, of the image in the block's output; for
            ``SAG``, of the denoiser's input; for ``CFG``, of its prediction. None if the spec never acted.
    """

    spec: int
    layer: str
    module: str
    fired: int
    moved: float | None


@dataclass(frozen=True)
class Report:
    """The effects of all guidance specs since ``guide`` was called. Print it to get a table.

    Attributes:
        forwards: Number of denoiser calls, guided or not.
        specs: The guidance specs.
        layers: One entry for each spec and layer.
        problems: One sentence for each spec that had no effect or encountered NaN.
        notes: One sentence for each attention kernel that the user chose and that guidance replaced in some layers.
    """

    forwards: int
    specs: tuple[Spec, ...]
    layers: tuple[LayerReport, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain dictionaries and lists. They are valid JSON unless a sigma is infinite.

        Functions are represented by their names. Tensors are omitted.
        """
        return {
            "forwards": self.forwards,
            "specs": [_plain(spec.to_dict()) for spec in self.specs],
            "layers": [asdict(row) for row in self.layers],
            "problems": list(self.problems),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        blocks = [f"{self.forwards} denoiser calls"]
        for index, spec in enumerate(self.specs):
            rows = [row for row in self.layers if row.spec == index]
            width = max(len("layer"), *(len(row.layer) for row in rows))
            lines = [str(spec), f"  {'layer':<{width}}  {'fired':>5}  {'moved':>8}  module"]
            for row in rows:
                moved = "-" if row.moved is None else f"{row.moved:.2%}"
                lines.append(f"  {row.layer:<{width}}  {row.fired:>5}  {moved:>8}  {row.module}")
            blocks.append("\n".join(lines))
        remarks = [*(f"warning: {problem}" for problem in self.problems), *(f"note: {note}" for note in self.notes)]
        return "\n\n".join([*blocks, *remarks])


def _plain(value: Any) -> Any:
    """Convert a value of a spec to JSON types."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(value):
        return getattr(value, "__qualname__", repr(value))
    return str(value) if isinstance(value, str) else value


@dataclass
class Recorder:
    """Collects the effects on the layers on their device, without synchronising.

    Attributes:
        placed: The guidance specs and their layers.
        forwards: Number of denoiser calls so far.
        kernels: Attention kernels that the user chose, by module name.
        cause: Why no spec acted, if it is known.
    """

    placed: tuple[PlacedSpec, ...]
    forwards: int = 0
    kernels: dict[str, str] = field(default_factory=dict)
    cause: str = ""
    # For each set of (spec, module) pairs that acted in the same call, and each number of samples: the number of calls
    # and the sum of the relative distances ``[pairs, samples]``.
    _sums: dict[tuple[tuple[tuple[int, str], ...], int], tuple[int, torch.Tensor]] = field(
        default_factory=dict, init=False
    )
    _dtype: torch.dtype = field(default=torch.float32, init=False)
    _warned: tuple[str, ...] = field(default=(), init=False)

    def add(self, moved: dict[tuple[int, str], torch.Tensor], dtype: torch.dtype) -> None:
        """Add the norms ``[2, samples]`` of each spec and layer that acted in one denoiser call."""
        if not moved:
            return
        self._dtype = dtype
        device = next(iter(moved.values())).device
        norms = torch.stack([pair.to(device) for pair in moved.values()]).float()
        ratios = norms[:, 0] / norms[:, 1].clamp_min(torch.finfo(torch.float32).tiny)
        key = tuple(moved), ratios.shape[1]
        fired, total = self._sums.get(key, (0, torch.zeros_like(ratios)))
        self._sums[key] = (fired + 1, total + ratios)

    def report(self, image: int | None = None) -> Report:
        """Return the report so far. Synchronises with the device.

        Args:
            image: Index of an image of the batch; None for all images.

        Raises:
            ValueError: If there is no such image, or if the batch size changed.
        """
        sizes = {samples for _, samples in self._sums}
        if image is not None and sizes and not (len(sizes) == 1 and 0 <= image < min(sizes)):
            raise ValueError(f"image must be an index of one batch size, got {image} for batches of {sorted(sizes)}")
        fired: dict[tuple[int, str], int] = {}
        totals: dict[tuple[int, str], float] = {}
        for (pairs, _), (count, samples) in self._sums.items():
            total = samples.mean(dim=1) if image is None else samples[:, image]
            for pair in pairs:
                fired[pair] = fired.get(pair, 0) + count
            if total.is_meta:  # tensors without data have no distances
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
            f"in guided steps, layers {', '.join(names)} used the attention kernels of PyTorch and segkern instead of "
            f"{kernel}, which was chosen for them"
            for kernel, names in layers.items()
        )

    def warn(self, report: Report, stacklevel: int) -> None:
        """Issue one warning for all problems, unless the last warning was the same.

        The warning points to the caller ``stacklevel - 1`` calls above this one.
        """
        if report.problems and report.problems != self._warned:
            self._warned = report.problems
            warnings.warn("; ".join(report.problems), GuidanceWarning, stacklevel=stacklevel)

    def _problems(self, rows: list[LayerReport]) -> tuple[str, ...]:
        problems = []
        for index, spec in enumerate(placed_spec.spec for placed_spec in self.placed):
            moves = [row.moved for row in rows if row.spec == index and row.moved is not None]
            subject = _SUBJECTS.get(type(spec), "its layers")
            rounding = 0.0 if type(spec) in _SUBJECTS else torch.finfo(self._dtype).eps
            if not any(row.fired for row in rows if row.spec == index):
                cause = self.cause or f"it fired in none of {self.forwards} denoiser calls"
                problems.append(f"{spec} had no effect: {cause}")
            elif any(math.isnan(moved) for moved in moves):
                problems.append(f"{spec} encountered NaN in {subject}")
            elif moves and not any(moved > max(_ROUNDING, rounding) for moved in moves):
                problems.append(f"{spec} had no effect: {subject} moved by at most {max(moves):.1e}")
        return tuple(problems)

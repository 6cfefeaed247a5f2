# SPDX-License-Identifier: Apache-2.0
"""The report of guidance in ComfyUI."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

import torch

from segkern.integrations.specs import PAG, SEG, SLG, TPG


@dataclass
class GuidanceReport:
    """The effect of one guidance method in the current or last run.

    Attributes:
        spec: The guidance spec.
        layers: Names of the perturbed layers.
        skipped: Share of the model's blocks that a perturbed forward pass takes from the model's own.
        evaluations: Number of evaluations of the model.
        full: Reasons why perturbed forward passes were computed in full, with counts.
        prediction: Relative change of the prediction, for each evaluation in which guidance was active.
    """

    spec: SEG | PAG | SLG | TPG
    layers: tuple[str, ...]
    skipped: float = 0.0
    evaluations: int = 0
    full: Counter[str] = field(default_factory=Counter)
    prediction: list[torch.Tensor] = field(default_factory=list)
    _moved: dict[str, torch.Tensor] = field(default_factory=dict)

    def clear(self) -> None:
        """Clear the report at the start of a run."""
        self.evaluations = 0
        self.full.clear()
        self.prediction.clear()
        self._moved.clear()

    def wants(self, layer: str) -> bool:
        """Return True if a layer's effect should be measured: once per run, since it costs another attention call."""
        return layer not in self._moved

    def note(self, layer: str, perturbed: torch.Tensor, own: torch.Tensor) -> None:
        """Record how far a layer's attention moved, without synchronising."""
        self._moved[layer] = distance(perturbed, own)

    @property
    def acted(self) -> int:
        """Number of evaluations in which guidance was active."""
        return len(self.prediction)

    def __str__(self) -> str:
        lines = [f"{title(self.spec)}: acted in {self.acted} of {self.evaluations} evaluations of the model"]
        if self.evaluations == 0:
            lines.append("  The model has not run since the workflow was loaded, or it runs without this guidance.")
        elif self.acted == 0:
            lines.append("  It had no effect: " + self._why_idle())
        else:
            moved = float(torch.stack(self.prediction).mean())
            lines.append(f"  It moved the prediction by {moved:.2%} on average.")
            if moved == 0.0:
                lines.append("  It had no effect: the perturbed prediction equals the model's own.")
            what = "attention" if isinstance(self.spec, (SEG, PAG)) else "the block's output"
            lines += [f"  {name}: moved {what} by {float(by):.1%}" for name, by in self._moved.items()]
            missing = [name for name in self.layers if name not in self._moved]
            if missing:
                lines.append(f"  The model never computed: {', '.join(missing)}.")
            lines.append("  " + self._cost())
        return "\n".join(lines)

    def _why_idle(self) -> str:
        if self.spec.scale == 0.0:
            return "its scale is 0."
        if isinstance(self.spec, SEG) and self.spec.sigma == 0.0:
            return "its sigma is 0."
        return f"no step is between start_percent {self.spec.start:g} and end_percent {self.spec.stop:g}."

    def _cost(self) -> str:
        full = sum(self.full.values())
        if full == 0:
            return (
                f"Each perturbed forward pass shared the model's own forward pass up to its first perturbed layer "
                f"({self.skipped:.0%} of the blocks)."
            )
        reasons = "; ".join(f"{reason} ({count} times)" for reason, count in self.full.items())
        return f"{full} of {self.acted} perturbed forward passes were computed in full: {reasons}."


def title(spec: SEG | PAG | SLG | TPG) -> str:
    """Return a short description of a guidance spec.

    Example:
        >>> title(SEG(scale=3.0, sigma=math.inf))
        'SEG, scale 3, infinite sigma'
    """
    if not isinstance(spec, SEG):
        return f"{type(spec).__name__}, scale {spec.scale:g}"
    sigma = "infinite sigma" if spec.sigma == math.inf else f"sigma {spec.sigma:g}"
    return f"SEG, scale {spec.scale:g}, {sigma}"


def distance(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the relative L2 distance as a float32 tensor on the device."""
    x, own = x.to(torch.float32), own.to(torch.float32)
    return (x - own).norm() / own.norm().clamp_min(torch.finfo(torch.float32).tiny)

# SPDX-License-Identifier: Apache-2.0
"""Base classes of guidance specs. This module does not import diffusers.

Each spec adds ``scale * (reference - degraded)`` to the prediction. Specs differ in how they compute the degraded
prediction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from segkern.integrations.specs.layer_names import LayerInfo, layer_name
from segkern.integrations.specs.schedules import Schedule, check_schedule, factor, is_number
from segkern.integrations.specs.sigmas import Sigmas

Layers = str | int | range | Sequence[str | int | range]

MAIN_FIELDS = ("scale", "sigma", "layers", "layer")  # always shown by repr


class Spec(ABC):
    """Fields that all guidance methods share.

    Attributes:
        scale: Guidance scale.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops.
        schedule: How the scale changes over the inference steps.
        reuse: Number of guided steps that share one degraded prediction.
    """

    scale: float
    start: float
    stop: float
    schedule: Schedule
    reuse: int

    def strength(self, fraction: float, timestep: float | None = None) -> float:
        """Return the scale at a fraction of the inference steps, ``step / steps``; 0 if guidance is inactive there.

        ``timestep`` is the scheduler's timestep. Only methods whose scale depends on it read it.
        """
        if self.scale == 0.0 or not self.start <= fraction < self.stop:
            return 0.0
        return self.scale * factor(type(self).__name__, self.schedule, fraction, self.start, self.stop)

    @property
    def depends_on_step(self) -> bool:
        """True if guidance differs between steps. Subclasses that override ``strength`` always count as dependent."""
        own = not str(type(self).strength.__module__).startswith("segkern.")
        return own or self.start > 0.0 or self.stop < 1.0 or self.schedule != "constant" or self.reuse > 1

    def __repr__(self) -> str:
        """Show the main values and all values that differ from the defaults."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.main_values().items())})"

    def to_dict(self) -> dict[str, Any]:
        """Return all values except tensors, by field name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]

    def main_values(self, always: Container[str] = MAIN_FIELDS) -> dict[str, Any]:
        """Return the values of the fields in ``always``, unless None, and all values that differ from the defaults."""
        defaults = {f.name: f.default for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: value
            for name, value in self.to_dict().items()
            if value != defaults[name] or (name in always and value is not None)
        }

    def active(self, fraction: float) -> bool:
        """Return True if guidance is active at this fraction of the inference steps."""
        return self.strength(fraction) != 0.0

    def _check_common(self) -> None:
        owner = type(self).__name__
        if not (is_number(self.scale) and math.isfinite(self.scale)):
            raise ValueError(f"{owner}.scale must be a finite number, got {self.scale!r}")
        if not (is_number(self.start) and is_number(self.stop) and 0.0 <= self.start < self.stop <= 1.0):
            raise ValueError(
                f"{owner}.start and {owner}.stop must be fractions of the run with 0 <= start < stop <= 1, "
                f"got start={self.start!r}, stop={self.stop!r}"
            )
        check_schedule(owner, self.schedule)
        if not isinstance(self.reuse, int) or isinstance(self.reuse, bool) or self.reuse < 1:
            raise ValueError(
                f"{owner}.reuse must be an integer of at least 1 (1 computes every branch), got {self.reuse!r}"
            )


class LayeredSpec(Spec):
    """A guidance method that computes its degraded prediction by changing some layers.

    Attributes:
        layers: Layers to perturb; None for the model's default.
    """

    layers: Layers | None

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the perturbed layers; empty for the model's default."""
        if self.layers is None:
            return ()
        return _names(type(self).__name__, (self.layers,) if isinstance(self.layers, str) else self.layers)

    def _check_layers(self) -> None:
        names = self.layer_names
        if self.layers is not None and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", names)


class AttentionSpec(LayeredSpec):
    """A guidance method that changes attention in some self-attention layers.

    Attributes:
        blend: Share of the perturbed attention in a layer's output. 1 uses the perturbed attention only.
    """

    blend: float
    # Only a blur has these. In a layer shared with a blur, methods without one use the blur's values.
    boundary: str | None = None
    backend: str | None = None
    query_stride: int | tuple[int, int] = 1

    @abstractmethod
    def perturbs(self) -> bool:
        """Return True if the spec changes any layer."""

    def strength(self, fraction: float, timestep: float | None = None) -> float:
        """Return the scale at a fraction of the inference steps; 0 if the spec changes no layer."""
        return super().strength(fraction, timestep) if self.perturbs() and self.blend else 0.0

    def _check_attention(self) -> None:
        owner = type(self).__name__
        if not (is_number(self.blend) and 0.0 <= self.blend <= 1.0):
            raise ValueError(
                f"{owner}.blend must lie between 0 (the layer's own attention) and 1 (the perturbed attention), got "
                f"{self.blend!r}"
            )
        self._check_layers()


class BlockSpec(LayeredSpec):
    """A guidance method that skips whole transformer blocks, or changes the order of their tokens.

    A layer name selects the block that contains the layer.
    """

    def chosen(self, step: int, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the layers whose blocks are changed in a step, from the names of all layers of the spec."""
        return tuple(layers)


def _names(owner: str, layers: Layers) -> tuple[str, ...]:
    """Return layer names as a tuple, so later changes to the caller's list do not affect the spec."""
    given: Any = (layers,) if isinstance(layers, (int, range)) else layers
    several = given if isinstance(given, (list, tuple, set, frozenset)) else ()
    names = tuple(name for name in map(layer_name, several) if name is not None)
    if not names or len(names) != len(several):
        raise ValueError(
            f"{owner}.layers must be a layer name such as 'mid', 'd4' or 'u0-29', for a transformer a block number or "
            f"a range of them, or a list of these, got {layers!r}"
        )
    return names


@dataclass(frozen=True)
class PlacedSpec:
    """A spec with the layers it acts on.

    Attributes:
        spec: The spec.
        layers: The layers that the spec perturbs or reads, in execution order; empty if it uses no layers.
        sigmas: Sigmas of each blurred layer, by module name; empty for identity attention.
    """

    spec: Spec
    layers: tuple[LayerInfo, ...] = ()
    sigmas: Mapping[str, Sigmas] = field(default_factory=dict)

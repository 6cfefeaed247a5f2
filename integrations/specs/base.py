# SPDX-License-Identifier: Apache-2.0
"""Base classes of guidance specs: the scale, and the part of a run in which a guidance acts. No diffusers in here.

Each adds ``scale * (reference - degraded)`` to the prediction; they differ in how the degraded one comes about.
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

MAIN_FIELDS = ("scale", "sigma", "layers", "layer")  # which a repr always shows


class Spec(ABC):
    """The fields that all guidances have.

    Attributes:
        scale: how far the prediction moves.
        start: fraction of the run at which it begins to act.
        stop: fraction of the run from which it no longer acts.
        schedule: of the scale over the run.
        reuse: forwards for which a degraded prediction serves.
    """

    scale: float
    start: float
    stop: float
    schedule: Schedule
    reuse: int

    def strength(self, fraction: float, timestep: float | None = None) -> float:
        """The scale at a fraction of the run, ``step / steps``; 0 where the guidance does not act.

        ``timestep`` is the scheduler's, for those whose scale depends on it.
        """
        if self.scale == 0.0 or not self.start <= fraction < self.stop:
            return 0.0
        return self.scale * factor(type(self).__name__, self.schedule, fraction, self.start, self.stop)

    @property
    def depends_on_step(self) -> bool:
        """True if it does not act alike in all steps of a run; so is taken a class with a ``strength`` of its own."""
        own = not str(type(self).strength.__module__).startswith("segkern.")
        return own or self.start > 0.0 or self.stop < 1.0 or self.schedule != "constant" or self.reuse > 1

    def __repr__(self) -> str:
        """Its main values, and what else differs from the defaults."""
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.main_values().items())})"

    def to_dict(self) -> dict[str, Any]:
        """Its values by name, but for tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.repr}  # type: ignore[arg-type]

    def main_values(self, always: Container[str] = MAIN_FIELDS) -> dict[str, Any]:
        """The values of some fields, where they have one, and whatever else differs from the defaults."""
        defaults = {f.name: f.default for f in fields(self)}  # type: ignore[arg-type]
        return {
            name: value
            for name, value in self.to_dict().items()
            if value != defaults[name] or (name in always and value is not None)
        }

    def active(self, fraction: float) -> bool:
        """True if it acts at this fraction of the run."""
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


class AttentionSpec(Spec):
    """A guidance whose degraded prediction comes from another attention in some self-attention layers.

    Attributes:
        layers: where it acts; None for the model's own default.
        blend: 1 is the other attention alone, less mixes it with the layer's own.
    """

    layers: Layers | None
    blend: float
    # Of a blur; a guidance without one takes what others ask for in a layer they share.
    boundary: str | None = None
    backend: str | None = None
    query_stride: int | tuple[int, int] = 1

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of its layers; none where they are the model's own default."""
        if self.layers is None:
            return ()
        return _names(type(self).__name__, (self.layers,) if isinstance(self.layers, str) else self.layers)

    @abstractmethod
    def perturbs(self) -> bool:
        """True if it changes any layer at all."""

    def strength(self, fraction: float, timestep: float | None = None) -> float:
        """The scale at a fraction of the run; 0 too where the layers would stay what they are."""
        return super().strength(fraction, timestep) if self.perturbs() and self.blend else 0.0

    def _check_attention(self) -> None:
        owner = type(self).__name__
        if not (is_number(self.blend) and 0.0 <= self.blend <= 1.0):
            raise ValueError(
                f"{owner}.blend must lie between 0 (the layer's own attention) and 1 (the perturbed one), got "
                f"{self.blend!r}"
            )
        names = self.layer_names
        if self.layers is not None and not isinstance(self.layers, str):
            object.__setattr__(self, "layers", names)


def _names(owner: str, layers: Layers) -> tuple[str, ...]:
    """Several layer names as a tuple, so that a spec stays what it was when its caller's list changes."""
    given: Any = (layers,) if isinstance(layers, (int, range)) else layers
    several = given if isinstance(given, (list, tuple, set, frozenset)) else ()
    names = tuple(name for name in map(layer_name, several) if name is not None)
    if not names or len(names) != len(several):
        raise ValueError(
            f"{owner}.layers must be a layer name such as 'mid', 'd4', 'u0-29', of a transformer a block's number or a "
            f"range of them, or a list of those, got {layers!r}"
        )
    return names


@dataclass(frozen=True)
class PlacedSpec:
    """One guidance and where it acts.

    Attributes:
        spec: it.
        layers: those it perturbs, or the one it reads, in execution order; none for one that has no layers.
        sigmas: of each blurred layer, by its module; none for identity attention.
    """

    spec: Spec
    layers: tuple[LayerInfo, ...] = ()
    sigmas: Mapping[str, Sigmas] = field(default_factory=dict)

# SPDX-License-Identifier: Apache-2.0
"""Guidance settings to sample with, and the lists of settings that a study measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segkern.integrations.specs.base import Spec

MODES = ("unconditional", "prompts")

# Fields that older evaluations do not have, with the values that those evaluations used.
_LATER = {"reuse": 1, "pag": 0.0, "sag": 0.0, "slg": 0.0, "tpg": 0.0}


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        mode: ``"unconditional"`` (the empty prompt) or ``"prompts"``.
        cfg: ``guidance_scale`` of classifier-free guidance; 1 turns it off.
        seg: Scale of smoothed energy guidance; 0 turns it off.
        sigma: Blur in tokens of the model's grid; ``math.inf`` uses the mean query. 0 without SEG.
        layers: Guided layers of SEG, SLG and TPG, separated by commas; empty without them.
        start: Fraction of the steps at which SEG, SLG and TPG start.
        stop: Fraction of the steps at which SEG, SLG and TPG stop.
        reuse: Number of steps that use the same perturbed branch.
        pag: Scale of perturbed-attention guidance in the mid block; 0 turns it off.
        sag: Scale of self-attention guidance; 0 turns it off.
        slg: Scale of skip-layer guidance; 0 turns it off.
        tpg: Scale of token perturbation guidance; 0 turns it off.
    """

    mode: str
    cfg: float = 1.0
    seg: float = 0.0
    sigma: float = 0.0
    layers: str = ""
    start: float = 0.0
    stop: float = 1.0
    reuse: int = 1
    pag: float = 0.0
    sag: float = 0.0
    slg: float = 0.0
    tpg: float = 0.0

    @property
    def method(self) -> str:
        """Names of the guidance methods in use, such as ``CFG + SEG``, or ``none``."""
        scales = {"CFG": self.cfg - 1, "SEG": self.seg, "PAG": self.pag, "SAG": self.sag}
        scales |= {"SLG": self.slg, "TPG": self.tpg}
        return " + ".join(name for name, scale in scales.items() if scale > 0) or "none"

    def specs(self) -> tuple[Spec, ...]:
        """Return the specs for ``guide``. The pipeline itself applies classifier-free guidance."""
        from segkern.integrations.diffusers import PAG, SAG, SEG, SLG, TPG

        specs: list[Spec] = []
        layers = self.layers.split(",")
        if self.seg:
            specs.append(SEG(self.seg, self.sigma, layers, self.start, self.stop, reuse=self.reuse))
        if self.pag:
            specs.append(PAG(self.pag))
        if self.sag:
            specs.append(SAG(self.sag))
        if self.slg:
            specs.append(SLG(self.slg, layers, self.start, self.stop))
        if self.tpg:
            specs.append(TPG(self.tpg, layers, self.start, self.stop))
        return tuple(specs)

    def to_dict(self) -> dict[str, Any]:
        """Return the setting in JSON types. Newer fields that have their default are left out."""
        fields = asdict(self) | {"sigma": "inf" if math.isinf(self.sigma) else self.sigma}
        return {name: value for name, value in fields.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Setting:
        """Return the setting from the dictionary that ``to_dict`` returned."""
        return cls(**(fields | {"sigma": float(fields["sigma"])}))


def grid(
    mode: str, scales: Sequence[float], sigmas: Sequence[float], cfg_scales: Sequence[float], layers: str = "mid"
) -> list[Setting]:
    """Return no guidance and SEG at every scale and sigma; with prompts also CFG, and SEG with CFG.

    Example:
        >>> [setting.method for setting in grid("prompts", [3.0], [math.inf], [2.0])]
        ['none', 'CFG', 'SEG', 'CFG + SEG']
    """
    settings = [Setting(mode)]
    if mode == "prompts":
        settings += [Setting(mode, cfg=cfg) for cfg in cfg_scales]
    settings += [Setting(mode, 1.0, scale, sigma, layers) for sigma in sigmas for scale in scales]
    if mode == "prompts" and cfg_scales:
        middle = cfg_scales[len(cfg_scales) // 2]
        settings += [Setting(mode, middle, scale, sigmas[-1], layers) for scale in scales]
    return settings


def variants(mode: str, scales: Sequence[float], sigma: float) -> list[Setting]:
    """Return SEG in other layers and in each half of the steps."""
    places = [("down", 0.0, 1.0), ("up", 0.0, 1.0), ("mid,up", 0.0, 1.0), ("mid", 0.0, 0.5), ("mid", 0.5, 1.0)]
    return [Setting(mode, 1.0, scale, sigma, *place) for place in places for scale in scales]

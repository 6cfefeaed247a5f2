# SPDX-License-Identifier: Apache-2.0
"""Settings of guidance to sample with, and the lists of them that a study measures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segkern.integrations.specs.base import Spec

MODES = ("unconditional", "prompts")

# Fields that were not there when the committed evaluation was made, and what they were then.
_LATER = {"reuse": 1, "pag": 0.0, "sag": 0.0}


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        mode: ``"unconditional"`` (the empty prompt) or ``"prompts"``.
        cfg: ``guidance_scale`` of classifier-free guidance; 1 is none.
        seg: scale of smoothed energy guidance; 0 is none.
        sigma: blur in tokens of the model's own grid; ``math.inf`` is the mean query. 0 without SEG.
        layers: guided layers, as ``SEG`` takes them; empty without SEG.
        start: fraction of the run at which SEG begins.
        stop: fraction of the run at which it ends.
        reuse: steps for which a perturbed branch serves.
        pag: scale of perturbed-attention guidance in the mid block; 0 is none.
        sag: scale of self-attention guidance; 0 is none.
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

    @property
    def method(self) -> str:
        """``none``, or which of ``CFG``, ``SEG``, ``PAG`` and ``SAG`` are in it, such as ``CFG + SEG``."""
        scales = {"CFG": self.cfg - 1, "SEG": self.seg, "PAG": self.pag, "SAG": self.sag}
        return " + ".join(name for name, scale in scales.items() if scale > 0) or "none"

    def specs(self) -> tuple[Spec, ...]:
        """The guidances to hand to ``guide``; classifier-free guidance is the pipeline's own."""
        from segkern.integrations.diffusers import PAG, SAG, SEG

        specs: list[Spec] = []
        if self.seg:
            layers = self.layers.split(",")
            specs.append(SEG(self.seg, self.sigma, layers, self.start, self.stop, reuse=self.reuse))
        if self.pag:
            specs.append(PAG(self.pag))
        if self.sag:
            specs.append(SAG(self.sag))
        return tuple(specs)

    def to_dict(self) -> dict[str, Any]:
        """The setting in JSON's types, infinity as a word; without what came later and is at its default."""
        fields = asdict(self) | {"sigma": "inf" if math.isinf(self.sigma) else self.sigma}
        return {name: value for name, value in fields.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Setting:
        """The setting that ``to_dict`` wrote."""
        return cls(**(fields | {"sigma": float(fields["sigma"])}))


def grid(
    mode: str, scales: Sequence[float], sigmas: Sequence[float], cfg_scales: Sequence[float], layers: str = "mid"
) -> list[Setting]:
    """No guidance, CFG where there are prompts, and SEG at every scale and sigma; with prompts also both together.

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
    """SEG in other layers, and in halves of the run: where else one may look for a setting that helps."""
    places = [("down", 0.0, 1.0), ("up", 0.0, 1.0), ("mid,up", 0.0, 1.0), ("mid", 0.0, 0.5), ("mid", 0.5, 1.0)]
    return [Setting(mode, 1.0, scale, sigma, *place) for place in places for scale in scales]

# SPDX-License-Identifier: Apache-2.0
"""Presets of guidance settings that the page offers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Guidance settings with a name; a preset also selects the model's default layers and all steps.

    Attributes:
        name: Text of the button.
        guidances: Guidance methods.
        seg_scale: Scale of SEG.
        pag_scale: Scale of PAG.
        sigma: Sigma of SEG.
    """

    name: str
    guidances: tuple[str, ...] = ("SEG",)
    seg_scale: str = "3"
    pag_scale: str = "3"
    sigma: str = "inf"

    def describe(self) -> str:
        """Return the settings in words.

        Example:
            >>> Preset("Strong", seg_scale="6").describe()
            'SEG scale 6, sigma inf'
        """
        words = {"SEG": f"SEG scale {self.seg_scale}, sigma {self.sigma}", "PAG": f"PAG scale {self.pag_scale}"}
        return " + ".join(words[name] for name in self.guidances)


PRESETS = (
    Preset("Official SEG"),
    Preset("PAG", ("PAG",)),
    Preset("SEG + PAG", ("SEG", "PAG"), seg_scale="1.5", pag_scale="1.5"),
    Preset("Gentle", seg_scale="1"),
    Preset("Strong", seg_scale="6"),
)

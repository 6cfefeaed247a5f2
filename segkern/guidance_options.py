# SPDX-License-Identifier: Apache-2.0
"""The guidances that a command's options ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segkern.drawing import Specs
from segkern.options import listed

NAMES = ("seg", "pag", "sag")


def names_of(text: str) -> tuple[str, ...]:
    """The guidances in ``seg,pag``.

    Raises:
        ValueError: for another word, or one that comes twice.

    Example:
        >>> names_of("seg, PAG")
        ('seg', 'pag')
    """
    found = listed("--guidance", text.lower(), str, f"some of {', '.join(NAMES)}")
    for name in found:
        if name not in NAMES:
            raise ValueError(f"--guidance takes some of {', '.join(NAMES)} with commas, got {name!r} in {text!r}")
    return found


def specs_of(
    names: tuple[str, ...], scales: Mapping[str, float], layers: list[str], common: Mapping[str, Any], blur: Any
) -> Specs:
    """One spec for each name.

    Args:
        names: of the guidances.
        scales: of each.
        layers: of those that perturb layers.
        common: ``start``, ``stop`` and whatever else all of them take.
        blur: what SEG alone takes.

    Raises:
        ValueError: for what a spec refuses.
    """
    from segkern.integrations.diffusers import PAG, SAG, SEG

    made = {
        "seg": lambda scale: SEG(scale, layers=layers, **blur, **common),
        "pag": lambda scale: PAG(scale, layers=layers, **common),
        "sag": lambda scale: SAG(scale, **common),
    }
    return tuple(made[name](scales[name]) for name in names)

# SPDX-License-Identifier: Apache-2.0
"""The guidances that a command's options ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from segkern.generation.drawing import Specs
from segkern.generation.options import listed

NAMES = ("seg", "pag", "sag")
_USUAL = {"seg": 3.0, "pag": 3.0, "sag": 0.75}


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


def scales_of(names: tuple[str, ...], given: Mapping[str, float | None]) -> dict[str, float]:
    """The scale of each guidance, its usual one if none was given.

    Raises:
        ValueError: for a scale of a guidance that is not among the names.
    """
    for name, scale in given.items():
        if scale is not None and name not in names:
            option = "--scale" if name == "seg" else f"--{name}-scale"
            raise ValueError(f"{option} {scale:g} is of {name}, which is not in --guidance {','.join(names)}")
    return {name: _USUAL[name] if given[name] is None else float(given[name] or 0.0) for name in names}


def refuse_blur(guidance: str, compare: bool, sigma: str | None, boundary: str, backend: str, stride: str) -> None:
    """Refuse options of seg where it is not asked for.

    Raises:
        ValueError: for the first of them.
    """
    given = {"--compare": compare or None, "--sigma": sigma}
    given |= {"--boundary": boundary if boundary != "reflect" else None}
    given |= {"--backend": backend if backend != "auto" else None}
    given |= {"--query-stride": stride if stride != "1" else None}
    for option, value in given.items():
        if value is not None:
            words = option if value is True else f"{option} {value}"
            raise ValueError(f"{words} is of seg, which is not in --guidance {guidance}")


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

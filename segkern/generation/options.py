# SPDX-License-Identifier: Apache-2.0
"""Options in words, of the command line and of the playground's fields, as values and guidances."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from segkern.generation.drawing import Specs

GUIDANCES = ("seg", "pag", "sag")
_USUAL_SCALES = {"seg": 3.0, "pag": 3.0, "sag": 0.75}

T = TypeVar("T", int, float, str)


def parse_list(option: str, text: str, kind: Callable[[str], T], what: str, *, empty: bool = False) -> tuple[T, ...]:
    """The values in ``1,2,3``.

    Args:
        option: such as ``sigma``, for messages.
        text: the user's words.
        kind: makes a value of one word.
        what: such values in words, for messages.
        empty: whether an empty text is no value; an error if not.

    Raises:
        ValueError: for a word that is no such value, one that comes twice, and an empty text.

    Example:
        >>> parse_list("sigma", "1, 4,inf", float, "numbers such as 4 or inf")
        (1.0, 4.0, inf)
    """
    if not text.strip():
        if empty:
            return ()
        raise ValueError(f"{option} needs at least one value, got {text!r}")
    values: list[T] = []
    for word in (part.strip() for part in text.split(",")):
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(f"{option} takes {what}, got {word!r}") from None
        if value in values:
            raise ValueError(f"{option}: {word} comes twice in {text!r}")
        values.append(value)
    return tuple(values)


def parse_guidance(text: str) -> tuple[str, ...]:
    """The guidances in ``seg,pag``; none in ``none``.

    Raises:
        ValueError: for another word, or one that comes twice.

    Example:
        >>> parse_guidance("seg, PAG")
        ('seg', 'pag')
    """
    words = f"some of {', '.join(GUIDANCES)} with commas, or none"
    names = parse_list("guidance", text.lower(), str, words)
    if names == ("none",):
        return ()
    for name in names:
        if name not in GUIDANCES:
            raise ValueError(f"guidance takes {words}, got {name!r} in {text!r}")
    return names


def guidance_scales(names: Sequence[str], given: Mapping[str, float | None]) -> dict[str, float]:
    """The scale of each guidance, its usual one where none was given.

    Raises:
        ValueError: for a scale of a guidance that is not among the names.
    """
    for name, scale in given.items():
        if scale is not None and name not in names:
            raise ValueError(f"{name} has the scale {scale:g} but is not in guidance {','.join(names) or 'none'}")
    scales = {name: given.get(name) for name in names}
    return {name: _USUAL_SCALES[name] if scale is None else scale for name, scale in scales.items()}


def make_specs(scales: Mapping[str, float], layers: list[str], sigma: float, **common: Any) -> Specs:
    """One spec for each guidance that has a scale.

    Args:
        scales: by the guidances' names.
        layers: of those that perturb layers.
        sigma: of SEG's blur.
        common: ``start``, ``stop`` and other values that all of them take.

    Raises:
        ValueError: for values that a spec refuses.
    """
    from segkern.integrations.diffusers import PAG, SAG, SEG

    constructors = {
        "seg": lambda scale: SEG(scale, sigma, layers, **common),
        "pag": lambda scale: PAG(scale, layers, **common),
        "sag": lambda scale: SAG(scale, **common),
    }
    return tuple(constructors[name](scale) for name, scale in scales.items())

# SPDX-License-Identifier: Apache-2.0
"""Options of the command line whose words hold more than one value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

T = TypeVar("T", int, float, str)


def listed(option: str, text: str, kind: Callable[[str], T], what: str, *, empty: bool = False) -> tuple[T, ...]:
    """The values in ``1,2,3``.

    Args:
        option: such as ``--sigmas``, for messages.
        text: the user's words.
        kind: makes a value of one word.
        what: such values in words, for messages.
        empty: whether an empty text is no value; an error if not.

    Raises:
        ValueError: for a word that is no such value, one that comes twice, and an empty text.

    Example:
        >>> listed("--sigmas", "1, 4,inf", float, "numbers such as 4 or inf")
        (1.0, 4.0, inf)
    """
    if not text.strip():
        if empty:
            return ()
        raise ValueError(f"{option} needs at least one value, got {text!r}")
    found: list[T] = []
    for word in (part.strip() for part in text.split(",")):
        try:
            value = kind(word)
        except ValueError:
            raise ValueError(f"{option} takes {what}, got {word!r}") from None
        if value in found:
            raise ValueError(f"{option}: {word} comes twice in {text!r}")
        found.append(value)
    return tuple(found)


def stride(option: str, text: str) -> int | tuple[int, int] | Literal["auto"]:
    """The stride in ``4``, ``2,3`` or ``auto``.

    Args:
        option: such as ``--query-stride``, for messages.
        text: the user's words.

    Raises:
        ValueError: for words that are none of these. Whether the numbers fit is asked elsewhere.

    Example:
        >>> [stride("--query-stride", text) for text in ("4", "2,3", "auto")]
        [4, (2, 3), 'auto']
    """
    if text.strip() == "auto":
        return "auto"
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise ValueError(f"{option} takes auto, one number such as 4, or height and width such as 2,3; got {text!r}")

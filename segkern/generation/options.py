# SPDX-License-Identifier: Apache-2.0
"""Options of the command line that are read from several parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from segkern.grid import Grid

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


def size_of(option: str, text: str) -> Grid:
    """The grid in ``64x48``: height and width in tokens.

    Raises:
        ValueError: for anything else.

    Example:
        >>> size_of("--shape", "26x38")
        Grid(height=26, width=38, start=0)
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} takes a height and a width in tokens such as 64x64, got {text!r}")
    return Grid(int(parts[0]), int(parts[1]))


def stride(option: str, text: str) -> int | tuple[int, int]:
    """The stride in ``4`` or ``2,3``.

    Args:
        option: such as ``--query-stride``, for messages.
        text: the user's words.

    Raises:
        ValueError: for words that are neither. Whether the numbers fit is asked elsewhere.

    Example:
        >>> [stride("--query-stride", text) for text in ("4", "2,3")]
        [4, (2, 3)]
    """
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) == 1:
        return numbers[0]
    if len(numbers) == 2:
        return numbers[0], numbers[1]
    raise ValueError(f"{option} takes one number such as 4, or height and width such as 2,3; got {text!r}")

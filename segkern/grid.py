# SPDX-License-Identifier: Apache-2.0
"""Where the image lies in a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Grid:
    """An image of ``height x width`` tokens inside a sequence, row-major, from token ``start`` on.

    Tokens before ``start`` and from ``stop`` on (text tokens of a joint attention) are not part of the
    image: they are never blurred and never enter a mean.

    Args:
        height: rows of tokens, at least 1.
        width: columns of tokens, at least 1.
        start: index of the image's first token in the sequence.

    Raises:
        ValueError: when a number is not an integer or out of range.

    Example:
        >>> grid = Grid(26, 38, start=77)
        >>> grid.tokens, grid.stop
        (988, 1065)
    """

    height: int
    width: int
    start: int = 0

    def __post_init__(self) -> None:
        value: Any
        for name, value, least in (("height", self.height, 1), ("width", self.width, 1), ("start", self.start, 0)):
            # torch.SymInt while compiling; other integers (NumPy's) by their protocol.
            integral = isinstance(value, (int, torch.SymInt)) or hasattr(value, "__index__")
            if isinstance(value, bool) or not integral:
                raise ValueError(f"Grid.{name} must be an integer of at least {least}, got {value!r}")
            if value < least:
                raise ValueError(f"Grid.{name} must be at least {least}, got {value}")

    @property
    def tokens(self) -> int:
        """Number of image tokens, ``height * width``."""
        return self.height * self.width

    @property
    def stop(self) -> int:
        """Index of the first token after the image."""
        return self.start + self.height * self.width

    def check(self, tokens: int) -> None:
        """Raise a ValueError unless the grid lies inside a sequence of ``tokens`` tokens."""
        if self.stop > tokens:
            raise ValueError(
                f"{self} covers tokens {self.start} to {self.stop - 1} ({self.height} x {self.width} = "
                f"{self.tokens}), but the sequence has only {tokens} tokens; height * width + start "
                f"must be at most {tokens}"
            )

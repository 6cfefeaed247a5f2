# SPDX-License-Identifier: Apache-2.0
"""The position of an image, or of the frames of a video, in a sequence of tokens."""

from __future__ import annotations

from dataclasses import dataclass

from segkern.core.numbers import whole_number


@dataclass(frozen=True)
class Grid:
    """An image of ``height x width`` tokens inside a sequence, in row-major order, starting at token ``start``.

    Tokens before ``start`` and from ``stop`` on (such as the text tokens of a joint attention) are not part of the
    image: they are never blurred and never enter a mean. With ``frames``, the sequence has that many images one after
    another, and each is blurred separately.

    Args:
        height: Number of token rows, at least 1.
        width: Number of token columns, at least 1.
        start: Index of the image's first token in the sequence.
        frames: Number of video frames, at least 1.

    NumPy integers and one-element integer tensors are converted to Python integers.

    Raises:
        ValueError: If a number is not an integer or is out of range, or if it is a size that ``torch.jit.trace``
            records as a tensor.

    Example:
        >>> grid = Grid(26, 38, start=77)
        >>> grid.tokens, grid.stop
        (988, 1065)
        >>> Grid(30, 52, frames=21).tokens
        32760
    """

    height: int
    width: int
    start: int = 0
    frames: int = 1

    def __post_init__(self) -> None:
        least_of = {"height": 1, "width": 1, "start": 0, "frames": 1}
        for name, least in least_of.items():
            given = getattr(self, name)
            value = whole_number(given)
            if value is None:
                raise ValueError(f"Grid.{name} must be an integer of at least {least}, got {given!r}")
            if value < least:
                raise ValueError(f"Grid.{name} must be at least {least}, got {value}")
            if value is not given:
                object.__setattr__(self, name, value)

    @property
    def tokens(self) -> int:
        """Number of image tokens, ``frames * height * width``."""
        return self.frames * self.height * self.width

    @property
    def stop(self) -> int:
        """Index of the first token after the image."""
        return self.start + self.tokens

    def check(self, tokens: int) -> None:
        """Raise a ValueError unless the grid lies inside a sequence of ``tokens`` tokens."""
        if self.stop > tokens:
            raise ValueError(
                f"{self} covers tokens {self.start} to {self.stop - 1} ({self._product()} = {self.tokens}), but the "
                f"sequence has only {tokens} tokens; {'' if self.frames == 1 else 'frames * '}height * width + start "
                f"must be at most {tokens}"
            )

    def __repr__(self) -> str:
        frames = "" if self.frames == 1 else f", frames={self.frames}"
        return f"Grid(height={self.height}, width={self.width}, start={self.start}{frames})"

    def _product(self) -> str:
        return f"{'' if self.frames == 1 else f'{self.frames} x '}{self.height} x {self.width}"

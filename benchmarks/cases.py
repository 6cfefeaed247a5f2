# SPDX-License-Identifier: Apache-2.0
"""The layers to measure: shapes of real models, and random queries, keys and values of these shapes.

A batch is [unconditional, conditional, perturbed]. Only its last third is blurred.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch

from segkern import Grid


@dataclass(frozen=True)
class Case:
    """One attention layer.

    Attributes:
        name: Name, such as ``sdxl-64x64``.
        grid: Grid of the image tokens.
        heads: Number of heads.
        head_dim: Channels per head.
        batch: Number of samples; a third of them are blurred.
        tokens: Length of the sequence. Tokens outside the grid are text tokens.
        dtype: Dtype of queries, keys and values.
    """

    name: str
    grid: Grid
    heads: int
    head_dim: int
    batch: int
    tokens: int
    dtype: torch.dtype = torch.float32

    @property
    def third(self) -> int:
        """Number of blurred samples."""
        return self.batch // 3

    @property
    def attention_flops(self) -> float:
        """FLOPs of unblurred attention of the whole batch; a multiply-add counts as two."""
        return 4.0 * self.batch * self.heads * self.tokens**2 * self.head_dim

    @property
    def label(self) -> str:
        """Description, such as ``64x64 tokens, 10 heads``."""
        text = self.tokens - self.grid.tokens
        also = f" and {text} of text" if text else ""
        return f"{self.grid.height}x{self.grid.width} tokens{also}, {self.heads} heads"

    @property
    def dtype_name(self) -> str:
        """Name of the dtype, such as ``float32``."""
        return str(self.dtype).removeprefix("torch.")

    def of(self, dtype: torch.dtype) -> Case:
        """Return the same layer in another dtype."""
        return replace(self, dtype=dtype)

    def sigmas(self, sigma: float) -> tuple[float, ...]:
        """Return one sigma per sample."""
        return (0.0,) * (self.batch - self.third) + (sigma,) * self.third

    def inputs(self, device: torch.device) -> Inputs:
        """Return random query, key and value in the layout of projections: ``[batch, tokens, heads, dim]``."""
        shape = (self.batch, self.tokens, self.heads, self.head_dim)
        generator = torch.Generator().manual_seed(0)
        drawn = (torch.randn(shape, generator=generator).to(device, self.dtype).transpose(1, 2) for _ in range(3))
        return Inputs(self, *drawn)


@dataclass(frozen=True)
class Inputs:
    """Query, key and value of a case, each ``[batch, heads, tokens, head_dim]``."""

    case: Case
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.query.device


def _image(model: str, height: int, width: int, heads: int, head_dim: int, batch: int = 3) -> Case:
    name = f"{model}-{height}x{width}" + ("" if batch == 3 else f"-b{batch}")
    return Case(name, Grid(height, width), heads, head_dim, batch, height * width)


# SD3 places the text after the image, Flux before it.
_ALL = (
    *(_image("sdxl", h, w, heads, 64, b) for b in (3, 6) for h, w, heads in ((32, 32, 20), (64, 64, 10))),
    _image("sdxl", 26, 38, 20, 64),  # 832x1216 pixels
    _image("sdxl", 52, 76, 10, 64),
    _image("sd15", 64, 64, 8, 40),
    _image("sd15", 32, 32, 8, 80),
    _image("sd15", 16, 16, 8, 160),
    Case("sd3-64x64", Grid(64, 64), 24, 64, 3, 64 * 64 + 154),
    Case("flux-64x64", Grid(64, 64, start=512), 24, 128, 3, 64 * 64 + 512),
    _image("sdxl", 128, 128, 10, 64),  # 16,384 tokens: 2048x2048 pixels
    # These take seconds on any machine. They check that everything runs; their speed is meaningless.
    _image("tiny", 6, 10, 2, 16),
    Case("tiny-text-5x7", Grid(5, 7, start=3), 2, 16, 3, 5 * 7 + 3),
)
CASES = {case.name: case for case in _ALL}
TINY = tuple(name for name in CASES if name.startswith("tiny"))
SDXL = ("sdxl-32x32", "sdxl-64x64")  # SDXL's layers at 1024x1024 pixels
REAL = tuple(name for name in CASES if name not in TINY)
ON_A_CPU = tuple(name for name in REAL if name.startswith("sdxl") and CASES[name].batch == 3 and "128" not in name)


def select(option: str, patterns: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the names that match any glob, in their order, or all names without globs.

    Raises:
        ValueError: If a glob matches no name. The message lists the names.

    Example:
        >>> select("--cases", ["sdxl-*x64", "tiny-6x10"], ["tiny-6x10", "sdxl-64x64", "sdxl-32x32"])
        ['tiny-6x10', 'sdxl-64x64']
    """
    patterns = list(patterns)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"{option} {pattern!r} matches none of {', '.join(names)}")
    return [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]

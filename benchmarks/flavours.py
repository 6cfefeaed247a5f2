# SPDX-License-Identifier: Apache-2.0
"""Flavours of the kernels: the compilations that launches request from Triton, recorded from the launchers.

Triton compiles a kernel for every combination of constants, types and compiler options. ``flavours`` makes the calls of
``CALLS`` as if on a given architecture, with kernels that record their launches instead of running. Code that is
compiled ahead of time is therefore the code that would be launched. Tests make other, random calls and check that their
flavours are among these.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from segkern import Grid
from segkern.kernels import (
    _configs,
    _launch,
    _routes,
    attention_energy,
    attention_mass,
    gaussian_blur,
    seg_attention,
    split_attention,
    tiled_attention,
    unmasked_attention,
)
from segkern.ops import attention, masses

KERNELS: dict[str, Any] = {
    "_unmasked_attention_kernel": unmasked_attention,
    "_tiled_attention_kernel": tiled_attention,
    "_split_attention_kernel": split_attention,
    "_combine_splits_kernel": split_attention,
    "_image_blur_kernel": gaussian_blur,
    "_axis_blur_kernel": gaussian_blur,
    "_attention_energy_kernel": attention_energy,
    "_attention_mass_kernel": attention_mass,
}
_MODULES = (*dict.fromkeys(KERNELS.values()), seg_attention, _configs, _routes)
_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.uint8: "u8",
}
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
# Triton makes constants of numbers that are 1. Other strides are 1 only with one key, one head or one row, which
# compiles to a simpler case of the same code.
_UNIT_STRIDES = {f"stride_{x}d" for x in "qkvox"} | {"stride_mn", "stride_kn"}
HEAD_DIMS = (40, 64, 80, 96, 128, 160, 256)


@dataclass(frozen=True)
class Flavour:
    """One compilation of a kernel.

    Attributes:
        kernel: Name of the kernel function.
        dtype: Dtype of the tensors, as Triton names it.
        constants: Constants by parameter.
        types: Types of the other parameters, in order.
        options: Compiler options.
    """

    kernel: str
    dtype: str
    constants: tuple[tuple[str, Any], ...]
    types: tuple[tuple[str, str], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return int(dict(self.constants)["HEAD_DIM"])


class _Noting:
    """A kernel that records launches and does nothing else."""

    def __init__(self, kernel: Any, noted: dict[Flavour, None]) -> None:
        self.kernel, self.noted = kernel, noted

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._note

    def _note(self, *arguments: Any, **keywords: Any) -> None:
        options = {name: keywords.pop(name) for name in _OPTIONS if name in keywords}
        names = self.kernel.arg_names
        constants = dict(keywords)
        types = {}
        for name, value in zip(names, arguments, strict=False):
            if isinstance(value, torch.Tensor):
                types[name] = "*" + _TYPES[value.dtype]
            elif value == 1 and name in _UNIT_STRIDES:
                constants[name] = 1
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
        head = next(type_ for name, type_ in types.items() if name in ("out_ptr", "q_ptr"))
        dtype = types.get("q_ptr", head).removeprefix("*")
        self.noted[
            Flavour(
                self.kernel.__name__,
                dtype,
                tuple((name, constants[name]) for name in names if name in constants),
                tuple(types.items()),
                tuple(options.items()),
            )
        ] = None


@contextmanager
def noting(arch: str) -> Iterator[dict[Flavour, None]]:
    """Treat launches on the CPU as launches on an architecture, and record them in the result instead of running."""
    noted: dict[Flavour, None] = {}
    caches = (_routes.attention_route, _launch.tile_constants, _configs.attention_tile)
    with ExitStack() as stack:
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        for module in _MODULES:
            if hasattr(module, "architecture"):
                stack.enter_context(mock.patch.object(module, "architecture", return_value=arch))
            if hasattr(module, "multiprocessors"):
                stack.enter_context(mock.patch.object(module, "multiprocessors", return_value=8))
        for name, module in KERNELS.items():
            stack.enter_context(mock.patch.object(module, name, _Noting(getattr(module, name), noted)))
        stack.enter_context(mock.patch.object(torch.version, "hip", "6" if arch.startswith("gfx") else None))
        yield noted


def _aligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def _tensors(keys: int, head_dim: int, dtype: torch.dtype, tokens: int = 128) -> tuple[torch.Tensor, ...]:
    """Return query, key and value in the layout of projections, with 2 samples and 16 heads."""
    shapes = [(2, count, 16, head_dim) for count in (tokens, keys, keys)]
    return tuple(_aligned(shape, dtype).transpose(1, 2) for shape in shapes)


def attention_calls(head_dim: int, dtype: torch.dtype) -> None:
    """Call attention in every way that ``backend="auto"`` uses for a head dimension and dtype."""
    grid, blurs = Grid(8, 16), (0.0, 1.5)
    for keys in (512, 500):
        q, k, v = _tensors(keys, head_dim, dtype)
        shape = 1, 1, 128, keys
        masks = [_aligned(shape, kind) for kind in dict.fromkeys((dtype, torch.float32, torch.bool))]
        maybe: list[torch.Tensor | None] = [None, *masks]
        options = head_dim**-0.5, "reflect", True
        for place in _routes.BlurPlace:
            attention.fused_attention(q, k, v, None, grid, blurs, *options, place)
        for sigma in (0.0, math.inf):  # together with a sample of infinite sigma
            attention.fused_attention(q, k, v, None, grid, (sigma, math.inf), *options)
        for mask in masks:
            attention.fused_attention(q, k, v, mask, grid, blurs, *options)
            attention.fused_attention(q, k, v, mask[:, :, :1], grid, (math.inf, math.inf), *options)
        odd = k.transpose(2, 3).contiguous().transpose(2, 3)
        for some in maybe:  # with channels that are not contiguous, and keys that cannot have a descriptor
            attention.fused_attention(q, odd, v, some, grid, blurs, *options)
        shifted = _aligned((2, 16, keys, head_dim + 3), dtype)[..., 1 : head_dim + 1]
        for place in _routes.BlurPlace:
            attention.fused_attention(q, shifted, v, None, grid, blurs, *options, place)
        for batch, heads, rows in ((2, 16, 1), (1, 1, 40)):  # few rows, so keys are split
            few, *others = (x[:batch, :heads] for x in (q[:, :, :rows], k, v))
            for some in maybe:
                part = None if some is None else some[:, :, :rows]
                attention.fused_attention(few, others[0], others[1], part, Grid(1, rows), (0.0,) * batch, *options)


def other_calls(head_dim: int, dtype: torch.dtype) -> None:
    """Call blurs, energies and masses."""
    grid, sigmas = Grid(8, 16), (0.0, 1.5)
    q, k, _ = _tensors(500, head_dim, dtype)
    for height, width in itertools.product((32, 64), (32, 64, 76)):  # a grid of each kind
        x = _aligned((1, height * width, 1, head_dim), dtype).transpose(1, 2)
        attention.fused_blur(x, Grid(height, width), (1.5,), "reflect")
        attention.fused_blur(x.float(), Grid(height, width), (1.5,), "reflect")
    masses.fused_mass(q, k, 0.125)
    masses.fused_energy(q, k, grid, sigmas, 0.125, "reflect")


def flavours(
    arch: str, head_dims: tuple[int, ...] = HEAD_DIMS, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
) -> list[Flavour]:
    """Return every flavour that ``backend="auto"`` can launch on an architecture, without duplicates."""
    with noting(arch) as noted:
        for head_dim, dtype in itertools.product(head_dims, dtypes):
            attention_calls(head_dim, dtype)
            other_calls(head_dim, dtype)
    return list(noted)

# SPDX-License-Identifier: Apache-2.0
"""Tile shapes per architecture, head dimension and dtype, and the precision of products.

The tables in this file are safe defaults, chosen from compiled code: no register spills, shared memory within the
target's limit, matrix instructions that are not serialised. ``tests/kernels/test_compile.py`` checks this for every
target. ``tuned.json`` in this folder lists configurations that were measured to be faster on a device;
``python -m benchmarks tune --install`` fills it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from segkern.core.dispatch import interpreting


@dataclass(frozen=True)
class Options:
    """Compiler options: warps per program, pipeline depth, maximum registers per thread (CUDA only)."""

    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Tile:
    """The work of one program: how many queries, keys and grid columns at a time, and the compiler options.

    With ``descriptors``, the hardware copies keys and values in blocks (Hopper and later, without a mask), which saves
    the registers of pointers.
    """

    block_m: int
    block_n: int
    block_c: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None
    descriptors: bool = False


# The shared memory per multiprocessor determines the family: 80 has 163 KB, 90 and 100 have 227 KB,
# 86, 89 and 120 have 99 KB, gfx942 has 64 KB.
_FAMILY = {
    "sm_80": "sm_80",
    "sm_86": "sm_86",
    "sm_87": "sm_80",
    "sm_89": "sm_86",
    "sm_90": "sm_90",
    "sm_100": "sm_100",
    "sm_103": "sm_100",
    "sm_120": "sm_86",
    "sm_121": "sm_86",
    "gfx942": "gfx942",
    "gfx950": "gfx942",
}
ARCHITECTURES = tuple(_FAMILY)
_DEFAULT_FAMILY = "sm_86"  # smallest shared memory of the CUDA families, so safe for unknown devices

Tiles = tuple[tuple[int, Tile], ...]  # (largest padded head dimension, tile), smallest first

_FLOAT32: Tiles = (
    # Full-precision products run on the ordinary units and need many registers. Without an explicit limit, the
    # assembler uses fewer and spills.
    (48, Tile(32, 16, 16, 8, 1, max_registers=255)),
    (128, Tile(32, 32, 16, 8, 1, max_registers=255)),
    (256, Tile(16, 16, 16, 8, 1, max_registers=255)),
)

# With 8 warps, two programs fit a multiprocessor, and the products of one overlap the exponentials of the other.
_TWO_PROGRAMS = 128

# Tiles of energies and masses: family -> bytes per element -> tiles
_SCORES: dict[str, dict[int, Tiles]] = {
    "sm_80": {
        2: (
            (80, Tile(128, 64, 16, 8, 3)),
            (128, Tile(128, 32, 16, 8, 3)),
            (192, Tile(64, 16, 16, 8, 2)),
            (256, Tile(64, 32, 16, 8, 2)),
        ),
        4: _FLOAT32,
    },
    "sm_86": {
        2: (
            (64, Tile(128, 64, 16, 8, 3)),
            (80, Tile(128, 32, 16, 8, 3)),  # 64 keys spill on sm_120
            (128, Tile(128, 32, 16, 8, 3)),
            (160, Tile(64, 64, 16, 8, 2)),
            (192, Tile(64, 16, 16, 8, 2)),
            (256, Tile(64, 32, 16, 8, 2)),
        ),
        4: _FLOAT32,
    },
    "sm_90": {
        2: (
            (192, Tile(128, 64, 16, 8, 3)),
            (256, Tile(64, 64, 16, 8, 2)),
        ),
        4: _FLOAT32,
    },
    "sm_100": {
        2: (
            (192, Tile(128, 64, 16, 8, 3)),
            (256, Tile(64, 64, 16, 8, 2)),
        ),
        4: _FLOAT32,
    },
    "gfx942": {
        2: (
            (96, Tile(128, 64, 16, 8, 2)),
            (160, Tile(128, 32, 16, 8, 2)),
            (256, Tile(64, 32, 16, 4, 1)),
        ),
        4: ((96, Tile(64, 32, 16, 8, 2)), (256, Tile(16, 32, 16, 8, 1))),
    },
}
# Tiles of attention without a mask.
_ATTENTION: dict[str, dict[int, Tiles]] = {
    "sm_80": {
        2: (
            (128, Tile(128, 64, 16, 8, 3)),
            (192, Tile(128, 32, 16, 8, 2)),
            (256, Tile(64, 32, 16, 8, 2)),
        ),
        4: _FLOAT32,
    },
    "sm_86": {
        2: (
            (80, Tile(128, 64, 16, 8, 3)),
            (128, Tile(128, 32, 16, 8, 3)),
            (192, Tile(64, 32, 16, 8, 1)),
            (256, Tile(64, 32, 16, 8, 2)),
        ),
        4: _FLOAT32,
    },
    "sm_90": {
        2: (
            (192, Tile(128, 64, 16, 8, 2)),
            (256, Tile(64, 32, 16, 4, 2)),
        ),
        4: _FLOAT32,
    },
    "sm_100": {
        2: (
            (192, Tile(128, 64, 16, 8, 3)),
            (256, Tile(64, 64, 16, 8, 1)),
        ),
        4: _FLOAT32,
    },
    "gfx942": {
        2: (
            (96, Tile(128, 64, 16, 8, 2)),
            (128, Tile(128, 32, 16, 8, 2)),
            (256, Tile(64, 32, 16, 4, 1)),
        ),
        4: ((96, Tile(64, 32, 16, 8, 2)), (256, Tile(16, 32, 16, 8, 1))),
    },
}
# Tiles with descriptors: registers freed from pointers allow more keys at a time. For wider heads, 128 keys spill.
_DESCRIBED: dict[str, Tiles] = {
    "sm_90": (
        (80, Tile(128, 128, 16, 8, 3, descriptors=True)),
        (128, Tile(128, 128, 16, 8, 2, descriptors=True)),
        (256, Tile(128, 64, 16, 8, 2, descriptors=True)),
    ),
}
# Tiles with a blur in the prologue. Wider heads, whose tiles spill or are small, are blurred before attention; so is
# everything on Blackwell.
_PROLOGUE: dict[str, Tiles] = {
    "sm_80": ((64, Tile(128, 64, 16, 8, 3)), (128, Tile(128, 32, 16, 8, 3))),
    "sm_86": ((64, Tile(128, 64, 16, 8, 3)), (80, Tile(128, 32, 16, 8, 3))),
    "sm_90": (
        (64, Tile(128, 128, 16, 8, 2, descriptors=True)),
        (128, Tile(128, 64, 16, 8, 2, descriptors=True)),
    ),
    "gfx942": ((96, Tile(128, 64, 16, 8, 2)), (128, Tile(128, 32, 16, 8, 2))),
}
_MASKED: Tiles = (
    (64, Tile(128, 32, 16, 8, 2)),
    (128, Tile(64, 32, 16, 8, 1, max_registers=255)),
    (160, Tile(64, 16, 16, 8, 1, max_registers=255)),
    (256, Tile(32, 16, 16, 8, 1, max_registers=255)),
)
_MASKED_OF: dict[str, Tiles] = {  # exceptions to _MASKED
    "sm_100": ((64, Tile(128, 32, 16, 8, 1)), *_MASKED[1:]),
    "gfx942": ((256, Tile(64, 32, 16, 4, 1)),),
}
_INTERPRETER = Tile(32, 32, 16, 4, 1)
_SPLIT_INTERPRETER = Tile(16, 32, 0, 4, 1)
_INTERPRETER_MULTIPROCESSORS = 8
_PROGRAMS_PER_MULTIPROCESSOR = 4
_KEYS_PER_SPLIT = 128
MAX_SPLITS = 32


@lru_cache(maxsize=64)
def architecture(device: torch.device) -> str:
    """Return the architecture: ``"sm_90"``, ``"gfx942"`` or ``"interpreter"``."""
    if device.type == "cpu" or interpreting():
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def has_descriptors(arch: str) -> bool:
    """Return whether the hardware copies blocks by tensor descriptors and kernels that use them do not spill.

    Example:
        >>> [has_descriptors(arch) for arch in ("sm_89", "sm_90", "sm_100", "sm_120", "gfx942")]
        [False, True, True, False, False]
    """
    return arch == "interpreter" or _FAMILY.get(arch) in ("sm_90", "sm_100")


TUNED = Path(__file__).with_name("tuned.json")


_SMALL = 2048  # query tokens


def size_class(tokens: int) -> str:
    """Return the name of the size class in which this number of tokens is measured.

    Example:
        >>> [size_class(tokens) for tokens in (1024, 4096)]
        ['small', 'large']
    """
    return "small" if tokens <= _SMALL else "large"


@dataclass(frozen=True)
class Tuned:
    """The fastest configuration measured on a device, for attention without a mask.

    Attributes:
        tile: Tile of the attention kernel.
        sdpa: PyTorch's attention if it was faster than the kernel: for each ``size_class``, the fastest backend
            (``"flash"``, ``"cudnn"``, ``"efficient"``), or ``"default"`` for PyTorch's own choice.
    """

    tile: Tile
    sdpa: dict[str, str]


@lru_cache(maxsize=1)
def tuned() -> dict[tuple[str, str, int], Tuned]:
    """Return measured configurations by (architecture, dtype, head dimension), as ``("sm_90", "bfloat16", 64)``."""
    table = json.loads(TUNED.read_text(encoding="utf-8"))
    return {
        (arch, dtype, int(head_dim)): Tuned(Tile(**entry["tile"]), entry["sdpa"])
        for arch, dtypes in table.items()
        for dtype, entries in dtypes.items()
        for head_dim, entry in entries.items()
    }


def measured(arch: str, head_dim: int, dtype: torch.dtype) -> Tuned | None:
    """Return the measured configuration for an architecture, or None."""
    return tuned().get((arch, str(dtype).removeprefix("torch."), head_dim))


@lru_cache(maxsize=256)
def attention_tile(
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    masked: bool = False,
    prologue: bool = False,
    described: bool = True,
) -> Tile:
    """Return the attention kernel's tile, measured or default. Unknown architectures get a safe default.

    Args:
        arch: Architecture, such as ``"sm_90"``.
        head_dim: Head dimension.
        dtype: Dtype of the tensors.
        masked: Whether there is a mask. A tile of the mask also needs registers, so tiles have fewer keys or queries.
        prologue: Whether queries are blurred in the prologue. Tiles were measured without a prologue.
        described: Whether keys and values can be copied by descriptors.
    """
    if arch == "interpreter":
        return _INTERPRETER
    known = None if masked or prologue else measured(arch, head_dim, dtype)
    if known is not None and (described or not known.tile.descriptors):
        return known.tile
    return default_tile(arch, head_dim, dtype, masked, prologue, described)


def default_tile(
    arch: str,
    head_dim: int,
    dtype: torch.dtype,
    masked: bool = False,
    prologue: bool = False,
    described: bool = True,
) -> Tile:
    """Return the attention kernel's default tile for an architecture."""
    family = _family(arch)
    tiles = _ATTENTION[family][dtype.itemsize]
    if dtype.itemsize == 2:
        if masked:
            tiles = _MASKED_OF.get(family, _MASKED)
        elif prologue:
            tiles = _PROLOGUE[family]
        elif described:
            tiles = _DESCRIBED.get(family, tiles)
    return _first(tiles, sum(split_head_dim(head_dim)))


def fits_prologue(arch: str, head_dim: int, dtype: torch.dtype, described: bool) -> bool:
    """Return True if the kernel has enough registers for a blur in its prologue.

    Example:
        >>> [fits_prologue("sm_90", head_dim, torch.float16, described=True) for head_dim in (64, 160)]
        [True, False]
    """
    if arch == "interpreter" or dtype.itemsize == 4:
        return True
    tiles = _PROLOGUE.get(_family(arch))
    if tiles is None or (tiles[0][1].descriptors and not described):
        return False
    return sum(split_head_dim(head_dim)) <= tiles[-1][0]


def _family(arch: str) -> str:
    return _FAMILY.get(arch, "gfx942" if arch.startswith("gfx") else _DEFAULT_FAMILY)


def _first(tiles: Tiles, padded: int) -> Tile:
    return next(tile for largest, tile in tiles if padded <= largest)


@lru_cache(maxsize=64)
def multiprocessors(device: torch.device) -> int:
    """Return the minimum number of concurrent programs; in the interpreter, a number by which to divide work."""
    if architecture(device) == "interpreter":
        return _INTERPRETER_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=256)
def split_tile(arch: str, head_dim: int, dtype: torch.dtype, rows: int, masked: bool = False) -> Tile:
    """Return the tile of attention of few rows. Products need at least 16 rows."""
    if arch == "interpreter":
        return _SPLIT_INTERPRETER
    padded = sum(split_head_dim(head_dim))
    if dtype == torch.float32:
        return Tile(16, 16 if padded > 128 else 32, 0, 8, 1, max_registers=255)
    if rows <= 16:
        if masked:
            return Tile(16, 32 if padded <= 64 else 16, 0, 4, 2, max_registers=255)
        return Tile(16, 32 if padded > 128 else 64, 0, 4, 2)
    # Chosen so that no target spills with any of the supported Triton versions.
    eight = padded > 96 or (masked and padded > 80) or ((masked or padded > 64) and _FAMILY.get(arch) != "sm_100")
    return Tile(64, 16 if masked and padded > 64 else 32, 0, 8 if eight else 4, 2)


@lru_cache(maxsize=256)
def scores_tile(arch: str, head_dim: int, dtype: torch.dtype) -> Tile:
    """Return the tile of energies and masses: a program keeps BLOCK_M and loops over blocks of BLOCK_N.

    Both passes over queries and keys use the same tile, so a product rounds the same in both. The tile is based on
    attention's, but a program also accumulates probabilities in a second tile next to the logits. Heads in one part
    therefore get a register limit, which lets two programs run on an NVIDIA multiprocessor. Where the limit causes
    spills, BLOCK_N is smaller.
    """
    if arch == "interpreter":
        return _INTERPRETER
    family, (block_d, block_r) = _family(arch), split_head_dim(head_dim)
    tile = _first(_SCORES[family][dtype.itemsize], block_d + block_r)
    if dtype.itemsize == 4:
        return replace(tile, block_n=16) if block_d + block_r == 256 else tile
    if block_r == 0 and family in ("sm_80", "sm_86", "sm_90"):
        return replace(tile, max_registers=_TWO_PROGRAMS)
    if family in ("gfx942", "sm_90"):
        return tile
    most = 16 if family == "sm_86" and 128 < block_d + block_r < 256 else 32
    return replace(tile, block_n=min(tile.block_n, most))


@lru_cache(maxsize=1024)
def key_splits(programs: int, keys: int, block_n: int, parallel: int) -> tuple[int, int]:
    """Return the number of splits of the keys, and the keys per split, a multiple of ``block_n``.

    Every multiprocessor gets a few programs, but each split has at least ``_KEYS_PER_SPLIT`` keys. With fewer, the
    partial results would cost as much as they save.

    Example:
        >>> key_splits(programs=10, keys=4096, block_n=64, parallel=132)
        (32, 128)
        >>> key_splits(programs=100, keys=1000, block_n=64, parallel=132)
        (6, 192)
    """
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * parallel // programs)
    splits = max(1, min(wanted, -(-keys // _KEYS_PER_SPLIT), MAX_SPLITS))
    keys_per_split = -(-keys // (splits * block_n)) * block_n
    return -(-keys // keys_per_split), keys_per_split


@lru_cache(maxsize=256)
def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Return a head dimension as one or two block sizes that products accept: powers of two of at least 16.

    Example:
        >>> [split_head_dim(d) for d in (8, 40, 64, 80, 112, 160)]
        [(16, 0), (32, 16), (64, 0), (64, 16), (128, 0), (128, 32)]
        >>> split_head_dim(256)
        (128, 128)
    """
    block = min(128, max(16, 1 << (head_dim.bit_length() - 1)))  # 256 in one block does not fit the registers
    if head_dim <= block:
        return block, 0
    rest = max(16, 1 << (head_dim - block - 1).bit_length())
    return (2 * block, 0) if rest == block < 128 else (block, rest)


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of attention's products. Only float32 has a choice, and it uses full precision."""
    return "ieee" if dtype == torch.float32 else "tf32"


def blur_precision(dtype: torch.dtype, hip: bool | None = None) -> str:
    """Return the precision of the blur's products: about float32 either way. Three tf32 products are used where they
    are exact enough for the dtype that the blurred queries are rounded to."""
    hip = torch.version.hip is not None if hip is None else hip
    return "ieee" if dtype == torch.float32 or hip else "tf32x3"

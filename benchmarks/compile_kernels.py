# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled for real targets without a GPU, with the constants that its launcher would choose.

``python -m benchmarks compile`` prints the records as JSON, or keeps them in ``benchmarks/results/compiled/``. Each
says what was compiled and for which target, registers, spilled bytes, local and shared memory, matrix instructions, and
the assembler's serialisation warnings. A process that interprets Triton cannot compile.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import torch
import triton

from benchmarks.compiled_code import TARGETS, TYPES, Compiled, compile_kernel
from benchmarks.results import RESULTS
from segkern.core.environment import commit
from segkern.kernels import _configs
from segkern.kernels._launch import compile_options
from segkern.kernels._routes import BlurPlace
from segkern.kernels.attention_energy import _attention_energy_kernel
from segkern.kernels.attention_mass import _attention_mass_kernel
from segkern.kernels.gaussian_blur import (
    AXIS_OPTIONS,
    BLOCK_I,
    BLOCK_J,
    _axis_blur_kernel,
    _image_blur_kernel,
    blur_block_d,
    image_constants,
    image_options,
)
from segkern.kernels.split_attention import (
    _EXPANDED_TOKENS,
    COMBINE_OPTIONS,
    _combine_splits_kernel,
    _split_attention_kernel,
)
from segkern.kernels.tiled_attention import _tiled_attention_kernel

RESULT = RESULTS / "compiled" / "kernels.json"
_BLURS = BlurPlace.PROLOGUE, BlurPlace.BEFORE
_HALF_DIMS = (16, 40, 64, 80, 96, 128, 160, 192, 256)
_FULL_DIMS = (40, 64, 128, 160, 256)
_BLURRED_GRIDS = tuple((height, width) for height in (32, 64) for width in (32, 64, 76))  # one of each kind


def compile_attention(
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    mask: int = 0,
    tile: Any = None,
    wide: bool = False,
    blur: BlurPlace = BlurPlace.PROLOGUE,
) -> Compiled:
    """The one-pass kernel as its launcher would configure it for this target, ragged keys included."""
    tile = tile or _configs.attention_tile(target, head_dim, dtype, mask != 0)
    block_d, block_r = _configs.split_head_dim(head_dim)
    hip = target.startswith("gfx")
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLUR": blur.value,
        "MASK": mask,
        "EVEN_KEYS": False,
        "DESCRIPTORS": tile.descriptors,
        "WITH_LSE": True,
        "PRECISION": _configs.dot_precision(dtype),
        "BLUR_PRECISION": _configs.blur_precision(dtype, hip),
        "WIDE": wide,
    }
    types = {"mask_ptr": "*u8"} if mask == 2 else {}
    if blur != BlurPlace.BEFORE:
        constants["blurred_ptr"] = None
    options = compile_options(tile, hip)
    return compile_kernel(_tiled_attention_kernel, target, head_dim, dtype, types, constants, options)


def compile_described(target: str, head_dim: int, blur: BlurPlace = BlurPlace.BEFORE) -> Compiled:
    """The same with keys and values copied by descriptors, which ``python -m benchmarks tune`` tries."""
    tile = replace(_configs.attention_tile(target, head_dim, torch.bfloat16), descriptors=True)
    return compile_attention(target, head_dim, torch.bfloat16, tile=tile, blur=blur)


def compile_image_blur(target: str, head_dim: int, dtype: torch.dtype, height: int, width: int) -> Compiled:
    """The separable blur in half precision, as for a grid."""
    hip = target.startswith("gfx")
    options = compile_options(image_options(height, width, hip), hip)
    planes = dict.fromkeys(("row_weights_ptr", "column_weights_ptr"), f"*{TYPES[dtype]}")
    types = planes | {"halfway_scale": "fp32", "out_scale": "fp32"}
    constants = {"HEAD_DIM": head_dim, "WIDE": False, **image_constants(height, width)}
    return compile_kernel(_image_blur_kernel, target, head_dim, dtype, types, constants, options)


def compile_axis_blur(target: str, head_dim: int) -> Compiled:
    """The separable blur in float32."""
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_I": BLOCK_I,
        "BLOCK_J": BLOCK_J,
        "BLOCK_D": blur_block_d(head_dim),
        "WIDE": False,
    }
    options = compile_options(AXIS_OPTIONS, target.startswith("gfx"))
    return compile_kernel(_axis_blur_kernel, target, head_dim, torch.float32, {}, constants, options)


def compile_split(target: str, head_dim: int, dtype: torch.dtype, rows: int, mask: int = 0) -> list[Compiled]:
    """The two kernels of few rows, the second for as many splits as there may be."""
    tile = _configs.split_tile(target, head_dim, dtype, rows, mask != 0)
    block_d, block_r = _configs.split_head_dim(head_dim)
    types = {"mask_ptr": "*u8"} if mask == 2 else {}
    split = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "MASK": mask,
        "EVEN_KEYS": False,
        "PRECISION": _configs.dot_precision(dtype),
        "WIDE": False,
    }
    combine = {
        "HEAD_DIM": head_dim,
        "BLOCK_S": _configs.MAX_SPLITS,
        "BLOCK_T": _EXPANDED_TOKENS if rows == 1 else 1,
        "BLOCK_D": triton.next_power_of_2(head_dim),
        "WITH_LSE": True,
        "WIDE": False,
    }
    records = []
    for kernel, constants, options in (
        (_split_attention_kernel, split, tile),
        (_combine_splits_kernel, combine, COMBINE_OPTIONS),
    ):
        chosen = compile_options(options, target.startswith("gfx"))
        records.append(compile_kernel(kernel, target, head_dim, dtype, types, constants, chosen))
    return records


def compile_scores(target: str, head_dim: int, dtype: torch.dtype, wide: bool = False) -> list[Compiled]:
    """Energies of rows, the statistics of pass one and the masses of pass two, ragged tokens included."""
    tile = _configs.scores_tile(target, head_dim, dtype)
    block_d, block_r = _configs.split_head_dim(head_dim)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "PRECISION": _configs.dot_precision(dtype),
        "WIDE": wide,
    }
    options = compile_options(tile, target.startswith("gfx"))
    return [
        compile_kernel(kernel, target, head_dim, dtype, {"out_ptr": "*fp32"}, constants | more, options)
        for kernel, more in (
            (_attention_energy_kernel, {"EVEN_KEYS": False, "STATISTICS": False}),
            (_attention_energy_kernel, {"EVEN_KEYS": False, "STATISTICS": True}),
            (_attention_mass_kernel, {"EVEN_QUERIES": False}),
        )
    ]


def compile_all(target: str) -> list[Compiled]:
    """Every kernel for one target: head dimensions of the models in use in float16, some in the other dtypes."""
    half, bf16, full = torch.float16, torch.bfloat16, torch.float32
    inputs = [(head_dim, half) for head_dim in _HALF_DIMS]
    inputs += [*((head_dim, full) for head_dim in _FULL_DIMS), (64, bf16)]
    records = [compile_attention(target, head_dim, dtype) for head_dim, dtype in inputs]
    records += [compile_attention(target, head_dim, half, mask=1) for head_dim in (64, 128, 256)]
    records.append(compile_attention(target, 64, half, mask=2))
    records.append(compile_attention(target, 64, half, wide=True))
    if _configs.has_descriptors(target):
        records += [compile_described(target, head_dim, blur) for head_dim in (64, 80, 128) for blur in _BLURS]
    records += [compile_attention(target, head_dim, bf16, blur=BlurPlace.BEFORE) for head_dim in (64, 80, 128)]
    for head_dim, dtype in ((64, bf16), (80, half), (256, full)):
        records += [record for rows in (1, 289) for record in compile_split(target, head_dim, dtype, rows)]
    for head_dim, dtype in ((64, bf16), (64, half), (40, half)):
        records += [compile_image_blur(target, head_dim, dtype, *grid) for grid in _BLURRED_GRIDS]
    records += [compile_axis_blur(target, head_dim) for head_dim in (40, 64, 256)]
    records += compile_split(target, 160, half, 1)
    for rows, mask in ((1, 1), (1, 2), (289, 1), (289, 2)):
        records += compile_split(target, 64, half, rows, mask)
    records += [record for head_dim, dtype in inputs for record in compile_scores(target, head_dim, dtype)]
    return records + compile_scores(target, 64, half, wide=True)


def compile_few(target: str) -> list[Compiled]:
    """Each kernel once or twice, where registers are scarcest: enough to see a change go wrong."""
    records = [compile_attention(target, head_dim, torch.float16) for head_dim in (40, 64, 80, 128)]
    records.append(compile_attention(target, 64, torch.float32))
    records.append(compile_attention(target, 64, torch.float16, mask=1))
    records.append(compile_attention(target, 64, torch.bfloat16, blur=BlurPlace.BEFORE))
    if _configs.has_descriptors(target):
        records.append(compile_described(target, 80))
    records += [compile_image_blur(target, 64, torch.bfloat16, *grid) for grid in _BLURRED_GRIDS]
    records.append(compile_axis_blur(target, 64))
    for rows, head_dim in ((1, 64), (289, 80)):
        records += compile_split(target, head_dim, torch.bfloat16, rows)
    return records + compile_scores(target, 64, torch.bfloat16) + compile_scores(target, 80, torch.float16)


def compile_targets(targets: Sequence[str], few: bool) -> dict[str, Any]:
    """Versions, and the records of all targets as dictionaries; targets are compiled side by side on all cores.

    Args:
        targets: names of ``TARGETS``.
        few: each kernel once or twice instead of all.

    Raises:
        ValueError: for a target that is not known.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"{target!r} is none of {', '.join(TARGETS)}")
    # A process for each core; spawned, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        records = [record for part in pool.map(compile_few if few else compile_all, targets) for record in part]
    environment = {"triton": triton.__version__, "torch": torch.__version__, "commit": commit()}
    return {"environment": environment, "kernels": [asdict(record) for record in records]}

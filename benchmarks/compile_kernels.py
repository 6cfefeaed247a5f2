# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiled for real targets without a GPU, in every flavour that its launchers ask for.

``python -m benchmarks compile`` prints the records as JSON, or keeps them in ``benchmarks/results/compiled/``. Each
says what was compiled and for which target, registers, spilled bytes, local and shared memory, matrix instructions, the
assembler's serialisation warnings, and instructions of the loop over keys. A process that interprets Triton cannot
compile.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.compiled_code import TARGETS, Compiled, compile_flavour
from benchmarks.flavours import HEAD_DIMS, KERNELS, Flavour, flavours
from benchmarks.plain_attention import _plain_attention_kernel
from benchmarks.results import RESULTS
from segkern.core.environment import commit

RESULT = RESULTS / "compiled" / "kernels.json"
PLAIN = _plain_attention_kernel.fn.__name__
FEW = (64, 80)
_PLAIN_TILES = {"gfx942": (128, 64, 8, 2), "sm_90": (128, 128, 8, 3)}
_PLAIN_TILE = 128, 64, 8, 3  # queries, keys, warps, stages


def compile_one(job: tuple[str, Flavour]) -> Compiled:
    """Compile one flavour for a target."""
    target, flavour = job
    kernel = _plain_attention_kernel if flavour.kernel == PLAIN else getattr(KERNELS[flavour.kernel], flavour.kernel)
    return compile_flavour(flavour, kernel, target)


def plain_flavours(target: str) -> list[Flavour]:
    """Attention as others write it, in both styles and with a tile that suits them."""
    block_m, block_n, warps, stages = _PLAIN_TILES.get(target, _PLAIN_TILE)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    types |= dict.fromkeys(("stride_b", "stride_h", "stride_n", "heads", "tokens"), "i32") | {"scale": "fp32"}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    constants = {"HEAD_DIM": 64, "BLOCK_M": block_m, "BLOCK_N": block_n}
    return [
        Flavour(PLAIN, "bf16", (*constants.items(), ("FLEX", flex)), tuple(types.items()), tuple(options.items()))
        for flex in (False, True)
    ]


def jobs(target: str, few: bool) -> list[tuple[str, Flavour]]:
    """Flavours to compile for one target: bfloat16 in all head dimensions, float16 in the most usual one."""
    wanted = flavours(target, FEW if few else HEAD_DIMS)
    if not few:
        wanted += flavours(target, (64,), (torch.float16,)) + plain_flavours(target)
    return [(target, flavour) for flavour in wanted]


def compile_targets(targets: Sequence[str], few: bool) -> dict[str, Any]:
    """Versions, and the records of all targets as dictionaries; all cores compile side by side.

    Args:
        targets: names of ``TARGETS``.
        few: two head dimensions instead of all.

    Raises:
        ValueError: for a target that is not known.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"{target!r} is none of {', '.join(TARGETS)}")
    work = [job for target in targets for job in jobs(target, few)]
    # A process for each core; spawned, since torch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        records = list(pool.map(compile_one, work, chunksize=4))
    environment = {"triton": triton.__version__, "torch": torch.__version__, "commit": commit()}
    return {"environment": environment, "kernels": [asdict(record) for record in records]}


def compile_with(folder: Path, arguments: Sequence[str]) -> int:
    """The exit code of ``python -m benchmarks compile`` with the triton in a folder, as pip's ``--target`` fills it.

    Raises:
        ValueError: for a folder without triton.
    """
    if not (folder / "triton").is_dir():
        raise ValueError(f"there is no triton in {folder}: pip install --no-deps --target {folder} triton==3.6.0")
    path = os.pathsep.join(filter(None, (str(folder.resolve()), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", "compile", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode

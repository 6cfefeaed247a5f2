# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel for real targets without a GPU, in every flavour that the launchers use.

``python -m benchmarks compile`` prints the records as JSON or saves them in ``benchmarks/results/compiled/``. A record
has the kernel and its target, registers, spilled bytes, local and shared memory, matrix instructions, the assembler's
serialisation warnings, and the instructions of the loop over keys. This does not work in a process that uses Triton's
interpreter.
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
    """Return the flavours of common attention kernels, in both styles, with a suitable tile."""
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
    """Return the flavours to compile for a target: bfloat16 in all head dimensions, float16 in the most common one."""
    wanted = flavours(target, FEW if few else HEAD_DIMS)
    if not few:
        wanted += flavours(target, (64,), (torch.float16,)) + plain_flavours(target)
    return [(target, flavour) for flavour in wanted]


def compile_targets(targets: Sequence[str], few: bool) -> dict[str, Any]:
    """Return the versions, and the records of all targets as dictionaries, compiled in parallel on all cores.

    Args:
        targets: Names in ``TARGETS``.
        few: Whether to compile two head dimensions instead of all.

    Raises:
        ValueError: If a target is unknown.
    """
    for target in targets:
        if target not in TARGETS:
            raise ValueError(f"unknown target {target!r}; use one of {', '.join(TARGETS)}")
    work = [job for target in targets for job in jobs(target, few)]
    # One process per core, spawned because torch's threads do not survive a fork.
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        records = list(pool.map(compile_one, work, chunksize=4))
    environment = {"triton": triton.__version__, "torch": torch.__version__, "commit": commit()}
    return {"environment": environment, "kernels": [asdict(record) for record in records]}


def compile_with(folder: Path, arguments: Sequence[str]) -> int:
    """Run ``python -m benchmarks compile`` with the triton in a folder (pip's ``--target``), and return the exit code.

    Raises:
        ValueError: If the folder has no triton.
    """
    if not (folder / "triton").is_dir():
        raise ValueError(f"no triton in {folder}; run pip install --no-deps --target {folder} triton==3.6.0")
    path = os.pathsep.join(filter(None, (str(folder.resolve()), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", "compile", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode

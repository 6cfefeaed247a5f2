# SPDX-License-Identifier: Apache-2.0
"""Compile one kernel for a real target without a GPU, and read what its code uses."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.disassembly import read_amdgcn, read_cubin
from segkern.kernels._routes import BEFORE, HERE

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass
class Compiled:
    """What one kernel's code for one target uses."""

    kernel: str
    target: str
    head_dim: int
    dtype: str
    masked: bool
    blur: str  # "prologue", "before", or "" of other kernels
    registers: int
    spilled_bytes: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialisation: list[str]
    loop: dict[str, int] | None  # of one warp: instructions and exponentials; None without a loop over keys
    tile: dict[str, int]  # BLOCK_* and the compiler's options
    compile_seconds: float = 0.0


def _signature(kernel: Any, types: dict[str, str], constants: dict[str, Any], dtype: str) -> dict[str, str]:
    """A type per parameter: pointers by name, unit strides as constants, 32-bit integers otherwise."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        else:
            signature[name] = "i32"
    return signature


def _processor_seconds() -> float:
    """Of this process and of those it has waited for, as the assembler: what else the machine does is not in it."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def compile_kernel(
    kernel: Any,
    target: str,
    head_dim: int,
    dtype: torch.dtype,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Compiled:
    """Compile one kernel with aligned pointers and strides, and read the result."""
    constants = dict(constants)
    for name in kernel.arg_names:
        if name.startswith("stride_") and name.endswith("d"):
            constants[name] = 1  # head dimensions are contiguous in every usual layout
    signature = _signature(kernel, types, constants, TYPES[dtype])
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and (signature[name].startswith("*") or name.startswith("stride_"))
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs)
    start = _processor_seconds()
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    seconds = _processor_seconds() - start
    blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK_")}
    tile = blocks | {name: options[name] for name in ("num_warps", "num_stages")}
    tile |= {"descriptors": int(constants.get("DESCRIPTORS", False))}
    used = read_amdgcn(compiled) if target.startswith("gfx") else read_cubin(compiled, target)
    return Compiled(
        kernel=kernel.fn.__name__,
        target=target,
        head_dim=head_dim,
        dtype=TYPES[dtype],
        masked=constants.get("MASK", 0) != 0,
        blur={HERE: "prologue", BEFORE: "before"}.get(constants.get("BLUR"), ""),
        shared_bytes=compiled.metadata.shared,
        tile=tile,
        compile_seconds=round(seconds, 3),
        **used,
    )

# SPDX-License-Identifier: Apache-2.0
"""Compile one kernel for a real target without a GPU, read what its code uses, and say what is wrong with it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from segkern.kernels._routes import BlurPlace

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {  # bytes a program may use
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# Of pointers that are not to the inputs' dtype; of others where a kernel says so.
_TYPES = {
    **dict.fromkeys(("samples_ptr", "query_samples_ptr", "index_ptr", "blur_index_ptr", "reach_ptr"), "*i32"),
    **dict.fromkeys(("row_weights_ptr", "column_weights_ptr", "weights_ptr"), "*fp32"),
    **dict.fromkeys(("lse_ptr", "max_ptr", "inverse_ptr", "partial_ptr"), "*fp32"),
    "scale": "fp32",
}
_MULTIPLYING = ("_tiled_attention_kernel", "_attention_energy_kernel", "_attention_mass_kernel")
_MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # HMMA elsewhere


@dataclass
class Compiled:
    """The resources that one kernel's code uses on one target."""

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
    tile: dict[str, int]  # BLOCK_* and the compiler's options


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
    signature = _signature(kernel, _TYPES | types, constants, TYPES[dtype])
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and (signature[name].startswith("*") or name.startswith("stride_"))
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK_")}
    tile = blocks | {name: options[name] for name in ("num_warps", "num_stages")}
    tile |= {"descriptors": int(constants.get("DESCRIPTORS", False))}
    used = _read_amdgcn(compiled) if target.startswith("gfx") else _read_cubin(compiled, target)
    return Compiled(
        kernel=kernel.fn.__name__,
        target=target,
        head_dim=head_dim,
        dtype=TYPES[dtype],
        masked=constants.get("MASK", 0) != 0,
        blur=BlurPlace(constants["BLUR"]).name.lower() if "BLUR" in constants else "",
        shared_bytes=compiled.metadata.shared,
        tile=tile,
        **used,
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(compiled: Any, target: str) -> dict[str, Any]:
    """Of a kernel compiled for CUDA, by the tools that come with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "-res-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
        # Only Hopper's matrix instructions can be serialised, and only the assembler says so.
        messages = _assembler_messages(compiled.asm["ptx"], Path(folder)) if target == "sm_90" else ""
    return {
        "registers": _search(r"REG:(\d+)", resources),
        "spilled_bytes": _search(r"STACK:(\d+)", resources),  # kernels have no other use of a stack
        "local_bytes": _search(r"LOCAL:(\d+)", resources),
        "matrix_instructions": _count(sass, r"\b(HGMMA|QGMMA|HMMA|IMMA|UTCHMMA|UTCQMMA)\b"),
        "serialisation": sorted(set(re.findall(r"C75\d\d", messages))),
    }


def _assembler_messages(ptx: str, folder: Path) -> str:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = "ptxas-blackwell" if Path(_tool("ptxas-blackwell")).exists() else "ptxas"  # reads newer PTX
    return _run(assembler, "-v", "--gpu-name=sm_90a", source, "-o", folder / "again.cubin")


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_amdgcn(compiled: Any) -> dict[str, Any]:
    """Of a kernel compiled for ROCm, from its assembly."""
    text = compiled.asm["amdgcn"]
    vgprs = _search(r"\.vgpr_count:\s*(\d+)", text)
    # Scalar registers spill to lanes of vector registers, not to memory: private memory would show below.
    spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
    return {
        "registers": vgprs,
        "spilled_bytes": 4 * sum(spills),
        "local_bytes": _search(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "matrix_instructions": _count(text, r"\b(v_mfma)_"),
        "serialisation": [],
    }


def _search(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"{pattern!r} is nowhere in the compiled code")
    return int(match[1])


def _count(text: str, pattern: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, text)))


def faults(records: Sequence[Compiled]) -> list[str]:
    """Spills, too much shared memory, serialised or missing matrix instructions, a line for each."""
    wrong = []
    for record in records:
        name = f"{record.target}: {record.kernel} D={record.head_dim} {record.dtype}{' masked' * record.masked}"
        if record.spilled_bytes or record.local_bytes:
            wrong.append(f"{name} spills {record.spilled_bytes}, local memory {record.local_bytes} bytes")
        if record.shared_bytes > SHARED_LIMIT[record.target]:
            wrong.append(f"{name}: {record.shared_bytes} bytes of shared memory")
        if record.serialisation:
            wrong.append(f"{name}: assembler warns {record.serialisation}")
        if record.kernel not in _MULTIPLYING or record.dtype == "fp32":
            continue
        # The widest heads under a mask have tiles too small for the newer instructions.
        small = record.masked and record.head_dim > 160 and record.target != "gfx942"
        if not record.matrix_instructions.get("HMMA" if small else _MATRIX_INSTRUCTION.get(record.target, "HMMA")):
            wrong.append(f"{name}: no matrix instructions but {record.matrix_instructions}")
    return wrong

# SPDX-License-Identifier: Apache-2.0
"""Compile the kernels for real targets without a GPU and print what the compiled code uses, as JSON.

Run as a program, because a process that interprets Triton cannot compile: ``python -m benchmarks.compiled sm_90
gfx942``; with ``--save`` for all targets, into ``benchmarks/results/compiled.json``, of which ``docs/compiled.md`` is
made. Each record has the kernel, target, head dimension, dtype, tile, registers, spilled bytes, local memory, shared
memory, matrix instructions, the assembler's serialisation warnings, and what one pass of the loop over keys issues.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from segkern.environment import commit
from segkern.kernels import _configs
from segkern.kernels._launch import compile_options
from segkern.kernels.gaussian_blur import _BLOCK_I, _BLOCK_J, _gaussian_blur_kernel, blur_block_d, blur_options
from segkern.kernels.seg_attention import _seg_attention_kernel
from segkern.kernels.split_attention import (
    _EXPANDED_TOKENS,
    COMBINE_OPTIONS,
    _combine_splits_kernel,
    _split_attention_kernel,
)

RESULT = Path(__file__).parent / "results" / "compiled.json"
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
    registers: int
    spilled_bytes: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialisation: list[str]
    loop: dict[str, int] | None  # of one warp: instructions and exponentials; None without a loop over keys
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
    signature = _signature(kernel, types, constants, TYPES[dtype])
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name not in constants and (signature[name].startswith("*") or name.startswith("stride_"))
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    blocks = {name: value for name, value in constants.items() if name.startswith("BLOCK_")}
    tile = blocks | {name: options[name] for name in ("num_warps", "num_stages")}
    read = _read_amdgcn if target.startswith("gfx") else _read_cubin
    used = read(compiled, target)
    return Compiled(
        kernel=kernel.fn.__name__,
        target=target,
        head_dim=head_dim,
        dtype=TYPES[dtype],
        masked=constants.get("MASK", 0) != 0,
        shared_bytes=compiled.metadata.shared,
        tile=tile,
        **used,
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(compiled: Any, target: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "-res-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
        # Only Hopper's matrix instructions can be serialised, and only the assembler says so.
        messages = _assembler_messages(compiled.asm["ptx"], Path(folder)) if target == "sm_90" else ""
    return {
        "registers": int(re.search(r"REG:(\d+)", resources).group(1)),
        "spilled_bytes": int(re.search(r"STACK:(\d+)", resources).group(1)),  # kernels have no other use of a stack
        "local_bytes": int(re.search(r"LOCAL:(\d+)", resources).group(1)),
        "matrix_instructions": _count(sass, r"\b(HGMMA|QGMMA|HMMA|IMMA|UTCHMMA|UTCQMMA)\b"),
        "serialisation": sorted(set(re.findall(r"C75(?:10|11|12)", messages))),
        "loop": key_loop(sass, r"^(\.L_x_\d+):", r"BRA `\((\.L_x_\d+)\)", r"/\*[0-9a-f]{4,}\*/", r"MMA", r"MUFU\.EX2"),
    }


def _assembler_messages(ptx: str, folder: Path) -> str:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = "ptxas-blackwell" if Path(_tool("ptxas-blackwell")).exists() else "ptxas"  # reads newer PTX
    return _run(assembler, "-v", "--gpu-name=sm_90a", source, "-o", folder / "again.cubin")


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_amdgcn(compiled: Any, target: str) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    vgprs = int(re.search(r"\.vgpr_count:\s*(\d+)", text).group(1))
    # Scalar registers spill to lanes of vector registers, not to memory: private memory would show below.
    spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
    return {
        "registers": vgprs,
        "spilled_bytes": 4 * sum(spills),
        "local_bytes": int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", text).group(1)),
        "matrix_instructions": _count(text, r"\b(v_mfma)_"),
        "serialisation": [],
        "loop": key_loop(
            text, r"^(\.LBB\d+_\d+):", r"s_c?branch\w* (\.LBB\d+_\d+)", r"^\t[a-z]", r"v_mfma", r"v_exp_f32"
        ),
    }


def key_loop(
    text: str, label: str, branch: str, instruction: str, matrix: str, exponential: str
) -> dict[str, int] | None:
    """What one pass of the loop over whole blocks of keys issues: the shortest with both products and exponentials.

    Args:
        text: disassembly or assembly.
        label: regular expression of a line that names a place, the name its first group.
        branch: of a jump, the name of the place its first group.
        instruction: of a line that is one.
        matrix: of a matrix product.
        exponential: of an exponential.
    """
    lines = text.splitlines()
    places = {found[1]: i for i, line in enumerate(lines) if (found := re.search(label, line))}
    loops = []
    for i, line in enumerate(lines):
        found = re.search(branch, line)
        if found and places.get(found[1], i) < i:
            body = [one for one in lines[places[found[1]] : i + 1] if re.search(instruction, one)]
            counts = {
                name: sum(bool(re.search(pattern, one)) for one in body)
                for name, pattern in (("instructions", "."), ("matrix", matrix), ("exponentials", exponential))
            }
            if counts["matrix"] and counts["exponentials"] >= 4:
                loops.append(counts)
    return min(loops, key=lambda counts: counts["instructions"], default=None)


def _count(text: str, pattern: str) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in re.findall(pattern, text):
        found[name] = found.get(name, 0) + 1
    return found


def compile_attention(
    target: str, head_dim: int, dtype: torch.dtype, mask: int = 0, tile: Any = None, wide: bool = False
) -> Compiled:
    """The one-pass kernel as its launcher would configure it for this target, ragged keys included."""
    tile = tile or _configs.tile_for(target, head_dim, dtype, mask != 0)
    block_d, block_r = _configs.split_head_dim(head_dim)
    hip = target.startswith("gfx")
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_C": tile.block_c,
        "BLOCK_D": block_d,
        "BLOCK_R": block_r,
        "BLUR": True,
        "MASK": mask,
        "EVEN_KEYS": False,
        "WITH_LSE": True,
        "PRECISION": _configs.dot_precision(dtype),
        "BLUR_PRECISION": _configs.blur_precision(dtype, hip),
        "WIDE": wide,
    }
    types = {
        "mask_ptr": "*u8" if mask == 2 else f"*{TYPES[dtype]}",
        "lse_ptr": "*fp32",
        "samples_ptr": "*i32",
        "tables_ptr": "*i32",
        "row_weights_ptr": "*fp32",
        "column_weights_ptr": "*fp32",
        "reach_ptr": "*i32",
        "scale": "fp32",
    }
    options = compile_options(tile, hip)
    return compile_kernel(_seg_attention_kernel, target, head_dim, dtype, types, constants, options)


def compile_blur(target: str, head_dim: int, dtype: torch.dtype, second: bool = False) -> Compiled:
    """The separable blur's first launch, from the input's dtype to float32, or the second one, back again."""
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_I": _BLOCK_I,
        "BLOCK_J": _BLOCK_J,
        "BLOCK_D": blur_block_d(head_dim),
        "PRECISION": _configs.blur_precision(dtype, target.startswith("gfx")),
        "WIDE": False,
    }
    types = {
        ("x_ptr" if second else "out_ptr"): "*fp32",
        "tables_ptr": "*i32",
        "weights_ptr": "*fp32",
        "reach_ptr": "*i32",
    }
    options = compile_options(blur_options(dtype), target.startswith("gfx"))
    return compile_kernel(_gaussian_blur_kernel, target, head_dim, dtype, types, constants, options)


def compile_split(target: str, head_dim: int, dtype: torch.dtype, rows: int, mask: int = 0) -> list[Compiled]:
    """The two kernels of few rows, the second for as many splits as there may be."""
    tile = _configs.split_tile_for(target, head_dim, dtype, rows)
    block_d, block_r = _configs.split_head_dim(head_dim)
    types = {
        "mask_ptr": "*u8" if mask == 2 else f"*{TYPES[dtype]}",
        "partial_ptr": "*fp32",
        "samples_ptr": "*i32",
        "query_samples_ptr": "*i32",
        "lse_ptr": "*fp32",
        "scale": "fp32",
    }
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
    found = []
    for kernel, constants, options in (
        (_split_attention_kernel, split, tile),
        (_combine_splits_kernel, combine, COMBINE_OPTIONS),
    ):
        chosen = compile_options(options, target.startswith("gfx"))
        found.append(compile_kernel(kernel, target, head_dim, dtype, types, constants, chosen))
    return found


def compile_all(target: str) -> list[Compiled]:
    """Every kernel for one target: head dimensions of the models in use in float16, some in the other dtypes."""
    found = [
        compile_attention(target, head_dim, torch.float16) for head_dim in (16, 40, 64, 80, 96, 128, 160, 192, 256)
    ]
    found += [compile_attention(target, head_dim, torch.float32) for head_dim in (40, 64, 128, 160, 256)]
    found += [compile_attention(target, head_dim, torch.float16, mask=1) for head_dim in (64, 128, 256)]
    found.append(compile_attention(target, 64, torch.float16, mask=2))
    found.append(compile_attention(target, 64, torch.float16, wide=True))
    found.append(compile_attention(target, 64, torch.bfloat16))
    for head_dim, dtype in ((64, torch.bfloat16), (80, torch.float16), (256, torch.float32)):
        found += [compile_blur(target, head_dim, dtype, second) for second in (False, True)]
    for rows, head_dim, dtype in (
        (1, 64, torch.bfloat16),
        (1, 160, torch.float16),
        (1, 256, torch.float32),
        (289, 64, torch.bfloat16),
        (289, 80, torch.float16),
        (289, 256, torch.float32),
    ):
        found += compile_split(target, head_dim, dtype, rows)
    for mask in (1, 2):
        found += compile_split(target, 64, torch.float16, 289, mask)
    return found


def main(arguments: list[str]) -> None:
    """Print the records of the targets as JSON, or keep those of all targets."""
    if arguments == ["--save"]:
        records = [asdict(record) for target in TARGETS for record in compile_all(target)]
        environment = {"triton": triton.__version__, "torch": torch.__version__, "commit": commit()}
        RESULT.write_text(json.dumps({"environment": environment, "kernels": records}, indent=1) + "\n")
        return
    unknown = set(arguments) - set(TARGETS)
    if unknown:
        sys.exit(f"unknown target {sorted(unknown)[0]!r}; known are {', '.join(TARGETS)}, and --save")
    records = [asdict(record) for target in arguments or TARGETS for record in compile_all(target)]
    print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])

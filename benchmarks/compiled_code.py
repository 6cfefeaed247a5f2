# SPDX-License-Identifier: Apache-2.0
"""Compile one kernel for a real target without a GPU, read the resources of its code, and report faults."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.flavours import Flavour

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {  # maximum bytes per program
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
_PER_MULTIPROCESSOR = {  # bytes of shared memory, threads; all targets have 65,536 registers
    "sm_80": (164 * 1024, 2048),
    "sm_86": (100 * 1024, 1536),
    "sm_89": (100 * 1024, 1536),
    "sm_90": (228 * 1024, 2048),
    "sm_100": (228 * 1024, 2048),
    "sm_120": (100 * 1024, 1536),
}
_MULTIPLYING = (
    "_unmasked_attention_kernel",
    "_tiled_attention_kernel",
    "_attention_energy_kernel",
    "_attention_mass_kernel",
)
_MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # HMMA on other targets


@dataclass
class Compiled:
    """The resources that one kernel's code uses on one target.

    Attributes:
        flags: Constants other than sizes, and the type of the mask if there is one.
        tile: BLOCK_* and the compiler options.
        loop: Warp instructions per 1,024 scores of the loop over keys, by kind. None without such a loop.
        overlap: Whether exponentials are computed while products run. On Hopper: between the issue of a product and the
            wait for it. On other targets: between matrix instructions. None on Blackwell, whose products signal
            completion.
        programs: Number of programs that fit a multiprocessor at the same time. None if unknown.
        overwritten: Number of writes in loops to a register that a product in flight still reads. Hopper only.
    """

    kernel: str
    target: str
    head_dim: int
    dtype: str
    flags: dict[str, Any]
    registers: int
    spilled_bytes: int
    local_bytes: int
    shared_bytes: int
    matrix_instructions: dict[str, int]
    serialisation: list[str]
    tile: dict[str, int]
    loop: dict[str, float] | None
    overlap: bool | None
    programs: int | None
    overwritten: int = 0


def compile_flavour(flavour: Flavour, kernel: Any, target: str) -> Compiled:
    """Compile one flavour with aligned pointers and strides, and read the result."""
    constants, types, options = dict(flavour.constants), dict(flavour.types), dict(flavour.options)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if name in types and (types[name].startswith("*") or name.startswith("stride_"))
    }
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attrs)
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    tile = {name: value for name, value in constants.items() if name.startswith("BLOCK_")} | options
    used = _read_amdgcn(compiled) if target.startswith("gfx") else _read_cubin(compiled, target)
    code = used.pop("code")
    scores = tile["BLOCK_M"] * tile["BLOCK_N"] / options["num_warps"] if {"BLOCK_M", "BLOCK_N"} <= tile.keys() else 0
    loop, overlap = (None, None) if not scores else _loop_over_keys(code, scores, TARGETS[target].warp_size)
    flags = {
        name: value
        for name, value in constants.items()
        if not name.startswith(("BLOCK_", "HEAD_DIM", "stride_")) and "PRECISION" not in name
    }
    if flags.get("MASK"):
        flags["MASK"] = types["mask_ptr"]
    return Compiled(
        kernel=flavour.kernel,
        target=target,
        head_dim=flavour.head_dim,
        dtype=flavour.dtype,
        flags=flags,
        tile=tile,
        shared_bytes=compiled.metadata.shared,
        loop=loop,
        overlap=overlap,
        programs=_programs(target, used["registers"], compiled.metadata.shared, compiled.metadata.num_warps),
        **used,
    )


def _programs(target: str, registers: int, shared: int, warps: int) -> int | None:
    if target not in _PER_MULTIPROCESSOR:
        return None
    most_shared, most_threads = _PER_MULTIPROCESSOR[target]
    by_registers = 65_536 // (-(-registers // 8) * 8 * 32 * warps)
    return min(by_registers, most_threads // (32 * warps), most_shared // (shared + 1024), 32)


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _read_cubin(compiled: Any, target: str) -> dict[str, Any]:
    """Read the resources of a kernel compiled for CUDA, with the tools included in Triton."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        resources = _run("cuobjdump", "-res-usage", cubin)
        sass = _run("nvdisasm", "-c", cubin)
        # Only Hopper's matrix instructions can be serialised, and only the assembler reports it.
        messages = _assembler_messages(compiled.asm["ptx"], Path(folder)) if target == "sm_90" else ""
    return {
        "code": _instructions(sass),
        "registers": _search(r"REG:(\d+)", resources),
        "spilled_bytes": _search(r"STACK:(\d+)", resources),  # kernels use a stack only for spills
        "local_bytes": _search(r"LOCAL:(\d+)", resources),
        "matrix_instructions": _count(sass, r"\b(HGMMA|QGMMA|HMMA|IMMA|UTCHMMA|UTCQMMA)\b"),
        "serialisation": sorted(set(re.findall(r"C75\d\d", messages))),
        "overwritten": _overwritten(sass),
    }


def _assembler_messages(ptx: str, folder: Path) -> str:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    options = "-v", "--gpu-name=sm_90a", source, "-o", folder / "again.cubin"
    try:
        return _run("ptxas", *options)
    except subprocess.CalledProcessError:  # triton 3.9 writes PTX that is too new for ptxas; it uses ptxas-blackwell
        return _run("ptxas-blackwell", *options)


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _read_amdgcn(compiled: Any) -> dict[str, Any]:
    """Read the resources of a kernel compiled for ROCm, from its assembly."""
    text = compiled.asm["amdgcn"]
    vgprs = _search(r"\.vgpr_count:\s*(\d+)", text)
    # Scalar registers spill to lanes of vector registers, not to memory; private memory would show below.
    spills = [int(n) for n in re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)]
    return {
        "code": _instructions_of_amd(text),
        "registers": vgprs,
        "spilled_bytes": 4 * sum(spills),
        "local_bytes": _search(r"\.private_segment_fixed_size:\s*(\d+)", text),
        "matrix_instructions": _count(text, r"\b(v_mfma)_"),
        "serialisation": [],
    }


_WIDTH = (  # number of registers that an instruction writes, if not one
    (r"\.(64|WIDE)\b", 2),
    (r"\.(128|M88\.4)\b", 4),
)


def _overwritten(sass: str) -> int:
    """Count the registers that are written while a product of a loop may still read them.

    Hopper's products read queries or shares from registers after they are issued, until the wait for them. ptxas before
    CUDA 13.3 is known to reuse such registers for other values (triton issue 9433), which makes results wrong.
    """
    places: dict[str, int] = {}
    code: list[tuple[str, str]] = []  # opcode, operands
    loops = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            places[label[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\S*)\s*([^;]*)", line):
            jump = re.search(r"`\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            code.append((found[1], found[2]))
            if jump and jump[1] in places:
                loops.append((places[jump[1]], len(code)))
    return max((_overwritten_in(code[first:stop] * 2) for first, stop in loops), default=0)


def _overwritten_in(code: Sequence[tuple[str, str]]) -> int:
    in_flight: set[int] = set()
    count = 0
    for opcode, operands in code:
        if opcode.startswith("WARPGROUP.DEPBAR"):
            in_flight.clear()
        elif opcode.startswith("HGMMA"):
            if left := re.match(r"R\d+, R(\d+)", operands):
                in_flight.update(range(int(left[1]), int(left[1]) + 4))
        elif "SETP" not in opcode and (written := re.match(r"(?:!?U?P\w+, )*R(\d+)\b", operands)):
            width = next((width for pattern, width in _WIDTH if re.search(pattern, opcode)), 1)
            count += len(in_flight & set(range(int(written[1]), int(written[1]) + width)))
    return count


Code = list[tuple[str, str]]  # (opcode or "", label or jump target or "")


def _instructions(sass: str) -> Code:
    code = []
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            code.append(("", label[1]))
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", line):
            jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            code.append((found[1], jump[1] if jump else ""))
    return code


def _instructions_of_amd(text: str) -> Code:
    code = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            code.append(("", label[1]))
        elif found := re.match(r"\s+([svdgb]\w*_\w+)\b", line):
            jump = re.search(r"s_c?branch\w*\s+(\.LBB\w+)", line)
            code.append((found[1], jump[1] if jump else ""))
    return code


_KINDS = {  # the first pattern that matches the start of an opcode counts
    "matrix": r"HGMMA|QGMMA|HMMA|UTCHMMA|v_mfma",
    "EX2": r"MUFU\.EX2|v_exp_f32",
    "FMUL": r"FMUL|v_(pk_)?mul_f32",
    "FFMA": r"FFMA|v_(pk_)?fma|v_fmac|v_mac",
    "FADD": r"FADD|v_(pk_)?(add|sub)_f32",
    "FMNMX": r"FMNMX|v_max",
    "shared": r"LDS|STS|ds_|LDTM|STTM",
    "barriers": r"BAR|SYNCS|s_barrier",
}
KINDS = (*_KINDS, "other")


def _kind(opcode: str) -> str:
    return next((kind for kind, pattern in _KINDS.items() if re.match(pattern, opcode)), "other")


def _loop_over_keys(code: Code, scores: float, lanes: int) -> tuple[dict[str, float] | None, bool | None]:
    """Return instructions per 1,024 scores, by kind, and overlap, of the shortest loop with products and exponentials.

    ``scores`` is the number of scores per warp in a block of keys. An unrolled loop has exponentials for several
    blocks.
    """
    places = {label: place for place, (opcode, label) in enumerate(code) if not opcode}
    loops = []
    for place, (opcode, label) in enumerate(code):
        if opcode and places.get(label, place) < place:
            opcodes = [name for name, _ in code[places[label] : place + 1] if name]
            kinds = Counter(map(_kind, opcodes))
            if kinds["matrix"] and kinds["EX2"] >= 4:
                loops.append(opcodes)
    if not loops:
        return None, None
    opcodes = min(loops, key=len)
    kinds = Counter(map(_kind, opcodes))
    blocks = max(1, round(kinds["EX2"] * lanes / scores)) if lanes == 64 else 1  # AMD's loops are unrolled
    per = 1024 / (scores * blocks)
    counts = {kind: round(kinds[kind] * per, 1) for kind in KINDS}
    overlap = None if any(name.startswith("UTCHMMA") for name in opcodes) else _overlaps(opcodes)
    return counts | {"all": round(len(opcodes) * per, 1)}, overlap


def _overlaps(opcodes: Sequence[str]) -> bool:
    issued, seen, between, waits = False, False, 0, any(name.startswith("WARPGROUP.DEPBAR") for name in opcodes)
    for name in (*opcodes, *opcodes):  # the end of the loop is followed by its start
        kind = _kind(name)
        if kind == "matrix":
            between += seen
            issued, seen = True, False
        elif kind == "EX2" and issued:
            if waits:
                return True
            seen = True
        elif name.startswith("WARPGROUP.DEPBAR"):
            issued = False
    return between > 4  # matrix instructions of one product with exponentials before them


def _search(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiled code does not contain {pattern!r}")
    return int(match[1])


def _count(text: str, pattern: str) -> dict[str, int]:
    return dict(Counter(re.findall(pattern, text)))


def faults(records: Sequence[Compiled]) -> list[str]:
    """Return one line per fault: spills, too much shared memory, and serialised, missing or disturbed products."""
    wrong = []
    for record in records:
        flags = " ".join(f"{name}={value}" for name, value in record.flags.items() if value)
        name = f"{record.target}: {record.kernel} D={record.head_dim} {record.dtype} {flags}".rstrip()
        if record.spilled_bytes or record.local_bytes:
            wrong.append(f"{name} spills {record.spilled_bytes}, local memory {record.local_bytes} bytes")
        if record.shared_bytes > SHARED_LIMIT[record.target]:
            wrong.append(f"{name}: {record.shared_bytes} bytes of shared memory")
        if record.serialisation:
            wrong.append(f"{name}: assembler warning {record.serialisation}")
        if record.overwritten:
            wrong.append(f"{name}: {record.overwritten} registers overwritten that a product in flight reads")
        if record.kernel not in _MULTIPLYING or record.dtype == "fp32":
            continue
        # In the widest heads, the general kernel's tiles are too small for the newer instructions.
        small = record.kernel == "_tiled_attention_kernel" and record.head_dim > 160 and record.target != "gfx942"
        if not record.matrix_instructions.get("HMMA" if small else _MATRIX_INSTRUCTION.get(record.target, "HMMA")):
            wrong.append(f"{name}: expected matrix instructions are missing, found {record.matrix_instructions}")
    return wrong

# SPDX-License-Identifier: Apache-2.0
"""What compiled code says of itself: registers, spills, matrix instructions, the loop over keys."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def read_cubin(compiled: Any, target: str) -> dict[str, Any]:
    """Of a kernel compiled for CUDA, by the tools that come with Triton."""
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
        "loop": key_loop(
            sass, r"^(\.L_x_\d+):", r"\bBRA\b.*`\((\.L_x_\d+)\)", r"/\*[0-9a-f]{4,}\*/", r"MMA", r"MUFU\.EX2"
        ),
    }


def _assembler_messages(ptx: str, folder: Path) -> str:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    assembler = "ptxas-blackwell" if Path(_tool("ptxas-blackwell")).exists() else "ptxas"  # reads newer PTX
    return _run(assembler, "-v", "--gpu-name=sm_90a", source, "-o", folder / "again.cubin")


def _run(tool: str, *arguments: str | Path) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def read_amdgcn(compiled: Any) -> dict[str, Any]:
    """Of a kernel compiled for ROCm, from its assembly."""
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

# SPDX-License-Identifier: Apache-2.0
"""What compiled kernels must not do, told from their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.compiled import Compiled

SHARED_LIMIT = {  # bytes a program may use
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
MULTIPLYING = ("_tiled_attention_kernel", "_attention_energy_kernel", "_attention_mass_kernel")
MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


def faults(records: Sequence[Compiled]) -> list[str]:
    """What must not be: spills, too much shared memory, serialised or missing matrix instructions."""
    found = []
    for record in records:
        name = f"{record.target}: {record.kernel} D={record.head_dim} {record.dtype}{' masked' * record.masked}"
        if record.spilled_bytes or record.local_bytes:
            found.append(f"{name} spills {record.spilled_bytes}, local memory {record.local_bytes} bytes")
        if record.shared_bytes > SHARED_LIMIT[record.target]:
            found.append(f"{name}: {record.shared_bytes} bytes of shared memory")
        if record.serialisation:
            found.append(f"{name}: assembler warns {record.serialisation}")
        if record.kernel not in MULTIPLYING or record.dtype == "fp32":
            continue
        # The widest heads under a mask have tiles too small for the newer instructions.
        small = record.masked and record.head_dim > 160 and record.target != "gfx942"
        if not record.matrix_instructions.get("HMMA" if small else MATRIX_INSTRUCTION.get(record.target, "HMMA")):
            found.append(f"{name}: no matrix instructions, found {record.matrix_instructions}")
    return found

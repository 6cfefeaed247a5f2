# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for real targets, without spills, with matrix instructions, within shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segkern.dispatch import triton_is_installed

ROOT = Path(__file__).parents[1]
SHARED_LIMIT = {  # bytes a program may use
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
MATRIX_INSTRUCTION = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}

pytestmark = pytest.mark.skipif(not triton_is_installed(), reason="kernels need triton")


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_kernels_compile_without_spills(target: str) -> None:
    # A process that interprets kernels cannot compile them.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    program = [sys.executable, "-m", "benchmarks.compiled", target]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)
    assert {record["kernel"] for record in records} == {
        "_seg_attention_kernel",
        "_gaussian_blur_kernel",
        "_split_attention_kernel",
        "_combine_splits_kernel",
    }
    best = MATRIX_INSTRUCTION.get(target, "HMMA")
    faults = []
    for record in records:
        name = f"{record['kernel']} D={record['head_dim']} {record['dtype']}{' masked' * record['masked']}"
        if record["spilled_bytes"] or record["local_bytes"]:
            faults.append(f"{name}: spills {record['spilled_bytes']}, local memory {record['local_bytes']} bytes")
        if record["shared_bytes"] > SHARED_LIMIT[target]:
            faults.append(f"{name}: {record['shared_bytes']} bytes of shared memory")
        if record["serialisation"]:
            faults.append(f"{name}: assembler warns {record['serialisation']}")
        if record["kernel"] != "_seg_attention_kernel" or record["dtype"] == "fp32":
            continue
        # The widest heads under a mask have tiles too small for the newer instructions.
        small = record["masked"] and record["head_dim"] > 160
        if not record["matrix_instructions"].get("HMMA" if small and target != "gfx942" else best):
            faults.append(f"{name}: no matrix instructions, found {record['matrix_instructions']}")
    assert not faults, "\n".join(faults)

# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for real targets, without spills, with matrix instructions, within shared memory.

Here each kernel once or twice for some targets; ``python -m benchmarks compile`` compiles all of them for all targets,
as CI does.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from segkern.core.dispatch import triton_is_installed

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_90", "sm_120", "gfx942")

pytestmark = pytest.mark.skipif(not triton_is_installed(), reason="kernels need triton")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str) -> None:
    # A process that interprets kernels cannot compile them.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    program = [sys.executable, "-m", "benchmarks", "compile", "--few", target]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)["kernels"]
    assert {record["target"] for record in records} == {target}
    assert {record["kernel"] for record in records} == {
        "_tiled_attention_kernel",
        "_axis_blur_kernel",
        "_image_blur_kernel",
        "_split_attention_kernel",
        "_combine_splits_kernel",
        "_attention_energy_kernel",
        "_attention_mass_kernel",
    }


def test_faults_are_found() -> None:
    from benchmarks.compiled_code import Compiled, faults

    sound = {
        "kernel": "_tiled_attention_kernel",
        "target": "sm_90",
        "head_dim": 64,
        "dtype": "fp16",
        "masked": False,
        "blur": "before",
        "registers": 128,
        "spilled_bytes": 0,
        "local_bytes": 0,
        "shared_bytes": 1000,
        "matrix_instructions": {"HGMMA": 8},
        "serialisation": [],
        "tile": {},
    }
    assert faults([Compiled(**sound)]) == []
    for change, words in (
        ({"spilled_bytes": 8}, "spills 8"),
        ({"local_bytes": 8}, "local memory 8"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"serialisation": ["C7510"]}, "C7510"),
        ({"matrix_instructions": {"HMMA": 8}}, "no matrix instructions"),
    ):
        (fault,) = faults([Compiled(**sound | change)])
        assert words in fault


def test_committed_records_are_sound() -> None:
    from benchmarks.compile_kernels import RESULT
    from benchmarks.compiled_code import TARGETS, Compiled, faults

    records = [Compiled(**record) for record in json.loads(RESULT.read_text())["kernels"]]
    assert {record.target for record in records} == set(TARGETS)
    assert faults(records) == []

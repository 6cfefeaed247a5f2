# SPDX-License-Identifier: Apache-2.0
"""The kernels compile for real targets, without spills, with matrix instructions, within shared memory.

This file compiles two head dimensions for some targets. ``python -m benchmarks compile`` compiles every flavour for all
targets, as in CI.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkern import Grid
from segkern.core.dispatch import triton_is_installed
from segkern.core.gaussian import BOUNDARIES
from tests.core.contract import draw

ROOT = Path(__file__).parents[2]
TARGETS = ("sm_90", "sm_120", "gfx942")
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not triton_is_installed(), reason="kernels need triton")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str) -> None:
    from benchmarks.flavours import KERNELS

    # A process that uses the interpreter cannot compile kernels.
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    program = [sys.executable, "-m", "benchmarks", "compile", "--few", target]
    run = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    records = json.loads(run.stdout)["kernels"]
    assert {record["target"] for record in records} == {target}
    assert {record["kernel"] for record in records} == set(KERNELS)


@pytest.mark.parametrize("arch", ["sm_90", "sm_86", "gfx942"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_calls_launch_is_compiled_ahead(head_dim: int, arch: str) -> None:
    """The constants, types and options of the kernels of any call are among those that are compiled ahead of time."""
    from benchmarks import flavours
    from segkern.kernels import _routes
    from segkern.ops import attention, masses

    ahead = set(flavours.flavours(arch, (head_dim,)))
    one = random.Random(f"{head_dim} {arch}").choice
    launched = 0
    for _ in range(30):
        grid, batch = Grid(one((1, 5, 40)), one((3, 38, 70)), one((0, 7))), one((1, 2, 3))
        tokens, keys = grid.stop + one((0, 5)), one((2, 64, 77, 128, 1000, 1024))
        layouts = ("contiguous", "tokens_first", "packed", "offset")
        q, k, v = (draw((batch, 2, n, head_dim), torch.bfloat16, CPU, one(layouts)) for n in (tokens, keys, keys))
        kind = one((None, None, torch.bool, torch.float32, torch.bfloat16))
        mask = None if kind is None else torch.zeros(1, one((1, 2)), one((1, tokens)), keys, dtype=kind)
        sigmas = tuple(one((0.0, 1.5, math.inf)) for _ in range(batch))
        boundary, place = one(BOUNDARIES), one((None, *_routes.BlurPlace))
        with flavours.noting(arch) as noted:
            attention.fused_attention(q, k, v, mask, grid, sigmas, 0.125, boundary, one((True, False)), place)
            attention.fused_blur(q, grid, sigmas, boundary)
            masses.fused_mass(q, k, 0.125)
            masses.fused_energy(q, k, grid, sigmas, 0.125, boundary)
        launched += len(noted)
        assert not [flavour for flavour in noted if flavour not in ahead]
    assert launched > 100


def test_faults_are_found() -> None:
    from benchmarks.compiled_code import Compiled, faults

    sound = {
        "kernel": "_unmasked_attention_kernel",
        "target": "sm_90",
        "head_dim": 64,
        "dtype": "fp16",
        "flags": {"EVEN_KEYS": True},
        "registers": 128,
        "spilled_bytes": 0,
        "local_bytes": 0,
        "shared_bytes": 1000,
        "matrix_instructions": {"HGMMA": 8},
        "serialisation": [],
        "tile": {},
        "loop": None,
        "overlap": None,
        "programs": 1,
    }
    assert faults([Compiled(**sound)]) == []
    for change, words in (
        ({"spilled_bytes": 8}, "EVEN_KEYS=True spills 8"),
        ({"local_bytes": 8}, "local memory 8"),
        ({"shared_bytes": 300_000}, "300000 bytes of shared memory"),
        ({"serialisation": ["C7515"]}, "C7515"),
        ({"overwritten": 3}, "3 registers overwritten"),
        ({"matrix_instructions": {"HMMA": 8}}, "expected matrix instructions are missing"),
    ):
        (fault,) = faults([Compiled(**sound | change)])
        assert words in fault


def test_committed_records_are_sound() -> None:
    from benchmarks.compile_kernels import RESULT
    from benchmarks.compiled_code import TARGETS, Compiled, faults

    records = [Compiled(**record) for record in json.loads(RESULT.read_text())["kernels"]]
    assert {record.target for record in records} == set(TARGETS)
    assert faults(records) == []


@pytest.mark.parametrize(("head_dim", "most"), [(64, 235), (128, 265)])
def test_products_run_under_exponentials_on_hopper(head_dim: int, most: int) -> None:
    """Warp instructions per 1,024 scores. Loops that wait for products, or with 64 keys, need 294 and 333."""
    from benchmarks.compile_kernels import RESULT

    loops = [
        record
        for record in json.loads(RESULT.read_text())["kernels"]
        if (record["kernel"], record["target"], record["head_dim"]) == ("_unmasked_attention_kernel", "sm_90", head_dim)
    ]
    assert len(loops) >= 4
    assert all(record["overlap"] for record in loops)
    described = [record for record in loops if record["flags"]["DESCRIPTORS"]]
    counted = [record for record in described if head_dim == 64 or not record["flags"]["PROLOGUE"]]
    assert counted
    assert all(record["loop"]["all"] <= most for record in counted)


HOPPER = """
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/                   {}
        /*0030*/                   {}
        /*0040*/              @P0  MUFU.EX2 R1, R2 ;
        /*0050*/                   MUFU.EX2 R1, R2 ;
        /*0060*/                   MUFU.EX2 R1, R2 ;
        /*0070*/                   FMUL R1, R2, R3 ;
        /*0080*/              @P1  BRA `(.L_x_1) ;
"""
WAIT, EXP = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;", "MUFU.EX2 R1, R2 ;"


@pytest.mark.parametrize(("lines", "overlaps"), [((WAIT, EXP), False), ((EXP, WAIT), True)], ids=["waits", "overlaps"])
def test_instructions_of_a_loop_are_counted(lines: tuple[str, str], overlaps: bool) -> None:
    from benchmarks.compiled_code import _instructions, _loop_over_keys

    loop, overlap = _loop_over_keys(_instructions(HOPPER.format(*lines)), scores=512, lanes=32)
    assert loop is not None
    assert (loop["matrix"], loop["EX2"], loop["FMUL"], loop["other"], loop["all"]) == (2, 8, 2, 4, 16)
    assert overlap is overlaps


IN_FLIGHT = """
.L_x_1:
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   F2FP.BF16.F32.PACK_AB R{}, R3, R2 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88, gsb0 ;
        /*0040*/                   ISETP.NE.AND P0, PT, R152, RZ, PT ;
        /*0050*/              @P0  SHFL.BFLY PT, R{}, R153, 0x2, 0x1f ;
        /*0060*/              @P1  BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(("registers", "count"), [((152, 156), 0), ((156, 155), 2)], ids=["before", "in flight"])
def test_registers_of_products_in_flight_are_watched(registers: tuple[int, int], count: int) -> None:
    from benchmarks.compiled_code import _overwritten

    assert _overwritten(IN_FLIGHT.format(*registers)) == count

# SPDX-License-Identifier: Apache-2.0
"""Launches pass the same arguments to compiled kernels as Triton does, and compile again in the same cases."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels import _launch

ROOT = Path(__file__).parents[2]


class Kernel:
    """A kernel that records how often it is compiled, and the arguments of launches of the compiled kernel."""

    arg_names = ("x_ptr", "table_ptr", "stride", "scale", "BLOCK", "WIDE")

    def __init__(self) -> None:
        self.compiled = 0
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def run(*arguments: Any, **constants: Any) -> Any:
            self.compiled += 1
            return self.Compiled(self)

        return run

    class Compiled:
        def __init__(self, kernel: Kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., Any]:
            return lambda *arguments: self.kernel.launches.append((grid, *arguments))


def test_what_agrees_is_compiled_once() -> None:
    kernel, constants = Kernel(), {"WIDE": False, "BLOCK": 32, "num_warps": 4}
    x, table = torch.zeros(64), torch.zeros(8)
    for _ in range(3):
        _launch.launch(kernel, 5, (x,), (table,), (7, 0.5), constants)
    assert kernel.compiled == 1
    assert kernel.launches == [((5, 1, 1), x, table, 7, 0.5, 32, False)] * 2  # constants in the kernel's order
    half = torch.zeros(64, dtype=torch.float16)
    for count, (programs, tensor, numbers, chosen) in enumerate(
        (
            (5, half, (7, 0.5), constants),
            (5, x[1:], (7, 0.5), constants),
            (6, x, (7, 0.5), constants),
            (5, x, (8, 0.5), constants),
            (5, x, (7, 0.25), constants),
            (5, x, (7, 0.5), constants | {"WIDE": True}),
            (5, x, (7, 0.5), constants | {"num_warps": 8}),
        ),
        start=2,
    ):
        _launch.launch(kernel, programs, (tensor,), (table,), numbers, chosen)
        assert kernel.compiled == count
    other = Kernel()
    _launch.launch(other, 5, (x,), (table,), (7, 0.5), constants)
    assert other.compiled == 1
    _launch.launch(kernel, 5, (x,), (table,), (7, 0.5), constants)
    assert not other.launches


def test_remembered_launches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_FROZEN", {})
    monkeypatch.setattr(_launch, "_MOST_FROZEN", 3)
    kernel, x = Kernel(), torch.zeros(4)
    for programs in range(1, 10):
        _launch.launch(kernel, programs, (x,), (), (7, 0.5), {"BLOCK": 32, "WIDE": False})
        assert len(_launch._FROZEN) <= 3


PROGRAM = """
import math, torch
from benchmarks.idle_driver import idle_driver
from segkern import Grid
from segkern.kernels import _launch
from segkern.kernels._routes import BlurPlace
from segkern.ops.attention import fused_attention

q, k, v = (torch.zeros(2, 32, 1, 16).half().transpose(1, 2) for _ in range(3))
def shown(launches):
    return [(name, programs, [x if not isinstance(x, torch.Tensor) else (x.shape, x.dtype) for x in arguments])
            for name, programs, arguments in launches]
with idle_driver() as driver:
    driver.noting = True
    for sigma, place in ((2.0, BlurPlace.PROLOGUE), (2.0, BlurPlace.BEFORE), (math.inf, None)):
        seen = []
        for _ in range(2):
            driver.launches.clear()
            fused_attention(q, k, v, None, Grid(4, 8), (0.0, sigma), 0.25, "reflect", False, place)
            seen.append(shown(driver.launches))
        assert seen[0] and seen[0] == seen[1], seen
    # Infinity launches the kernel that attention of queries blurred before does.
    assert len(_launch._FROZEN) == 3, len(_launch._FROZEN)
"""


@pytest.mark.slow
def test_the_second_launch_hands_over_what_the_first_did() -> None:
    """The first launch uses Triton's binder. The second passes the same arguments to the same compiled kernel."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]

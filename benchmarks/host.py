# SPDX-License-Identifier: Apache-2.0
"""Host time of a call, compared with PyTorch's attention, with tensors so small that computation takes no time.

On a GPU, a call is timed until it returns, not until its work ends. On a CPU, the time of the PyTorch path includes its
operators. The Triton path is also measured on a CPU, with its kernels replaced by no-ops, which leaves segkern's share.
The launches themselves are timed on a CPU with a driver that launches nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.timing import spread
from segkern import Grid, seg_attention

_SHAPE = (3, 2, 16, 16)  # batch, heads, tokens, head_dim
_GRID = Grid(2, 8)
_SIGMAS = {
    "sigma 0": (0.0, 0.0, 0.0),
    "a third at sigma 2": (0.0, 0.0, 2.0),
    "a third at infinity": (0.0, 0.0, math.inf),
}
Timed = Callable[[], object]


def _nothing(*arguments: object) -> None:
    pass


@contextmanager
def _launching(by: Callable[..., None]) -> Iterator[None]:
    """Replace the function that attention and blur use to launch their kernels."""
    from segkern.kernels import gaussian_blur, split_attention, tiled_attention, unmasked_attention

    modules = (unmasked_attention, tiled_attention, split_attention, gaussian_blur)
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "launch", by))
        yield


@contextmanager
def without_launches() -> Iterator[None]:
    """Let the Triton path run on a CPU, with launches that do nothing."""
    import triton

    with triton.knobs.runtime.scope(), _launching(_nothing):
        triton.knobs.runtime.interpret = True
        yield


def measure_launches(rounds: int = 300, calls: int = 20) -> list[dict[str, Any]]:
    """Return a row for each kind of blurred call on a GPU: the number of ``launches``, and their time in ``us``.

    The time is that of Triton and of segkern's part of a launch, without the driver's (``idle_driver.py``), within
    whole calls. It is the minimum over many rounds, which other load on the machine disturbs least. Kernels must not be
    interpreted in the process.
    """
    from benchmarks.idle_driver import idle_driver
    from segkern.kernels import _launch
    from segkern.kernels._routes import BlurPlace
    from segkern.ops.attention import fused_attention

    q, k, v = (torch.randn(_SHAPE).half() for _ in range(3))
    ways = {
        "a third at sigma 2, blurred in the prologue": (_SIGMAS["a third at sigma 2"], BlurPlace.PROLOGUE),
        "a third at sigma 2, blurred before": (_SIGMAS["a third at sigma 2"], BlurPlace.BEFORE),
        "a third at infinity": (_SIGMAS["a third at infinity"], None),
    }
    spent: list[float] = []

    def timed(*arguments: Any) -> None:
        start = perf_counter()
        _launch.launch(*arguments)
        spent.append(perf_counter() - start)

    rows = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with idle_driver(), _launching(timed):
            for name, (sigmas, place) in ways.items():
                call = partial(fused_attention, q, k, v, None, _GRID, sigmas, 0.25, "reflect", False, place)
                call()  # compiles
                least = math.inf
                for _ in range(rounds):
                    spent.clear()
                    for _ in range(calls):
                        call()
                    least = min(least, sum(spent) / calls * 1e6)
                rows.append({"call": name, "launches": len(spent) // calls, "us": least})
    finally:
        torch.set_num_threads(threads)
    return rows


def _microseconds(call: Timed, calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        call()
    return (perf_counter() - start) / calls * 1e6


def measure_host(device: torch.device, rounds: int = 31, calls: int = 200) -> list[dict[str, Any]]:
    """Return a row for each kind of call: its time in ``us``, and ``over_us``, the time beyond PyTorch's attention.

    Args:
        device: Device of the tensors.
        rounds: Number of rounds. Each round times every call once, one after the other.
        calls: Number of calls in a round, whose mean is recorded.
    """
    q, k, v = (torch.randn(_SHAPE, device=device) for _ in range(3))
    if device.type == "cuda":
        q, k, v = q.half(), k.half(), v.half()

    def plain() -> object:
        return F.scaled_dot_product_attention(q, k, v)

    def ours(sigmas: tuple[float, ...], backend: str) -> Timed:
        return lambda: seg_attention(q, k, v, _GRID, sigmas, backend=backend)

    ways = {(name, "auto"): ours(sigmas, "auto") for name, sigmas in _SIGMAS.items()}
    without = device.type == "cpu"
    if without:
        ways |= {(name, "triton, without launches"): ours(s, "triton") for name, s in _SIGMAS.items() if any(s)}
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {way: [] for way in ways}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small for more
    try:
        for turn in range(rounds + 2):
            for way, call in ways.items():
                with without_launches() if "triton" in way[1] else nullcontext():
                    pair = _microseconds(plain, calls), _microseconds(call, calls)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= 2:  # by now, tables are made and memory is warm
                    pairs[way].append(pair)
    finally:
        torch.set_num_threads(threads)
    return [
        {
            "call": name,
            "backend": backend,
            "us": spread(ours for _, ours in timed),
            "over_us": spread(ours - plain for plain, ours in timed),
        }
        for (name, backend), timed in pairs.items()
    ]


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return rows as text: call, backend, microseconds, microseconds beyond PyTorch's attention, and their spread."""
    return [
        [
            row["call"],
            row["backend"],
            f"{row['us']['median']:.1f}",
            f"{row['over_us']['median']:.1f}",
            f"{row['over_us']['p20']:.1f} to {row['over_us']['p80']:.1f}",
        ]
        for row in rows
    ]


HEADINGS = ("call", "backend", "us", "us over PyTorch's attention", "p20 to p80")

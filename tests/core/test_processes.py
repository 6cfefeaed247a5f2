# SPDX-License-Identifier: Apache-2.0
"""Several threads, processes and streams at once, and imports and first calls that race each other."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import segkern
from segkern import Grid
from segkern.core import coarse_queries, gaussian

ROOT = Path(__file__).parents[2]


def python(code: str) -> subprocess.Popen[str]:
    """A fresh Python that runs a program."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-W", "error::UserWarning:segkern", "-c", code], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def printed(process: subprocess.Popen[str]) -> str:
    """What it says, once it has ended well."""
    try:
        text, _ = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, text
    return text


CALLS = """
import math, torch
torch.set_num_threads(1)
def inputs(seed):
    return [torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(seed + i)) for i in range(3)]
def calls(seed):
    import segkern
    from segkern import Grid
    q, k, v = inputs(seed)
    sigma = (0.5 + 0.1 * (seed % 9), math.inf)
    return torch.cat([x.flatten() for x in (
        segkern.seg_attention(q, k, v, Grid(3, 4), sigma),
        segkern.seg_attention(q, k, v, Grid(3, 4), sigma, query_stride=2),
        segkern.gaussian_blur(q, Grid(3, 4), sigma),
        segkern.attention_mass(q, k),
        segkern.attention_energy(q, k, Grid(3, 4), sigma),
        torch.autograd.grad(segkern.seg_attention(q.requires_grad_(), k, v, Grid(3, 4), sigma).sum(), q)[0],
    )])
"""

THREADS = """
import sys, threading
start, found, errors = threading.Barrier(8), {}, []
sys.setswitchinterval(1e-6)
def work(number):
    try:
        start.wait()
        for turn in range(TURNS):  # the first of all imports segkern and registers its operators
            found[number, turn] = calls(turn)
    except BaseException as error:
        errors.append(repr(error))
threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
[t.start() for t in threads]
[t.join() for t in threads]
assert not errors, errors
for (number, turn), one in found.items():
    assert torch.equal(one, calls(turn)), (number, turn)
print("same", len(found))
"""


def test_threads_share_tables_and_plans() -> None:
    """Their tables are made while others look for them, and are dropped again and again."""
    q, k, v = (torch.randn(2, 2, 12, 8) for _ in range(3))
    sigmas = [(0.4 + 0.1 * i, math.inf) for i in range(24)]
    grid, start, wrong = Grid(3, 4), threading.Barrier(8), []
    expected = [segkern.seg_attention(q, k, v, grid, sigma) for sigma in sigmas]
    points = [segkern.seg_attention(q, k, v, grid, sigma, query_stride=2) for sigma in sigmas]
    tables = (
        gaussian.cached_blur_matrix,
        coarse_queries.cached_sampling_matrix,
        coarse_queries.cached_interpolation_matrix,
    )

    def work(number: int) -> None:
        start.wait()
        for turn in range(24):
            i = (number * 5 + turn) % 24
            if turn % 6 == number % 6:
                [table.cache_clear() for table in tables]
            if not torch.equal(segkern.seg_attention(q, k, v, grid, sigmas[i]), expected[i]):
                wrong.append(i)
            if not torch.equal(segkern.seg_attention(q, k, v, grid, sigmas[i], query_stride=2), points[i]):
                wrong.append(i)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(before)
    assert not wrong


@pytest.mark.robustness
def test_eight_threads_import_and_call_at_once() -> None:
    for _ in range(3):
        assert "same 80" in printed(python(CALLS + THREADS.replace("TURNS", "10")))


@pytest.mark.robustness
def test_a_forked_process_goes_on() -> None:
    code = (
        CALLS
        + """
import os
expected = [calls(seed) for seed in range(5)]
for turn in range(3):
    child = os.fork()
    if child == 0:
        good = all(torch.equal(calls(seed), expected[seed]) for seed in range(5)) and calls(7).isfinite().all()
        os._exit(0 if good else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert all(torch.equal(calls(seed), expected[seed]) for seed in range(5))
print("forked")
"""
    )
    assert "forked" in printed(python(code))


@pytest.mark.robustness
def test_two_processes_give_the_same() -> None:
    code = CALLS + "print(float(sum(calls(seed).double().sum() for seed in range(30))))"
    both = [python(code) for _ in range(2)]
    assert len({printed(each) for each in both}) == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_do_not_disturb_each_other() -> None:
    """Tables are made on one stream and read on others at once, dropped, and made again; memory is taken meanwhile."""
    device = torch.device("cuda", 0)
    grid, sigmas = Grid(8, 9, 1), [(0.0, 0.5 + i, math.inf) for i in range(8)]
    q, k, v = (torch.randn(3, 4, 74, 64, device=device, dtype=torch.float16) for _ in range(3))
    expected = [segkern.seg_attention(q, k, v, grid, sigma) for sigma in sigmas]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream(device) for _ in range(8)]
    for turn in range(50):
        if turn % 10 == 0:
            from segkern.kernels import _blur_matrices, _routes

            torch.cuda.synchronize()
            for table in (_routes.attention_route, _blur_matrices.blur_matrices, _blur_matrices.index_tensor):
                table.cache_clear()
        found = []
        for i, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found.append(segkern.seg_attention(q, k, v, grid, sigmas[(i + turn) % 8]))
                torch.full((10_000,), math.nan, device=device)
        torch.cuda.synchronize()
        for i, one in enumerate(found):
            assert torch.equal(one, expected[(i + turn) % 8]), (turn, i)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_threads_with_streams_of_their_own_on_a_device() -> None:
    device, wrong = torch.device("cuda", 0), []
    q, k, v = (torch.randn(2, 4, 72, 64, device=device, dtype=torch.float16) for _ in range(3))
    sigmas = [(0.5 + i, math.inf) for i in range(8)]
    expected = [segkern.seg_attention(q, k, v, Grid(8, 9), sigma) for sigma in sigmas]
    torch.cuda.synchronize()

    def work(number: int) -> None:
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            for turn in range(50):
                i = (number + turn) % 8
                found = segkern.seg_attention(q, k, v, Grid(8, 9), sigmas[i])
                stream.synchronize()
                if not torch.equal(found, expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

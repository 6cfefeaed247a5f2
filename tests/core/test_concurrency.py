# SPDX-License-Identifier: Apache-2.0
"""Threads that share tables and cached calls, and several streams of a device."""

from __future__ import annotations

import math
import sys
import threading

import pytest
import torch

import segkern
from segkern import Grid
from segkern.core import coarse_queries, gaussian


def test_threads_share_tables_and_calls() -> None:
    """Tables are made while other threads look them up, and are dropped repeatedly."""
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


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_streams_do_not_disturb_each_other() -> None:
    """Tables are made on one stream, read on others, dropped and made again while memory is reallocated."""
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
        result = []
        for i, stream in enumerate(streams):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                result.append(segkern.seg_attention(q, k, v, grid, sigmas[(i + turn) % 8]))
                torch.full((10_000,), math.nan, device=device)
        torch.cuda.synchronize()
        for i, one in enumerate(result):
            assert torch.equal(one, expected[(i + turn) % 8]), (turn, i)

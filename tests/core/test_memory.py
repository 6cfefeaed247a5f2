# SPDX-License-Identifier: Apache-2.0
"""Any number of calls uses bounded memory, and tables that a CUDA graph reads are not dropped."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from typing import Any

import pytest
import torch

import segkern
from segkern import Grid
from segkern.core import call_cache, coarse_queries, gaussian
from segkern.core.bounded_cache import BoundedCache, bounded_cache

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels import _blur_matrices, _routes

KEPT: list[Any] = [
    gaussian.cached_blur_matrix,
    coarse_queries.cached_sampling_matrix,
    coarse_queries.cached_interpolation_matrix,
    _blur_matrices.blur_matrices,
    _blur_matrices.index_tensor,
    _routes.attention_route,
]


@pytest.fixture
def few_kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Limit every kind of table to 8 entries, starting with none."""
    for table in KEPT:
        table.cache_clear()
        monkeypatch.setattr(table, "_most", 8)
    monkeypatch.setattr(call_cache, "MOST_CALLS", 8)
    call_cache.forget_calls()
    yield 8
    for table in KEPT:
        table.cache_clear()


def call_everything(sigma: float, grid: Grid, backend: str = "torch") -> None:
    q, k, v = torch.ones(3, 1, 1, grid.tokens, 4).unbind()
    segkern.seg_attention(q, k, v, grid, sigma, backend=backend)
    segkern.seg_attention(q, k, v, grid, sigma, query_stride=2, backend=backend)
    segkern.gaussian_blur(q, grid, (sigma,), backend=backend)
    segkern.attention_mass(q, k, backend=backend)
    segkern.attention_energy(q, k, grid, sigma, backend=backend)


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def every_cache() -> list[Any]:
    """Return all function caches in segkern's modules."""
    import sys

    modules = [module for name, module in sys.modules.items() if name.split(".")[0] == "segkern"]
    values = [value for module in modules for value in vars(module).values()]
    return [value for value in values if isinstance(value, (_lru_cache_wrapper, BoundedCache))]


def test_every_cache_has_a_bound() -> None:
    unbounded = {
        cache.__wrapped__.__qualname__
        for cache in every_cache()
        if isinstance(cache, _lru_cache_wrapper) and cache.cache_parameters()["maxsize"] is None
    }
    assert unbounded == set()
    assert {id(cache) for cache in KEPT} <= {id(cache) for cache in every_cache()}


def test_ever_other_sigmas_and_grids_keep_few_tables(few_kept: int) -> None:
    for number in range(20):
        call_everything(0.5 + 0.1 * number, Grid(3, 3 + number % 11))
    before = live_tensors()
    for number in range(20, 40):
        call_everything(0.5 + 0.1 * number, Grid(3, 3 + number % 11))
    assert all(len(table) <= few_kept for table in KEPT)
    assert len(call_cache._CALLS) <= few_kept
    assert live_tensors() <= before + 8 * len(KEPT)


def test_what_was_asked_for_while_capturing_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    @bounded_cache(most=4)
    def table(number: int, device: torch.device) -> torch.Tensor:
        made.append(number)
        return torch.full((2,), float(number))

    cpu = torch.device("cpu")
    before = table(0, cpu)
    monkeypatch.setattr("segkern.core.bounded_cache.capturing", lambda: True)
    captured = table(0, cpu)
    monkeypatch.setattr("segkern.core.bounded_cache.capturing", lambda: False)
    assert captured is before
    for turn in range(3):
        for number in range(1, 10):
            table(number, cpu)
        assert table(0, cpu) is captured, turn
    assert made.count(0) == 1
    assert made.count(1) == 3
    assert len(table) <= 4 + 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_graph_replays_after_its_tables_were_dropped(few_kept: int) -> None:
    q, k, v = (torch.randn(2, 2, 12, 16, device="cuda", dtype=torch.float16) for _ in range(3))

    def call() -> torch.Tensor:
        return segkern.seg_attention(q, k, v, Grid(3, 4), (0.0, 1.5))

    expected = call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for number in range(50):
        segkern.seg_attention(q, k, v, Grid(3, 4), (0.0, 2.0 + number))
        torch.full((4096,), math.nan, device="cuda")  # reuses the memory of dropped tables
        graph.replay()
        assert torch.equal(out, expected)

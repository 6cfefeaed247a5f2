# SPDX-License-Identifier: Apache-2.0
"""What kernels can do but only tuning makes them: the blur inside attention's launch, keys by tensor descriptors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import segkern
from segkern import Grid
from segkern.core.private_apis import triton_allocator
from tests.core.contract import assert_contract, draw, oracle_attention, plain_attention

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels import _configs, _launch, _producers, _routes
from tests.kernels.kernel_tools import CUDA, DEVICE, check_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_the_blur_inside_attentions_launch_leaves_its_counters_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch, and every replay of a graph, must find them so."""
    kept = []
    real = _producers.counters

    def spied(device: torch.device, heads: int) -> torch.Tensor:
        kept.append(real(device, heads))
        return kept[-1]

    monkeypatch.setattr("segkern.kernels._producers.counters", spied)
    grid, sigmas = Grid(9, 8, start=30), (2.0, 0.0, 1.3, math.inf)
    query, key, value = (draw((4, 2, 110, 16), torch.float32, DEVICE) for _ in range(3))
    oracle, _ = oracle_attention(query, key, value, grid, sigmas)
    for _ in range(2):
        arguments = query, key, value, None, grid, sigmas, 0.25, "reflect", False, _routes.TOGETHER
        output, _ = segkern.ops.attention.fused_attention(*arguments)
        assert_contract(output, oracle, plain_attention(query, key, value, grid, sigmas))
    for found in kept:
        assert found.numel() >= 2 * 2 * _producers.COUNTERS
        assert not found.any()


def test_samples_that_hide_the_blur_come_first() -> None:
    kind = DEVICE, torch.float32, torch.Size((4, 2, 64, 16)), 64, Grid(8, 8), (2.0, 0.0, math.inf, 1.0), "reflect"
    route = _routes.attention_route(*kind, False, True, _routes.TOGETHER)
    assert route.rest == (1, 0, 3)
    assert route.tables is not None
    assert route.tables.tables.tolist() == [-1, 0, 1]


@pytest.mark.usefixtures("blur_route")
@pytest.mark.parametrize(
    ("dim", "layouts", "described"),
    [
        (16, "packed", True),
        (40, "tokens_first", True),
        (80, "contiguous", True),
        (64, "transposed_dim", False),
        (64, "offset", False),
        (18, "tokens_first", False),
    ],
    ids=str,
)
def test_keys_and_values_by_descriptors(
    dim: int, layouts: str, described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What descriptors cannot take goes the usual way."""
    if CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs Hopper or later")
    seen = []
    real = _launch.scratch_memory
    tile = replace(_configs.attention_tile(DEVICE, dim, torch.float16, False), descriptors=True)
    monkeypatch.setattr("segkern.kernels.tiled_attention.attention_tile", lambda *_: tile)
    monkeypatch.setattr(
        "segkern.kernels.tiled_attention.scratch_memory", lambda wanted: seen.append(wanted) or real(wanted)
    )
    for keys in (45, 64):
        arguments = (3, 2, 45, dim), Grid(5, 9), (0.0, 1.2, math.inf), torch.float16, (layouts,) * 3
        check_attention(*arguments, keys=keys)
    assert seen == [described] * 2


def test_masks_and_descriptors_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = replace(_configs.attention_tile(DEVICE, 16, torch.float32, False), descriptors=True)
    monkeypatch.setattr("segkern.kernels.tiled_attention.attention_tile", lambda *_: tile)
    mask = torch.randn(1, 1, 45, 45, device=DEVICE)
    check_attention((2, 1, 45, 16), Grid(5, 9), (0.0, 1.2), torch.float32, attn_mask=mask)


def test_tritons_allocator_is_given_back() -> None:
    before = triton_allocator()
    with _launch.scratch_memory(True):
        assert triton_allocator() is not before
    assert triton_allocator() is before


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
def test_the_blur_inside_attentions_launch_in_graphs_and_on_streams() -> None:
    grid, sigmas = Grid(32, 32), (0.0, 0.0, 10.0)
    query, key, value = (draw((3, 20, 1024, 64), torch.float16, DEVICE) for _ in range(3))
    arguments = query, key, value, None, grid, sigmas, 0.125, "reflect", False
    wanted = segkern.ops.attention.fused_attention(*arguments, _routes.BEFORE)[0]
    for _ in range(20):
        torch.testing.assert_close(segkern.ops.attention.fused_attention(*arguments, _routes.TOGETHER)[0], wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = segkern.ops.attention.fused_attention(*arguments, _routes.TOGETHER)[0]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    beside = []
    for _ in range(10):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                beside.append(segkern.ops.attention.fused_attention(*arguments, _routes.TOGETHER)[0])
    torch.cuda.synchronize()
    for found in (captured, *beside):
        torch.testing.assert_close(found, wanted)

# SPDX-License-Identifier: Apache-2.0
"""Operators inside the CUDA graphs of ``torch.compile(mode="reduce-overhead")``, as far as a device is not needed."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import segkern
from segkern import Grid
from segkern.core.bounded_cache import bounded_cache, call_in_own_thread

GRID = Grid(3, 4, start=1)


class EveryFunction(torch.nn.Module):
    """A module that calls each function, with sigmas as numbers or as a tensor."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: torch.Tensor | None = None) -> object:
        if sigma is not None:
            return segkern.seg_attention(q, k, v, GRID, sigma)
        return (
            segkern.seg_attention(q, k, v, GRID, (0.0, 1.5, math.inf), return_lse=True),
            segkern.seg_attention(q, k, v, GRID, 1.5, query_stride=2),
            segkern.gaussian_blur(q, GRID, 2.0),
            segkern.attention_mass(q, k),
            segkern.attention_energy(q, k, GRID, 1.0),
        )


def exported(*, tensor_of_sigmas: bool) -> torch.fx.GraphModule:
    """Return the graph for tensors on a CUDA device, which need not exist."""
    with FakeTensorMode():
        q, k, v = (torch.empty(3, 2, 14, 16, device="cuda", dtype=torch.float16) for _ in range(3))
        sigma = (torch.empty(3),) if tensor_of_sigmas else ()
        return torch.export.export(EveryFunction(), (q, k, v, *sigma)).graph_module


def test_nothing_keeps_the_functions_out_of_a_cuda_graph() -> None:
    graph = exported(tensor_of_sigmas=False)
    values = [node.meta["val"] for node in graph.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    assert sum("segkern" in str(node.target) for node in graph.graph.nodes) == 7
    assert {value.device.type for value in values} == {"cuda"}, "a graph does not replay work on the host"
    assert get_first_incompatible_cudagraph_node(graph) is None


def test_sigmas_that_are_read_from_the_host_stay_out_of_a_cuda_graph() -> None:
    """A graph would replay the sigmas of its capture."""
    node = get_first_incompatible_cudagraph_node(exported(tensor_of_sigmas=True))
    assert node is not None
    assert str(node.target) == "segkern.seg_attention_at.default"
    assert torch.Tag.cudagraph_unsafe in torch.ops.segkern.gaussian_blur_at.default.tags


def test_tables_are_made_outside_of_the_callers_thread_and_modes() -> None:
    """Compilers direct a thread's allocations to the memory pool of its CUDA graph."""
    threads, modes = [], []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            modes.append(func)
            return func(*args, **(kwargs or {}))

    @bounded_cache(most=4)
    def table(length: int, device: torch.device) -> torch.Tensor:
        threads.append(threading.get_ident())
        return torch.zeros(length, device=device) + call_in_own_thread(lambda: torch.ones(length))

    with Mode(), torch.inference_mode(), torch.device("meta"):
        result = table(3, torch.device("cpu"))
        assert table(3, torch.device("cpu")) is result
    assert threads != [threading.get_ident()]
    assert len(threads) == 1
    assert not modes
    assert not result.is_inference()
    assert torch.equal(result, torch.ones(3))


def test_errors_of_making_a_table_are_the_callers() -> None:
    def fail() -> None:
        raise KeyError("no such table")

    with pytest.raises(KeyError, match="no such table"):
        call_in_own_thread(fail)


def test_a_table_that_is_missing_while_a_graph_is_captured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    @bounded_cache(most=4)
    def table(length: int, device: torch.device) -> torch.Tensor:
        raise AssertionError("made while capturing")

    monkeypatch.setattr("segkern.core.bounded_cache.capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"table\(3, .*run the same call once before capturing"):
        table(3, torch.device("cuda", 0))

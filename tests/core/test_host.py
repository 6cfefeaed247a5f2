# SPDX-License-Identifier: Apache-2.0
"""Host time of a call: arguments are checked once and tables are made once, without changing any result."""

from __future__ import annotations

import math
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import segkern
from segkern import Grid
from segkern.core import call_cache
from tests.core.contract import assert_contract, oracle_attention, plain_attention

pytest.importorskip("triton", reason="kernels need triton")

from benchmarks import host, tables
from tests.project import benchmark_tools  # noqa: F401  makes benchmarks/ importable, which is not installed

GRID = Grid(3, 5)


def draw(batch: int = 2, tokens: int = 15, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(batch, 2, tokens, 16).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("good", "bad", "quoted"),
    [
        ({"sigma": (1, 0)}, {"sigma": (True, 0)}, "True"),
        ({"sigma": 1}, {"sigma": True}, "True"),
        ({"scale": 1.0}, {"scale": math.inf}, "inf"),
        ({"query_stride": 1}, {"query_stride": True}, "True"),
        ({"grid": Grid(3, 5)}, {"grid": (3, 5)}, r"\(3, 5\)"),
        ({"boundary": "reflect"}, {"boundary": "mirror"}, "mirror"),
        ({"backend": "auto"}, {"backend": "cuda"}, "cuda"),
    ],
    ids=str,
)
def test_a_bad_call_after_a_good_one_is_refused(good: dict[str, Any], bad: dict[str, Any], quoted: str) -> None:
    usual: dict[str, Any] = {"grid": GRID, "sigma": (0.0, 2.0)}
    for _ in range(2):
        segkern.seg_attention(*draw(), **usual | good)
        with pytest.raises(ValueError, match=quoted):
            segkern.seg_attention(*draw(), **usual | bad)


def test_other_shapes_dtypes_and_sigmas_are_other_calls() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (15, 18):
            for sigma in ((0.0, 1.0), (0.0, 2.0), (math.inf, 0.0)):
                q, k, v = draw(2, tokens, dtype)
                for _ in range(2):
                    result = segkern.seg_attention(q, k, v, GRID, sigma)
                    assert_contract(
                        result, oracle_attention(q, k, v, GRID, sigma)[0], plain_attention(q, k, v, GRID, sigma)
                    )
    with pytest.raises(ValueError, match="dtype"):
        segkern.seg_attention(q, k.double(), v, GRID, sigma)


def test_sigmas_that_can_change_are_read_at_every_call() -> None:
    q, k, v = draw()
    sigma = torch.tensor([0.0, 1.0])
    before = segkern.seg_attention(q, k, v, GRID, sigma)
    sigma[1] = math.inf
    assert not torch.equal(segkern.seg_attention(q, k, v, GRID, sigma), before)
    assert torch.equal(segkern.seg_attention(q, k, v, GRID, (s for s in (0.0, 1.0))), before)


def test_the_cache_of_calls_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_cache, "MOST_CALLS", 4)
    for number in range(10):
        segkern.seg_attention(*draw(), GRID, 0.5 + number)
    assert len(call_cache._CALLS) <= 4


@pytest.mark.parametrize("sigma", [(0.0, 1.0), (0.0, math.inf), (0.0, 0.0)], ids=str)
def test_the_way_around_the_operator_gives_the_same(sigma: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw()
    calls = []
    real = segkern.ops.attention.fused_attention
    monkeypatch.setattr(
        segkern.ops.attention, "fused_attention", lambda *a: calls.append(torch.is_grad_enabled()) or real(*a)
    )
    straight = segkern.seg_attention(q, k, v, GRID, sigma, backend="triton")
    assert len(calls) == 1
    operator = torch.ops.segkern.seg_attention.default
    through, _ = operator(q, k, v, None, 3, 5, 0, list(sigma), 0.25, "reflect", "triton", False)
    assert torch.equal(straight, through)


def test_gradients_and_modes_go_through_the_operator() -> None:
    q, k, v = draw()
    wants = q.clone().requires_grad_()
    output = segkern.seg_attention(wants, k, v, GRID, (0.0, 1.0), backend="triton")
    output.sum().backward()
    assert wants.grad is not None
    assert wants.grad.abs().max() > 0
    with torch.no_grad():
        assert not segkern.seg_attention(wants, k, v, GRID, (0.0, 1.0), backend="triton").requires_grad
    with Recorded() as seen:
        segkern.seg_attention(q, k, v, GRID, (0.0, 1.0), backend="triton")
    assert "segkern.seg_attention.default" in seen.names


class Recorded(TorchDispatchMode):
    """The names of all operators that run inside the context."""

    def __enter__(self) -> Recorded:
        self.names: list[str] = []
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sigma", [(0.0, 1.0), (0.0, 30.0), (0.0, math.inf)], ids=str)
@pytest.mark.usefixtures("blur_route")
def test_a_known_call_makes_nothing_on_the_host(sigma: tuple[float, ...]) -> None:
    q, k, v = draw()
    with torch.no_grad(), host.without_launches():
        segkern.seg_attention(q, k, v, GRID, sigma, backend="triton")
        with Recorded() as seen:
            segkern.ops.attention.fused_attention(q, k, v, None, GRID, sigma, 0.25, "reflect", False)
    allowed = {
        "empty",
        "empty_permuted",
        "new_empty",
        "transpose",
        "slice",
        "select",
        "mean",
        "_to_copy",
        "view",
        "clone",
        "alias",
    }
    assert {name.split(".")[1] for name in seen.names} <= allowed


@pytest.mark.parametrize(
    ("sigma", "options", "most"),
    [(0.0, {}, 60), ((0.0, 2.0), {"backend": "triton"}, 180)],
    ids=["sigma 0", "a half at sigma 2"],
)
def test_segkerns_share_of_a_call_is_small(sigma: Any, options: dict[str, str], most: int) -> None:
    """Count calls of Python functions, because times depend on other load on the machine."""
    q, k, v = draw()
    calls = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)

    with torch.no_grad(), host.without_launches():
        for _ in range(2):  # the first run fills caches
            calls.clear()
            sys.setprofile(count)
            segkern.seg_attention(q, k, v, GRID, sigma, **options)
            sys.setprofile(None)
    assert len(calls) < most, calls


def test_the_host_is_measured() -> None:
    rows = host.measure_host(torch.device("cpu"), rounds=1, calls=2)
    assert len(rows) == 5
    assert all(row["over_us"]["p20"] <= row["over_us"]["p80"] for row in rows)
    assert tables.of_lines(host.HEADINGS, host.lines(rows)).row_count == 5

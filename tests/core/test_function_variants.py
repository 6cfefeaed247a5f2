# SPDX-License-Identifier: Apache-2.0
"""Situations that resemble reported faults of attention libraries, tried on every public function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segkern
from segkern import Grid
from tests.core.functions import FUNCTIONS, GRID, PLAIN, SHAPE, tensors

every_function = pytest.mark.parametrize("name", FUNCTIONS)


@pytest.mark.parametrize("sigma", [0.0, 1.3, (0.0, 1.3), (math.inf, 0.0), [[0.0, 1.3]]], ids=str)
@pytest.mark.parametrize("name", ["seg_attention", "gaussian_blur", "coarse queries", "frames"])
def test_results_made_without_gradients_can_be_changed_where_there_are_some(name: str, sigma: Any) -> None:
    q, k, v = tensors()
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "seg_attention": lambda: segkern.seg_attention(q, k, v, GRID, sigma),
        "gaussian_blur": lambda: segkern.gaussian_blur(q, GRID, sigma),
        "coarse queries": lambda: segkern.seg_attention(
            q, k, v, GRID, 1.3 if isinstance(sigma, list) else sigma, query_stride=2
        ),
        "frames": lambda: segkern.gaussian_blur(q, Grid(1, 6, frames=2), sigma),
    }
    with torch.no_grad():
        result = calls[name]()
    before, factor = result.clone(), torch.tensor(2.0, requires_grad=True)
    result.mul_(factor)
    result.sum().backward()
    torch.testing.assert_close(factor.grad, before.sum())


@pytest.mark.parametrize("cast", range(3), ids=["query", "key", "value"])
def test_autocast_takes_tensors_of_several_dtypes(cast: int) -> None:
    mixed, half = tensors(), [x.bfloat16() for x in tensors()]
    mixed[cast] = half[cast]
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*mixed).dtype == torch.bfloat16
        for name in FUNCTIONS.keys() - {"gaussian_blur"}:  # which autocast leaves alone
            assert torch.equal(FUNCTIONS[name](*mixed), FUNCTIONS[name](*half))
        mixed[0] = mixed[0].int()
        with pytest.raises(ValueError, match=r"(x|query) must be floating point .*got torch\.int32"):
            FUNCTIONS["seg_attention"](*mixed)


@every_function
def test_linear_maps_of_derivatives(name: str) -> None:
    """``torch.func.linearize`` keeps what does not depend on the direction; of the reference too."""
    (q, k, v), direction = tensors(torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda q: PLAIN[name](q, k, v), (q,), (direction,))
    for functions in (FUNCTIONS, PLAIN):
        _, linear = torch.func.linearize(lambda q: functions[name](q, k, v), q)  # noqa: B023
        torch.testing.assert_close(linear(direction), expected)

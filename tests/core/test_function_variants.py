# SPDX-License-Identifier: Apache-2.0
"""Situations from bug reports about attention libraries, tested on every public function."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import segkern
from segkern import Grid, reference
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
        for name in FUNCTIONS.keys() - {"gaussian_blur"}:  # autocast does not change the blur
            assert torch.equal(FUNCTIONS[name](*mixed), FUNCTIONS[name](*half))
        mixed[0] = mixed[0].int()
        with pytest.raises(ValueError, match=r"(x|query) must be floating point .*got torch\.int32"):
            FUNCTIONS["seg_attention"](*mixed)


@pytest.mark.one_in(5)
@every_function
def test_linear_maps_of_derivatives(name: str) -> None:
    """``torch.func.linearize`` keeps the values that do not depend on the direction; also tested on the reference."""
    (q, k, v), direction = tensors(torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda q: PLAIN[name](q, k, v), (q,), (direction,))
    for functions in (FUNCTIONS, PLAIN):
        _, linear = torch.func.linearize(lambda q: functions[name](q, k, v), q)  # noqa: B023
        torch.testing.assert_close(linear(direction), expected)


NO_SIGMAS = {
    "dictionary": {0.0: "a", 1.5: "b"},
    "set": {0.0, 1.5},
    "NumPy's masked numbers": np.ma.array([1.5, 1.5], mask=[True, False]),
    "integer beyond float64": 10**400,
    "integers beyond float64": (0, -(10**400)),
    "fraction beyond float64": Fraction(10**400, 3),
    "tensor without data": torch.tensor(1.5, device="meta"),
    "tensors without data": torch.ones(2, device="meta"),
    "sparse": torch.tensor([0.0, 1.5]).to_sparse(),
    "truth values of heads": torch.tensor([[True, False]]),
    "sparse, of heads": torch.tensor([[0.0, 1.5]]).to_sparse(),
}


@pytest.mark.parametrize("sigma", NO_SIGMAS.values(), ids=NO_SIGMAS)
def test_what_cannot_be_read_as_sigmas_is_refused(sigma: Any) -> None:
    q, k, v = tensors()
    for call in (
        lambda: segkern.gaussian_blur(q, GRID, sigma),
        lambda: segkern.seg_attention(q, k, v, GRID, sigma),
        lambda: reference.gaussian_blur(q, GRID, sigma),
    ):
        with pytest.raises(ValueError, match="sigma"):
            call()


@pytest.mark.parametrize("scale", [10**400, 1e300, torch.tensor(0.5, device="meta"), np.ma.masked], ids=str)
def test_what_cannot_be_a_scale_is_refused(scale: Any) -> None:
    q, k, v = tensors()
    for call in (
        lambda: segkern.seg_attention(q, k, v, GRID, 1.5, scale=scale),
        lambda: segkern.attention_mass(q, k, scale=scale),
        lambda: segkern.attention_energy(q, k, scale=scale),
    ):
        with pytest.raises(ValueError, match="scale must be a finite number"):
            call()


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    "sigma", [torch.tensor(1.3), [torch.tensor(0.0), torch.tensor(1.3)], (torch.tensor(math.inf), 0.5)], ids=str
)
@pytest.mark.parametrize("return_lse", [False, True])
def test_compiled_calls_read_tensors_of_sigmas_beside_gradients(sigma: Any, return_lse: bool) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: Any) -> torch.Tensor:
        result = segkern.seg_attention(q, k, v, GRID, sigma, return_lse=return_lse)
        return result[0].square().sum() + result[1].sum() if return_lse else result.square().sum()

    grads = []
    for call in (torch.compile(attend, backend="aot_eager", fullgraph=True), attend):
        inputs = [x.requires_grad_() for x in tensors()]
        grads.append(torch.autograd.grad(call(*inputs, sigma), inputs))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("sigma", [np.array([0.0, 1.3]), np.float32(1.3)], ids=["array", "number"])
def test_compiled_calls_take_sigmas_of_numpy(sigma: Any) -> None:
    def blur(x: torch.Tensor, sigma: Any) -> torch.Tensor:
        return segkern.gaussian_blur(x, GRID, sigma)

    x = tensors()[0]
    assert torch.equal(torch.compile(blur, backend="eager", fullgraph=True)(x, sigma), blur(x, sigma))


def test_tables_first_made_in_inference_mode_in_a_thread_of_any_name_serve_gradients() -> None:
    x = tensors()[0]

    def infer() -> None:
        with torch.inference_mode():
            segkern.gaussian_blur(x, GRID, 0.5171)

    thread = threading.Thread(target=infer, name="segkern-tables")
    thread.start()
    thread.join()
    segkern.gaussian_blur(x.requires_grad_(), GRID, 0.5171).sum().backward()
    assert x.grad is not None

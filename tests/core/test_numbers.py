# SPDX-License-Identifier: Apache-2.0
"""Number arguments (scale, sigma, grid sizes) from Python, NumPy and tensors; other values are refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

import segkern
from segkern import Grid, reference
from tests.core.functions import GRID, tensors

# name -> the call as a function of the inputs and a scale
SCALED: dict[str, Callable[..., Any]] = {
    "seg_attention": lambda q, k, v, s: segkern.seg_attention(q, k, v, GRID, 1.5, scale=s),
    "by head": lambda q, k, v, s: segkern.seg_attention(q, k, v, GRID, [[0.0, 1.5]], scale=s),
    "coarse queries": lambda q, k, v, s: segkern.seg_attention(q, k, v, GRID, 1.5, scale=s, query_stride=2),
    "attention_mass": lambda q, k, v, s: segkern.attention_mass(q, k, scale=s),
    "attention_energy": lambda q, k, v, s: segkern.attention_energy(q, k, GRID, 1.5, scale=s),
}
# name -> the call as a function of the inputs and a sigma
BLURRED: dict[str, Callable[..., Any]] = {
    "gaussian_blur": lambda q, k, v, s: segkern.gaussian_blur(q, GRID, s),
    "seg_attention": lambda q, k, v, s: segkern.seg_attention(q, k, v, GRID, s),
    "coarse queries": lambda q, k, v, s: segkern.seg_attention(q, k, v, GRID, s, query_stride=2),
    "attention_energy": lambda q, k, v, s: segkern.attention_energy(q, k, GRID, s),
}
every_scaled = pytest.mark.parametrize("scaled", SCALED.values(), ids=SCALED)
every_blurred = pytest.mark.parametrize("blurred", BLURRED.values(), ids=BLURRED)

ONE_AND_A_HALF = {
    "float": 1.5,
    "Fraction": Fraction(3, 2),
    "NumPy float32": np.float32(1.5),
    "NumPy float16": np.float16(1.5),
    "array": np.array(1.5),
    "tensor": torch.tensor(1.5),
    "float16 tensor": torch.tensor(1.5).half(),
    "float64 tensor": torch.tensor(1.5, dtype=torch.float64),
    "Parameter without gradient": torch.nn.Parameter(torch.tensor(1.5), requires_grad=False),
}
NO_NUMBER = {
    "string": "1.5",
    "bytes": b"1",
    "truth value": True,
    "NumPy's truth value": np.bool_(True),
    "tensor of truth": torch.tensor(True),
    "complex": 1j,
    "complex array": np.array(1j),
    "complex tensor": torch.tensor(1j),
    "tensor of three": torch.tensor([0.3, 0.4, 0.5]),
    "object": object(),
    "dictionary": {"sigma": 1.0},
}


@pytest.mark.parametrize("number", ONE_AND_A_HALF.values(), ids=ONE_AND_A_HALF)
def test_one_number_is_one_number_whatever_holds_it(number: Any) -> None:
    inputs = tensors()
    for call in (*SCALED.values(), *BLURRED.values()):
        assert torch.equal(call(*inputs, number), call(*inputs, 1.5))


@every_scaled
@pytest.mark.parametrize(
    "number", [np.array([1.5]), torch.tensor([1.5]), torch.tensor([[[1.5]]]), 2, np.int64(2)], ids=repr
)
def test_a_scale_of_one_element_or_of_integers(scaled: Callable[..., Any], number: Any) -> None:
    inputs = tensors()
    assert torch.equal(scaled(*inputs, number), scaled(*inputs, float(np.asarray(number).item())))


@every_scaled
@pytest.mark.parametrize(
    "number",
    [
        *NO_NUMBER.values(),
        [0.3],
        (0.3, 0.4),
        np.array([0.3, 0.4]),
        math.inf,
        -math.inf,
        math.nan,
        torch.tensor(math.nan),
    ],
    ids=[*NO_NUMBER, "list", "tuple", "array of two", "inf", "-inf", "NaN", "tensor of NaN"],
)
def test_what_is_no_scale_is_quoted(scaled: Callable[..., Any], number: Any) -> None:
    with pytest.raises(ValueError, match="scale must be a finite number, got "):
        scaled(*tensors(), number)


@every_blurred
@pytest.mark.parametrize(
    "one_each",
    [
        [1.5, 0.0],
        (np.float32(1.5), 0),
        [torch.tensor(1.5), torch.tensor(0)],
        np.array([1.5, 0.0]),
        np.array([1.5, 0.0], dtype=np.float16),
        torch.tensor([1.5, 0.0]).half(),
        torch.nn.Parameter(torch.tensor([1.5, 0.0]), requires_grad=False),
    ],
    ids=["list", "NumPy's", "tensors", "array", "float16 array", "float16 tensor", "Parameter"],
)
def test_one_sigma_per_sample_whatever_holds_them(blurred: Callable[..., Any], one_each: Any) -> None:
    inputs = tensors()
    assert torch.equal(blurred(*inputs, one_each), blurred(*inputs, (1.5, 0.0)))


@pytest.mark.parametrize(
    "per_head",
    [
        np.array([[0.0, 1.5], [2.0, 3.0]]),
        torch.tensor([[0.0, 1.5], [2.0, 3.0]]),
        [np.array([0.0, 1.5]), torch.tensor([2.0, 3.0])],
        ([torch.tensor(0.0), 1.5], (2, np.float32(3.0))),
    ],
    ids=["array", "tensor", "arrays", "mixed"],
)
def test_one_sigma_per_head_whatever_holds_them(per_head: Any) -> None:
    q, k, v = tensors()
    expected = [[0.0, 1.5], [2.0, 3.0]]
    assert torch.equal(segkern.gaussian_blur(q, GRID, per_head), segkern.gaussian_blur(q, GRID, expected))
    found = segkern.seg_attention(q, k, v, GRID, per_head)
    assert torch.equal(found, segkern.seg_attention(q, k, v, GRID, expected))
    torch.testing.assert_close(found, reference.seg_attention(q, k, v, GRID, expected))


@every_blurred
@pytest.mark.parametrize("number", NO_NUMBER.values(), ids=NO_NUMBER)
def test_what_is_no_sigma_is_refused(blurred: Callable[..., Any], number: Any) -> None:
    with pytest.raises(ValueError, match="sigma"):
        blurred(*tensors(), number)
    with pytest.raises(ValueError, match="sigma"):
        blurred(*tensors(), (0.0, number))


@every_blurred
@pytest.mark.parametrize(
    "sigma", [-1.0, math.nan, torch.tensor(-1.0), np.array([0.0, -1.0]), [0.0, torch.tensor(math.nan)], (1.0,) * 3, []],
    ids=str,
)  # fmt: skip
def test_sigmas_out_of_range_and_too_many_are_quoted(blurred: Callable[..., Any], sigma: Any) -> None:
    with pytest.raises(ValueError, match=r"sigma must be .*(-1\.0|nan|got \d numbers)"):
        blurred(*tensors(), sigma)


WANTING = {
    "a number": lambda: torch.tensor(1.5, requires_grad=True),
    "a Parameter": lambda: torch.nn.Parameter(torch.tensor(1.5)),
    "one element": lambda: torch.ones(1, requires_grad=True),
    "a product": lambda: torch.tensor(0.5, requires_grad=True) * 3,
}
WANTING_SIGMAS = WANTING | {
    "one per sample": lambda: torch.ones(2, requires_grad=True),
    "among numbers": lambda: [0.0, torch.tensor(1.5, requires_grad=True)],
}
HEADS_WANTING = {
    "a tensor": lambda: torch.ones(2, 2, requires_grad=True),
    "rows": lambda: [torch.ones(2, requires_grad=True), torch.ones(2)],
    "entries": lambda: [[0.0, torch.tensor(1.5, requires_grad=True)], [0.0, 1.0]],
}


@every_scaled
@pytest.mark.parametrize("make", WANTING.values(), ids=WANTING)
def test_a_scale_that_wants_a_gradient_is_refused(scaled: Callable[..., Any], make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"(?s)scale has no derivative.*multiply the queries by it and pass scale=1"):
        scaled(*tensors(), make())
    with torch.no_grad():
        scaled(*tensors(), make())


@every_blurred
@pytest.mark.parametrize("make", WANTING_SIGMAS.values(), ids=WANTING_SIGMAS)
def test_a_sigma_that_wants_a_gradient_is_refused(blurred: Callable[..., Any], make: Callable[[], Any]) -> None:
    sigma = make()
    if isinstance(sigma, torch.Tensor) and sigma.shape == (1,):
        sigma = sigma.expand(2)
    with pytest.raises(ValueError, match=r"(?s)sigma has no derivative.*pass sigma\.detach\(\)"):
        blurred(*tensors(), sigma)
    with torch.no_grad():
        blurred(*tensors(), sigma)


@pytest.mark.parametrize("make", HEADS_WANTING.values(), ids=HEADS_WANTING)
def test_sigmas_of_heads_that_want_a_gradient_are_refused(make: Callable[[], Any]) -> None:
    q, k, v = tensors()
    for call in (lambda s: segkern.gaussian_blur(q, GRID, s), lambda s: segkern.seg_attention(q, k, v, GRID, s)):
        with pytest.raises(ValueError, match=r"(?s)sigma has no derivative.*pass sigma\.detach\(\)"):
            call(make())


def test_forward_derivatives_of_numbers_are_refused() -> None:
    inputs = tensors()
    for name, call in [*SCALED.items(), *BLURRED.items()]:
        with pytest.raises(ValueError, match="has no derivative"):
            torch.func.jvp(lambda s: call(*inputs, s), (torch.tensor(1.5),), (torch.tensor(1.0),))  # noqa: B023
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(torch.tensor(1.5), torch.tensor(1.0))
            with pytest.raises(ValueError, match="has no derivative"):
                call(*inputs, dual)
        if name != "by head":
            with pytest.raises(ValueError, match="has no derivative"):
                torch.func.grad(lambda s: call(*inputs, s).sum())(torch.tensor(1.5))  # noqa: B023


@pytest.mark.parametrize("wanted", ["scale", "sigma"])
def test_compiled_calls_refuse_them_too(wanted: str) -> None:
    inputs = tensors()
    for call in (SCALED if wanted == "scale" else BLURRED).values():
        compiled = torch.compile(lambda n: call(*inputs, n), backend="eager", fullgraph=True)  # noqa: B023
        with pytest.raises(Exception, match=rf"{wanted} has no derivative|query_stride=2 needs sigma as a number"):
            compiled(torch.tensor(1.5, requires_grad=True))


def test_a_scale_that_is_learnt_multiplies_the_queries() -> None:
    """The advice in the error message is correct."""
    q, k, v = tensors(torch.float64)
    scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    segkern.seg_attention(q * scale, k, v, GRID, 1.5, scale=1).square().sum().backward()
    step = 1e-6
    low, high = (reference.seg_attention(q, k, v, GRID, 1.5, scale=0.3 + s).square().sum() for s in (-step, step))
    torch.testing.assert_close(scale.grad, (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


SIZES = {
    "NumPy's": (np.int64(2), np.int32(5), np.uint8(1)),
    "tensors": tuple(torch.tensor([2, 5, 1])),
    "tensors of one element": (torch.tensor([2]), torch.tensor([[5]]), torch.tensor([1], dtype=torch.int32)),
    "arrays": (np.array(2), np.array(5), np.array(1)),
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sizes_of_a_grid_are_converted_to_integers(sizes: tuple[Any, ...]) -> None:
    grid = Grid(*sizes)
    assert grid == Grid(2, 5, 1)
    assert hash(grid) == hash(Grid(2, 5, 1))
    assert repr(grid) == "Grid(height=2, width=5, start=1)"
    assert {type(getattr(grid, name)) for name in ("height", "width", "start", "frames", "tokens", "stop")} == {int}
    assert Grid(2, 5, frames=sizes[0]) == Grid(2, 5, frames=2)
    inputs = tensors()
    for backend in ("torch", "auto"):
        for sigma in (0.0, 1.5, math.inf):
            found = segkern.seg_attention(*inputs, grid, sigma, backend=backend)
            assert torch.equal(found, segkern.seg_attention(*inputs, Grid(2, 5, 1), sigma, backend=backend))


def test_a_grid_keeps_its_sizes_when_a_tensor_changes() -> None:
    height, x = torch.tensor(2), tensors()[0]
    grid = Grid(height, 5, 1)
    before = segkern.gaussian_blur(x, grid, 1.5)
    height.fill_(50)
    assert torch.equal(segkern.gaussian_blur(x, grid, 1.5), before)


NO_SIZES = NO_NUMBER | {
    "float": 2.0,
    "float tensor": torch.tensor(2.0),
    "NumPy float": np.float64(2.0),
    "tensor of two integers": torch.tensor([2, 3]),
    "nothing": None,
    "list": [2],
}


@pytest.mark.parametrize("name", ["height", "width", "start", "frames"])
@pytest.mark.parametrize("size", NO_SIZES.values(), ids=NO_SIZES)
def test_what_is_no_size_is_refused_by_name(size: Any, name: str) -> None:
    with pytest.raises(ValueError, match=rf"Grid\.{name} must be an integer of at least [01], got "):
        Grid(**{"height": 2, "width": 5, name: size})


@pytest.mark.parametrize("number", [torch.tensor(2), np.int64(2), (torch.tensor(1), np.array(2))], ids=repr)
def test_a_stride_is_converted_too(number: Any) -> None:
    inputs, plain = tensors(), (1, 2) if isinstance(number, tuple) else 2
    found = segkern.seg_attention(*inputs, GRID, 1.5, query_stride=number)
    assert torch.equal(found, segkern.seg_attention(*inputs, GRID, 1.5, query_stride=plain))

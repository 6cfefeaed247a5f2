# SPDX-License-Identifier: Apache-2.0
"""Coarse queries: the matrices of one axis, and attention at few points compared with attention at every token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid, reference
from segkern.core.coarse_queries import (
    check_query_stride,
    coarse_grid,
    interpolation_matrix,
    point_count,
    points,
    sampling_matrix,
)
from segkern.core.dispatch import why_not_triton
from segkern.core.gaussian import BOUNDARIES, blur_matrix
from segkern.ops import coarse
from tests.core.contract import assert_contract

axes = st.tuples(st.integers(1, 40), st.integers(1, 45))
boundaries = st.sampled_from(BOUNDARIES)
positive = st.floats(0.2, 60.0)


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@given(axes, positive, boundaries)
def test_rows_sum_to_one_and_stay_bounded(axis: tuple[int, int], sigma: float, boundary: str) -> None:
    length, stride = axis
    count = point_count(length, stride, boundary)
    into = sampling_matrix(length, sigma, count, boundary, dtype=torch.float64)
    back = interpolation_matrix(length, count, boundary, dtype=torch.float64)
    assert into.shape == (count, length)
    assert back.shape == (length, count)
    for matrix in (into, back):
        torch.testing.assert_close(matrix.sum(dim=1), torch.ones(len(matrix), dtype=torch.float64), atol=1e-10, rtol=0)
        assert matrix.abs().sum(dim=1).max() < 6  # so rounding errors of the values are not amplified


@given(st.integers(1, 40), positive, boundaries)
def test_a_point_at_every_token_is_the_blur(length: int, sigma: float, boundary: str) -> None:
    assert torch.equal(
        sampling_matrix(length, sigma, length, boundary, dtype=torch.float64),
        blur_matrix(length, sigma, boundary, dtype=torch.float64),
    )
    assert torch.equal(interpolation_matrix(length, length, boundary), torch.eye(length))


@given(axes, boundaries)
def test_interpolation_meets_its_points(axis: tuple[int, int], boundary: str) -> None:
    """A token that coincides with a point gets the value of that point."""
    length, stride = axis
    count = point_count(length, stride, boundary)
    at = points(length, count, boundary)
    back = interpolation_matrix(length, count, boundary, dtype=torch.float64)
    assert (at >= 0).all()
    assert (at <= length - 1).all()
    for number, place in enumerate(at.tolist()):
        if abs(place - round(place)) < 1e-9:
            expected = torch.eye(count, dtype=torch.float64)[number]
            torch.testing.assert_close(back[round(place)], expected, atol=1e-9, rtol=0)


@given(axes, positive, boundaries)
def test_a_point_on_a_token_is_its_blurred_value(axis: tuple[int, int], sigma: float, boundary: str) -> None:
    length, stride = axis
    count = point_count(length, stride, boundary)
    into = sampling_matrix(length, sigma, count, boundary, dtype=torch.float64)
    blur = blur_matrix(length, sigma, boundary, dtype=torch.float64)
    for number, place in enumerate(points(length, count, boundary).tolist()):
        if abs(place - round(place)) < 1e-9:
            torch.testing.assert_close(into[number], blur[round(place)], atol=1e-9, rtol=0)


@given(axes, boundaries)
def test_points_are_at_most_a_stride_apart(axis: tuple[int, int], boundary: str) -> None:
    length, stride = axis
    at = points(length, point_count(length, stride, boundary), boundary)
    assert at[0] >= 0
    if boundary == "reflect":
        assert (at[0], at[-1]) == (0, length - 1)
    if len(at) > 1:
        assert at.diff().max() <= stride + 1e-9


@given(st.integers(3, 40), boundaries, st.data())
def test_slow_waves_pass_unchanged(length: int, boundary: str, data: st.DataObject) -> None:
    """The blur multiplies a wave by a known factor. Sampling and interpolation give the same at every token."""
    count = data.draw(st.integers(2, length - 1))
    sigma = data.draw(st.floats(0.3, length / 3))
    at = torch.arange(length, dtype=torch.float64)
    if boundary == "circular":
        turns = data.draw(st.integers(0, (count - 1) // 2))
        wave = torch.cos(2 * math.pi * turns * at / length + data.draw(st.floats(0, 6)))
    else:
        number = data.draw(st.integers(0, count - 1))
        shift, period = (0.0, length - 1) if boundary == "reflect" else (0.5, length)
        wave = torch.cos(math.pi / period * (at + shift) * number)
    blurred = blur_matrix(length, sigma, boundary, dtype=torch.float64) @ wave
    at_points = sampling_matrix(length, sigma, count, boundary, dtype=torch.float64) @ wave
    result = interpolation_matrix(length, count, boundary, dtype=torch.float64) @ at_points
    torch.testing.assert_close(result, blurred, atol=1e-9, rtol=0)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("sigma, stride, bound", [(4.0, 4, 0.035), (4.0, 2, 0.006), (2.5, 2, 0.02)])
def test_close_to_every_row_and_closer_with_more_points(boundary: str, sigma: float, stride: int, bound: float) -> None:
    """The error is measured relative to the distance of the rows from their mean, the result at infinity."""
    grid = Grid(32, 40)
    query, key, value = 4 * randn(1, 1, grid.tokens, 32), randn(1, 1, grid.tokens, 32), randn(1, 1, grid.tokens, 32)
    exact = reference.seg_attention(query, key, value, grid, sigma, boundary=boundary)
    spread = (exact - exact.mean(dim=2, keepdim=True)).norm()

    def error(query_stride: int) -> float:
        result = segkern.seg_attention(query, key, value, grid, sigma, boundary=boundary, query_stride=query_stride)
        return float((result - exact).norm() / spread)

    assert 0 < error(stride) < bound
    assert error(1) < 1e-11
    assert error(stride) < error(3 * stride)


@settings(max_examples=50)
@given(data=st.data())
def test_equals_the_reference(data: st.DataObject) -> None:
    grid = Grid(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3)))
    tokens, keys = grid.stop + data.draw(st.integers(0, 2)), data.draw(st.integers(1, 20))
    sigma = tuple(data.draw(st.sampled_from([0.0, 0.7, 3.0, math.inf])) for _ in range(data.draw(st.integers(1, 5))))
    batch, boundary = len(sigma), data.draw(boundaries)
    stride = data.draw(st.one_of(st.integers(1, 5), st.tuples(st.integers(1, 5), st.integers(1, 5))))
    query, key, value = randn(batch, 2, tokens, 8), randn(batch, 2, keys, 8), randn(batch, 2, keys, 6)
    nothing = torch.rand(batch, 1, 1, keys) > 0.6
    mask = data.draw(st.sampled_from([None, nothing, randn(1, 2, 1, keys), randn(keys)]))
    options = {"attn_mask": mask, "boundary": boundary, "query_stride": stride, "return_lse": True}
    expected, expected_lse = reference.seg_attention(query, key, value, grid, sigma, **options)
    result, lse = segkern.seg_attention(query, key, value, grid, sigma, backend="torch", **options)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """The contract is applied at the same points: the approximation is the reference's, and only rounding differs."""
    if backend == "triton" and (reason := why_not_triton(device, dtype, 40)):
        pytest.skip(reason)
    grid, sigma, stride = Grid(7, 9, start=2), (0.0, 2.5, 8.0, math.inf), (2, 3)
    query, key, value = (randn(4, 2, 67, 40).to(device, dtype) for _ in range(3))
    oracle = reference.seg_attention(*(x.double() for x in (query, key, value)), grid, sigma, query_stride=stride)
    result = segkern.seg_attention(query, key, value, grid, sigma, query_stride=stride, backend=backend)
    assert result.dtype == dtype
    coarse, parts = coarse_grid(grid, stride, "reflect"), []
    for i, one in enumerate(sigma):  # with every step at the input's dtype
        part = query[i : i + 1]
        if 0 < one < math.inf:
            part = mixed(part, grid, [sampling_matrix(n, one, m, dtype=dtype) for n, m in axes_of(grid, coarse)])
        else:
            part = reference.gaussian_blur(part, grid, one)
        weights = torch.softmax(part @ key[i : i + 1].transpose(-2, -1) * 40**-0.5, dim=-1)
        part = weights @ value[i : i + 1]
        if 0 < one < math.inf:
            part = mixed(part, coarse, [interpolation_matrix(n, m, dtype=dtype) for n, m in axes_of(grid, coarse)])
        parts.append(part)
    assert_contract(result, oracle, torch.cat(parts))


def axes_of(grid: Grid, coarse: Grid) -> list[tuple[int, int]]:
    return [(grid.height, coarse.height), (grid.width, coarse.width)]


def mixed(x: torch.Tensor, grid: Grid, matrices: list[torch.Tensor]) -> torch.Tensor:
    image = x[:, :, grid.start : grid.stop].unflatten(2, (grid.height, grid.width))
    matrices = [matrix.to(x.device) for matrix in matrices]
    image = torch.einsum("ik,bnkld->bnild", matrices[0], torch.einsum("jl,bnkld->bnkjd", matrices[1], image))
    return torch.cat([x[:, :, : grid.start], image.flatten(2, 3), x[:, :, grid.stop :]], dim=2)


@pytest.mark.parametrize("through_operators", [False, True])
def test_gradients_are_those_of_the_reference(through_operators: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if through_operators:
        monkeypatch.setattr("segkern.api.is_plain", lambda *_: False)
        monkeypatch.setattr("segkern.ops.coarse.is_plain", lambda *_: False)
    query, key, value = (randn(3, 2, 22, 4).requires_grad_() for _ in range(3))
    weights, lse_weights = randn(3, 2, 22, 4), randn(3, 2, 22)
    options = {"grid": Grid(4, 5, 1), "sigma": (0.0, 1.5, math.inf), "query_stride": (2, 3), "return_lse": True}
    result = []
    for attend in (segkern.seg_attention, reference.seg_attention):
        output, lse = attend(query, key, value, **options)
        result.append(torch.autograd.grad((output * weights).sum() + (lse * lse_weights).sum(), (query, key, value)))
    for ours, expected in zip(*result, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("adjoint", [False, True])
def test_operators(adjoint: bool) -> None:
    tokens, points = randn(2, 3, 22, 4), randn(2, 3, 11, 4)
    grid, stride = (4, 5, 1), [2, 3]
    sampled, interpolated = (points, tokens) if adjoint else (tokens, points)
    for sigma in ([1.5], [1.5, 0.7]):
        of_queries = (sampled.requires_grad_(), *grid, sigma, stride, "reflect", adjoint)
        torch.library.opcheck(coarse.coarse_queries_operator, of_queries)
    of_outputs = (interpolated.requires_grad_(), *grid, stride, "reflect", adjoint)
    torch.library.opcheck(coarse.coarse_outputs_operator, of_outputs)


@pytest.mark.slow
def test_compiles_whole() -> None:
    """Strides, sigmas and grids change from call to call."""

    def attend(query: torch.Tensor, grid: Grid, sigma: tuple[float, ...], stride: int) -> tuple[torch.Tensor, ...]:
        return segkern.seg_attention(query, query, query, grid, sigma, query_stride=stride, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for height, width, sigma, stride in ((4, 5, 1.5, 2), (4, 7, 1.5, 3), (6, 5, 2.5, 2)):
        query = randn(3, 2, height * width, 8, dtype=torch.float32).requires_grad_()
        arguments = query, Grid(height, width), (0.0, sigma, math.inf), stride
        (result, lse), (expected, expected_lse) = compiled(*arguments), attend(*arguments)
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(lse, expected_lse)
        weights = torch.randn_like(result)
        gradients = [torch.autograd.grad((x * weights).sum(), query)[0] for x in (result, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_only_the_points_have_query_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spied(query: torch.Tensor, *rest: object, **options: object) -> torch.Tensor:
        rows.append((query.shape[0], query.shape[2]))
        return attend(query, *rest, **options)

    monkeypatch.setattr("segkern.ops.torch_attention.F.scaled_dot_product_attention", spied)
    x = randn(4, 1, 9 * 13 + 2, 8)
    segkern.seg_attention(x, x, x, Grid(9, 13, 1), (0.0, 2.0, 3.0, math.inf), query_stride=(4, 3), backend="torch")
    assert rows[:2] == [(1, 9 * 13 + 2), (2, 3 * 5 + 2)]
    assert sum(count for _, count in rows[2:]) == 1 + 2


def test_autocast_takes_its_dtype_and_keeps_the_weights_of_the_blur() -> None:
    query, key, value = (randn(2, 2, 63, 16, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16):
        result = segkern.seg_attention(query, key, value, Grid(7, 9), (0.0, 3.0), query_stride=2)
    half = [x.bfloat16() for x in (query, key, value)]
    assert torch.equal(result, segkern.seg_attention(*half, Grid(7, 9), (0.0, 3.0), query_stride=2))


def test_results_are_the_callers_own_and_empty_batches_stay_empty() -> None:
    x = randn(2, 1, 6, 2)
    kept = x.clone()
    segkern.seg_attention(x, x, x, Grid(2, 3), 1.0, query_stride=2).add_(1)
    assert torch.equal(x, kept)
    for attend in (segkern.seg_attention, reference.seg_attention):
        assert attend(x[:0], x[:0], x[:0], Grid(2, 3), 1.0, query_stride=2).shape == (0, 1, 6, 2)
    assert coarse.coarse_queries(x[:0], Grid(2, 3), (), (1, 2), "reflect").shape == (0, 1, 4, 2)


def test_a_grid_too_small_to_leave_out_rows_is_exact() -> None:
    x, mask = randn(1, 1, 4, 2), randn(4, 4)
    result = segkern.seg_attention(x, x, x, Grid(2, 2), 1.0, attn_mask=mask, query_stride=4)
    assert torch.equal(result, segkern.seg_attention(x, x, x, Grid(2, 2), 1.0, attn_mask=mask))


def test_matrices_refuse_what_does_not_fit() -> None:
    for make in (lambda n: sampling_matrix(5, 1.0, n), lambda n: interpolation_matrix(5, n)):
        for count in (0, 6):
            with pytest.raises(ValueError, match=f"1 to 5 points, got {count}"):
                make(count)
    with pytest.raises(ValueError, match="'reflekt'"):
        interpolation_matrix(5, 3, "reflekt")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, (2,), (2, 0), (2, 2, 2), "2", None], ids=str)
def test_strides_that_say_nothing_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="query_stride must be an integer") as refusal:
        check_query_stride(wrong)
    assert repr(wrong) in str(refusal.value)
    x = randn(1, 1, 4, 2)
    with pytest.raises(ValueError, match="query_stride"):
        segkern.seg_attention(x, x, x, Grid(2, 2), 1.0, query_stride=wrong)


def test_masks_with_rows_of_their_own_are_refused_where_rows_are_left_out() -> None:
    x, mask = randn(2, 1, 6, 2), randn(6, 6)
    for attend in (segkern.seg_attention, reference.seg_attention):
        with pytest.raises(ValueError, match=r"6, 6\)"):
            attend(x, x, x, Grid(2, 3), 1.0, attn_mask=mask, query_stride=2)
    for sigma in (0.0, math.inf):
        result = segkern.seg_attention(x, x, x, Grid(2, 3), sigma, attn_mask=mask, query_stride=2)
        torch.testing.assert_close(result, segkern.seg_attention(x, x, x, Grid(2, 3), sigma, attn_mask=mask))

# SPDX-License-Identifier: Apache-2.0
"""The estimate of coarse queries' error against the true error, on drawn inputs, kind ones and others."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid, reference
from segkern.core.coarse_queries import coarse_grid, points
from segkern.core.gaussian import BOUNDARIES
from segkern.ops import coarse, estimate
from tests.core.drawn_inputs import DIM, KINDS, inputs, uniform


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_the_true_error_is_at_most_twice_the_estimate(kind: str) -> None:
    """Over 24 inputs a kind, 168 in all, at several strides; and the estimate is no wild guess either."""
    pairs = []
    for number in range(24):
        torch.manual_seed(number)
        grid = (Grid(32, 32), Grid(24, 38), Grid(16, 16))[number % 3]
        boundary = (*BOUNDARIES, "reflect")[number % 4]
        sigma, swing, steepness = 2 ** uniform(1, 3.5), uniform(1, 6), uniform(0, 2)
        query, key, value = inputs(kind, grid, steepness, swing)
        for stride in (2, 3, 4):
            arguments = query, key, value, grid, sigma, stride
            true = reference.coarse_error(*arguments, boundary=boundary).item()
            estimated = segkern.coarse_error(*arguments, boundary=boundary).item()
            pairs.append((true, estimated, f"{grid} {boundary} sigma {sigma:.1f} swing {swing:.1f} stride {stride}"))
    table = "\n".join(f"true {true:.2e} estimated {estimated:.2e} {what}" for true, estimated, what in pairs)
    assert all(true <= 2 * estimated for true, estimated, _ in pairs), table
    ratios = sorted(true / estimated for true, estimated, _ in pairs if estimated < math.inf)
    assert len(ratios) > 12, f"it trusts next to nothing\n{table}"
    assert ratios[len(ratios) // 2] > 0.2, f"half of the estimates are above five times the error\n{table}"
    assert all(true > 0.01 for true, estimated, _ in pairs if estimated == math.inf), table


@settings(max_examples=30)
@given(data=st.data())
def test_it_holds_for_any_shape(data: st.DataObject) -> None:
    """Tokens outside the grid, masks, one sigma per sample; samples that leave out nothing have no error."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    grid = Grid(data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3)))
    boundary, stride = (
        data.draw(st.sampled_from(BOUNDARIES)),
        data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
    )
    sigma = tuple(data.draw(st.lists(st.sampled_from([0.0, 2.0, 4.0, math.inf]), min_size=1, max_size=4)))
    query, key = (torch.randn(len(sigma), 2, grid.stop + 1, 8, dtype=torch.float64) for _ in range(2))
    value = torch.randn(len(sigma), 2, grid.stop + 1, 6, dtype=torch.float64)
    some = torch.rand(len(sigma), 1, 1, grid.stop + 1) > 0.3
    mask = data.draw(st.sampled_from([None, some, torch.randn(grid.stop + 1)]))
    options = {"boundary": boundary, "attn_mask": mask}
    estimated = segkern.coarse_error(query, key, value, grid, sigma, stride, **options)
    true = reference.coarse_error(query, key, value, grid, sigma, stride, **options)
    assert estimated.dtype == torch.float32
    assert estimated.shape == (len(sigma),)
    assert (true <= 2 * estimated + 1e-6).all()
    exact = coarse_grid(grid, stride, boundary).tokens == grid.tokens
    for one, error in zip(sigma, estimated.tolist(), strict=True):
        assert error == 0 or (0 < one < math.inf and not exact)


def test_what_the_points_do_not_resolve_is_not_trusted() -> None:
    grid = Grid(16, 16)
    query, key, value = (torch.randn(1, 2, grid.tokens, DIM) for _ in range(3))
    assert segkern.coarse_error(20 * query, key, value, grid, 1.0, 4).item() == math.inf
    value[0, 0, 0, 0] = math.nan
    assert segkern.coarse_error(query, key, value, grid, 5.0, 2).item() == math.inf
    assert segkern.coarse_error(query, key, torch.zeros_like(value), grid, 5.0, 2).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_is_not_part_of_it(dtype: torch.dtype) -> None:
    grid = Grid(32, 36)
    query, key, value = (torch.randn(1, 2, grid.tokens, DIM).to(dtype) for _ in range(3))
    exactly = segkern.coarse_error(query.double(), key.double(), value.double(), grid, 5.0, 2)
    assert exactly.item() < torch.finfo(dtype).eps / 2
    torch.testing.assert_close(segkern.coarse_error(query, key, value, grid, 5.0, 2), exactly, rtol=0.05, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(segkern.coarse_error(query, key, value, grid, 5.0, 2), exactly, rtol=0.05, atol=0)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.sampled_from(BOUNDARIES))
def test_probes_lie_between_the_points_and_no_two_in_one_place(
    height: int, width: int, down: int, across: int, boundary: str
) -> None:
    grid, stride = Grid(height, width), (down, across)
    coarse = coarse_grid(grid, stride, boundary)
    if coarse.tokens == grid.tokens:
        return
    found = estimate._spread_rows(grid, stride, boundary, 64, torch.device("cpu"))
    for rows, count in zip(found, (32, 16), strict=True):
        assert 0 < len(rows) <= count
        assert len(rows.unique()) == len(rows)
        on_points = []
        for length, number, at in ((height, coarse.height, rows // width), (width, coarse.width, rows % width)):
            nearest = points(length, number, boundary).round()
            on_points.append(torch.isin(at.double(), nearest) if number < length else torch.ones(len(at), dtype=bool))
        assert not (on_points[0] & on_points[1]).any()


def test_it_is_an_operator_that_compiles() -> None:
    query = torch.randn(3, 2, 30, 8)
    arguments = (query, query, query, None, 5, 6, 0, (0.0, 2.0, math.inf), 0.3, "reflect", (2, 2), 8)
    torch.library.opcheck(coarse.coarse_error, arguments)

    def error(x: torch.Tensor, grid: Grid, stride: int) -> torch.Tensor:
        return segkern.coarse_error(x, x, x, grid, (0.0, 2.0, 3.0), stride)

    compiled = torch.compile(error, fullgraph=True, backend="aot_eager")
    for height, width, stride in ((5, 6, 2), (8, 9, 3)):
        x = torch.randn(3, 2, height * width, 8, requires_grad=True)
        found = compiled(x, Grid(height, width), stride)
        torch.testing.assert_close(found, error(x, Grid(height, width), stride))
        assert not found.requires_grad


@pytest.mark.parametrize("wrong", [3, 4.0, True, None], ids=str)
def test_numbers_of_probes_that_do_not_fit_are_refused(wrong: object) -> None:
    x = torch.randn(1, 1, 6, 2)
    with pytest.raises(ValueError, match=f"probes must be an integer of at least 4, got {wrong}"):
        segkern.coarse_error(x, x, x, Grid(2, 3), 1.0, 2, probes=wrong)


def test_masks_with_rows_of_their_own_are_refused_where_rows_are_left_out() -> None:
    x, mask = torch.randn(1, 1, 6, 2), torch.randn(6, 6)
    with pytest.raises(ValueError, match=r"6, 6\)"):
        segkern.coarse_error(x, x, x, Grid(2, 3), 1.0, 2, attn_mask=mask)
    assert segkern.coarse_error(x, x, x, Grid(2, 3), math.inf, 2, attn_mask=mask).item() == 0

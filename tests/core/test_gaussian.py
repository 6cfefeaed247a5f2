# SPDX-License-Identifier: Apache-2.0
"""The blur: taps, matrices, boundaries, infinity, and numbers from the official implementation."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import segkern
from segkern import Grid, reference
from segkern.core.gaussian import BOUNDARIES, blur_matrix, blur_reach, cached_blur_matrix, gaussian_taps, tap_count
from segkern.core.sigmas import check_sigma, equal_runs

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden" / "official_blur.safetensors")
GOLDEN_CASES = sorted({name.split(".")[0] for name in GOLDEN}, key=int)

lengths = st.integers(1, 40)
finite_sigmas = st.floats(0.05, 200.0)


@pytest.mark.parametrize("blur", [reference.gaussian_blur, segkern.gaussian_blur], ids=["reference", "api"])
@pytest.mark.parametrize("case", GOLDEN_CASES)
def test_official_blur_is_reproduced(case: str, blur) -> None:
    image, expected = GOLDEN[f"{case}.input"], GOLDEN[f"{case}.output"]
    height, width = image.shape[-2:]
    tokens = image.flatten(2).transpose(1, 2)[:, None]  # [batch, 1, tokens, channels]
    blurred = blur(tokens, Grid(height, width), GOLDEN[f"{case}.sigma"].item())
    blurred = blurred[:, 0].transpose(1, 2).unflatten(2, (height, width))
    # Relative to the largest averaged value: the official float32 sums already differ by up to 1.6e-6 of the largest
    # output from the same blur in float64.
    assert (blurred - expected).abs().max() <= 1e-6 * image.abs().max()


@given(sigma=finite_sigmas, length=lengths)
def test_taps_are_odd_fit_the_axis_and_sum_to_one(sigma: float, length: int) -> None:
    taps = gaussian_taps(sigma, length)
    assert taps.numel() == tap_count(sigma, length)
    assert taps.numel() % 2 == 1
    assert taps.numel() // 2 <= max(length - 1, 0), "reflection would need a token that does not exist"
    assert taps.numel() <= math.ceil(6 * sigma) + 1
    assert taps.sum().item() == pytest.approx(1.0, abs=1e-12)
    assert torch.equal(taps, taps.flip(0))


@given(sigma=finite_sigmas, length=st.integers(2, 40), boundary=st.sampled_from(["reflect", "circular"]))
def test_matrix_is_padding_and_convolution(sigma: float, length: int, boundary: str) -> None:
    x = torch.randn(1, 1, length, dtype=torch.float64)
    taps = gaussian_taps(sigma, length)
    padded = F.pad(x, [taps.numel() // 2] * 2, mode=boundary)
    expected = F.conv1d(padded, taps[None, None])[0, 0]
    blurred = blur_matrix(length, sigma, boundary, dtype=torch.float64) @ x[0, 0]
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-12)


@given(sigma=finite_sigmas, length=lengths)
def test_symmetric_boundary_repeats_the_edge(sigma: float, length: int) -> None:
    x = torch.randn(length, dtype=torch.float64)
    radius = tap_count(sigma, length) // 2
    padded = torch.cat([x.flip(0)[length - radius :], x, x.flip(0)[:radius]])
    expected = padded.unfold(0, 2 * radius + 1, 1) @ gaussian_taps(sigma, length)
    blurred = blur_matrix(length, sigma, "symmetric", dtype=torch.float64) @ x
    torch.testing.assert_close(blurred, expected, rtol=0, atol=1e-12)


@given(sigma=finite_sigmas, length=lengths, boundary=st.sampled_from(BOUNDARIES))
def test_rows_sum_to_one_and_stay_within_reach(sigma: float, length: int, boundary: str) -> None:
    matrix = blur_matrix(length, sigma, boundary, dtype=torch.float64)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(length, dtype=torch.float64), rtol=0, atol=1e-12)
    distance = (torch.arange(length)[:, None] - torch.arange(length)[None, :]).abs()
    assert (matrix[distance > blur_reach(sigma, length, boundary)] == 0).all()


@given(sigma=finite_sigmas, length=lengths, boundary=st.sampled_from(["symmetric", "circular"]))
def test_symmetric_and_circular_boundaries_keep_the_mean(sigma: float, length: int, boundary: str) -> None:
    columns = blur_matrix(length, sigma, boundary, dtype=torch.float64).sum(dim=0)
    torch.testing.assert_close(columns, torch.ones(length, dtype=torch.float64), rtol=0, atol=1e-12)


def test_reflect_does_not_keep_the_mean() -> None:
    assert (blur_matrix(8, 2.0, "reflect").sum(dim=0) - 1).abs().max() > 0.05


def test_taps_are_clamped_per_axis() -> None:
    wide = reference.gaussian_blur(torch.eye(6 * 40)[None, None], Grid(6, 40), 3.0)[0, 0]
    assert tap_count(3.0, 6) == 7
    assert tap_count(3.0, 40) == 19
    centre = wide.unflatten(1, (6, 40)).unflatten(0, (6, 40))[3, 20]
    assert (centre[:, 20] > 0).all(), "every row must be within reach"
    assert (centre[3] > 0).nonzero().flatten().tolist() == list(range(11, 30))


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_infinity_is_the_mean_and_a_large_sigma_is_not(boundary: str) -> None:
    x = torch.randn(1, 2, 32 * 32, 8, dtype=torch.float64)
    mean = x.mean(dim=2, keepdim=True).expand_as(x)
    infinite = segkern.gaussian_blur(x, Grid(32, 32), math.inf, boundary=boundary)
    torch.testing.assert_close(infinite, mean, rtol=0, atol=1e-12)
    large = segkern.gaussian_blur(x, Grid(32, 32), 9999.0, boundary=boundary)
    assert (large - mean).std() > (1e-3 * x.std() if boundary != "circular" else 1e-4)


@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    sigma=st.one_of(finite_sigmas, st.just(math.inf), st.just(0.0)),
    boundary=st.sampled_from(BOUNDARIES),
    start=st.integers(0, 3),
)
def test_constant_is_unchanged_and_text_is_untouched(
    height: int, width: int, sigma: float, boundary: str, start: int
) -> None:
    grid = Grid(height, width, start)
    x = torch.randn(1, 2, grid.tokens + start + 2, 4, dtype=torch.float64)
    x[:, :, grid.start : grid.stop] = x[:, :, grid.start : grid.start + 1]
    blurred = segkern.gaussian_blur(x, grid, sigma, boundary=boundary)
    torch.testing.assert_close(blurred, x, rtol=0, atol=1e-12)
    outside = [i for i in range(x.shape[2]) if not grid.start <= i < grid.stop]
    assert torch.equal(blurred[:, :, outside], x[:, :, outside])


def test_blur_runs_along_both_axes_of_a_non_square_grid() -> None:
    image = torch.zeros(1, 1, 5, 11, 1)
    image[0, 0, 2, 4] = 1.0
    blurred = segkern.gaussian_blur(image.flatten(2, 3), Grid(5, 11), 0.8).unflatten(2, (5, 11))[0, 0, ..., 0]
    assert blurred.argmax() == 2 * 11 + 4
    torch.testing.assert_close(blurred[2, 3], blurred[2, 5])
    torch.testing.assert_close(blurred[1, 4], blurred[3, 4])


def test_result_shares_no_memory_with_its_input() -> None:
    x = torch.randn(2, 1, 6, 4)
    for sigma in (0.0, 1.0, math.inf):
        blurred = segkern.gaussian_blur(x, Grid(2, 3), sigma)
        before = x.clone()
        blurred.fill_(7.0)  # would fail on an expanded result and change x on a shared one
        assert torch.equal(x, before)


@pytest.mark.parametrize("sigma", [-1.0, math.nan, -math.inf, (1.0, -2.0), "inf", None, True])
def test_bad_sigma_is_quoted(sigma: object) -> None:
    with pytest.raises(ValueError, match="sigma") as error:
        segkern.gaussian_blur(torch.zeros(2, 1, 6, 4), Grid(2, 3), sigma)
    quoted = sigma[1] if isinstance(sigma, tuple) else sigma
    assert str(quoted) in str(error.value)


def test_wrong_number_of_sigmas_is_quoted() -> None:
    with pytest.raises(ValueError, match=r"got 2 numbers \(1.0, 2.0\) for a batch of 3"):
        segkern.gaussian_blur(torch.zeros(3, 1, 6, 4), Grid(2, 3), (1.0, 2.0))


def test_unknown_boundary_is_quoted() -> None:
    with pytest.raises(ValueError, match="'zeros'"):
        segkern.gaussian_blur(torch.zeros(1, 1, 6, 4), Grid(2, 3), 1.0, boundary="zeros")


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [((0, 3), "0"), ((2, -1), "-1"), ((2.5, 3), "2.5"), ((2, 3, -4), "-4"), ((True, 3), "True")],
)
def test_bad_grid_is_quoted(arguments: tuple, quoted: str) -> None:
    with pytest.raises(ValueError, match="Grid") as error:
        Grid(*arguments)
    assert quoted in str(error.value)


@pytest.mark.parametrize("grid", [Grid(4, 5), Grid(3, 5, start=1)], ids=str)
def test_grid_that_does_not_fit_is_quoted(grid: Grid) -> None:
    with pytest.raises(ValueError, match="only 15 tokens") as error:
        segkern.gaussian_blur(torch.zeros(1, 1, 15, 4), grid, 1.0)
    assert str(grid) in str(error.value)


def test_grid_must_be_a_grid() -> None:
    with pytest.raises(ValueError, match=r"Grid\(height, width, start=0\), got \(3, 5\)"):
        segkern.gaussian_blur(torch.zeros(1, 1, 15, 4), (3, 5), 1.0)


@given(st.lists(st.sampled_from([0.0, 1.0, math.inf]), max_size=8))
def test_runs_cover_the_batch_in_order(sigmas: list[float]) -> None:
    rebuilt = [value for samples, value in equal_runs(sigmas) for _ in range(*samples.indices(len(sigmas)))]
    assert rebuilt == sigmas
    blurred = equal_runs(sigmas)
    assert all(a[1] != b[1] for a, b in itertools.pairwise(blurred))


def test_sigma_may_be_a_tensor() -> None:
    assert check_sigma(torch.tensor([0.0, math.inf]), 2) == (0.0, math.inf)
    assert check_sigma(torch.tensor(2.0), 3) == (2.0, 2.0, 2.0)


def test_tables_made_inside_a_transform_serve_later_calls() -> None:
    sigma = 1.0 + random.random()  # no table was made for it before
    x = torch.randn(1, 2, 35, 4)
    torch.func.grad(lambda x: segkern.gaussian_blur(x, Grid(5, 7), sigma, backend="torch").sum())(x)
    matrix = cached_blur_matrix(5, sigma, "reflect", device=torch.device("cpu"))
    assert matrix.data_ptr()
    torch.testing.assert_close(matrix, blur_matrix(5, sigma))

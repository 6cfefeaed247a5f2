# SPDX-License-Identifier: Apache-2.0
"""The effect of blurring logits on their mean, variance and energy, with the assumptions of each statement.

All computations are in float64. Logits are ``[queries, keys]``. If keys are unit vectors, the queries are the logits.
Each statement is followed by a counterexample that drops one of its assumptions.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segkern import Grid, gaussian_blur
from segkern.analysis import energy
from tests.core.energy_tools import (
    BOUNDARIES,
    MEAN_KEEPING,
    SIGMAS,
    dense,
    fields,
    grids,
    kinds,
    lse,
    seeds,
    sigmas,
    slack,
)

mean_keeping = st.sampled_from(MEAN_KEEPING)
boundaries = st.sampled_from(BOUNDARIES)
cuts = st.sampled_from(["keys", "queries"])
CHECKERED = torch.tensor([1.0, -1.0], dtype=torch.float64)


def moments(logits: torch.Tensor, grid: Grid, sigma: float, boundary: str) -> energy.Moments:
    """Return the moments of each key's logits over the queries, ``[keys]``."""
    query, key = logits[None, None], torch.eye(logits.shape[1], dtype=torch.float64)[None, None]
    options: dict[str, Any] = {"scale": 1.0, "boundary": boundary, "dtype": torch.float64}
    mean, variance = energy.logit_moments(query, key, grid, sigma, per_key=True, **options)
    return energy.Moments(mean[0, 0], variance[0, 0])


def energies(logits: torch.Tensor, grid: Grid, sigma: float, boundary: str, over: Any = "queries") -> torch.Tensor:
    """Return the energies of the keys or of the queries."""
    query, key = logits[None, None], torch.eye(logits.shape[1], dtype=torch.float64)[None, None]
    options: dict[str, Any] = {"scale": 1.0, "boundary": boundary, "dtype": torch.float64}
    return energy.energies(query, key, grid, sigma, over=over, **options)[0, 0]


def column_sums(grid: Grid, sigma: float, boundary: str) -> torch.Tensor:
    """Return the weight of each token in the sum of all blurred tokens."""
    return dense(grid, sigma, boundary).sum(dim=0)


# Proposition 3.1


@given(grids, st.integers(0, 3), sigmas, boundaries, seeds)
def test_blurred_logits_are_the_logits_of_blurred_queries(
    grid: Grid, start: int, sigma: float, boundary: str, seed: int
) -> None:
    """Proposition 3.1. Assumes that the blur is linear and mixes only queries."""
    draw = torch.Generator().manual_seed(seed)
    grid = Grid(grid.height, grid.width, start)
    query, key = (torch.randn(2, 2, n, 5, generator=draw, dtype=torch.float64) for n in (grid.stop + 1, 4))
    logits = query @ key.transpose(-2, -1)
    expected = gaussian_blur(logits, grid, sigma, boundary=boundary)
    result = gaussian_blur(query, grid, sigma, boundary=boundary) @ key.transpose(-2, -1)
    torch.testing.assert_close(result, expected, rtol=0.0, atol=slack(logits))


def test_without_linearity_blurring_queries_is_something_else() -> None:
    """A blur does not commute with the softmax or with a rotation that depends on the position."""
    grid = Grid(1, 6)
    query, key = torch.randn(2, 1, 1, 6, 2, dtype=torch.float64)
    logits = query @ key.transpose(-2, -1)
    blurred = gaussian_blur(logits, grid, 1.0)
    assert (blurred.softmax(dim=-1) - gaussian_blur(logits.softmax(dim=-1), grid, 1.0)).abs().max() > 1e-3
    angle = torch.arange(6, dtype=torch.float64)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).view(6, 2, 2)
    turned, late = (
        torch.einsum("tij,tj->ti", turn, x[0, 0])[None, None] for x in (query, gaussian_blur(query, grid, 1.0))
    )
    assert (gaussian_blur(turned, grid, 1.0) - late).abs().max() > 1e-2


# Lemma 3.1


@given(grids, sigmas, mean_keeping, kinds, seeds)
def test_the_mean_is_kept_and_the_variance_not_raised(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int
) -> None:
    """Lemma 3.1, for each key. Assumes a boundary with which the columns of the blur sum to 1."""
    logits = fields(kind, grid, 3, seed)
    before, after = (moments(logits, grid, s, boundary) for s in (0.0, sigma))
    assert (after.mean - before.mean).abs().max() <= slack(logits)
    assert (after.variance - before.variance * (1 + 1e-12)).max() <= slack(logits) ** 2
    if math.isinf(sigma):
        assert after.variance.max() <= slack(logits) ** 2


@given(grids, sigmas, kinds, seeds)
def test_under_reflect_the_mean_drifts_within_bounds(grid: Grid, sigma: float, kind: str, seed: int) -> None:
    """With column sums ``c``, the mean changes by at most ``mean|c - 1| range / 2`` and ``rms(c - 1) std``.

    The variance grows by a factor of at most ``max c``. Both follow from ``sum(c - 1) = 0`` and rows that sum to 1.
    """
    logits = fields(kind, grid, 3, seed)
    off = column_sums(grid, sigma, "reflect") - 1
    before, after = (moments(logits, grid, s, "reflect") for s in (0.0, sigma))
    drift = (after.mean - before.mean).abs() - slack(logits)
    spread = logits.amax(dim=0) - logits.amin(dim=0)
    assert (drift <= off.abs().mean() * spread / 2).all()
    assert (drift <= off.square().mean().sqrt() * before.variance.sqrt()).all()
    assert (after.variance <= (1 + off.max()) * before.variance * (1 + 1e-12) + slack(logits) ** 2).all()


def test_under_reflect_the_bound_of_the_drift_is_reached() -> None:
    """Logits equal to the column sums reach the bound."""
    grid = Grid(6, 9)
    off = column_sums(grid, 1.0, "reflect") - 1
    before, after = (moments(off[:, None], grid, s, "reflect") for s in (0.0, 1.0))
    drift = after.mean - before.mean
    assert drift.item() == pytest.approx((off.square().mean().sqrt() * before.variance.sqrt()).item())
    assert drift.item() > 0.01


def test_without_a_mean_keeping_boundary_the_variance_can_rise() -> None:
    """Reflect, sigma 1, 39 tokens: in the direction that the blur, minus its mean, stretches most."""
    blur = dense(Grid(1, 39), 1.0, "reflect")
    centre = torch.eye(39, dtype=torch.float64) - 1 / 39
    worst = torch.linalg.svd(centre @ blur @ centre).Vh[0][:, None]
    before, after = (moments(worst, Grid(1, 39), s, "reflect").variance.item() for s in (0.0, 1.0))
    assert after > 1.01 * before


@given(grids, kinds, seeds)
def test_any_mean_of_shuffles_will_do(grid: Grid, kind: str, seed: int) -> None:
    """The kernel need not be Gaussian: nonnegative weights with rows and columns that sum to 1 suffice."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.rand(4, generator=draw, dtype=torch.float64)
    shuffles = [
        torch.eye(grid.tokens, dtype=torch.float64)[torch.randperm(grid.tokens, generator=draw)] for _ in weights
    ]
    logits = fields(kind, grid, 3, seed)
    mixed = sum(w * s for w, s in zip(weights / weights.sum(), shuffles, strict=True)) @ logits
    assert (mixed.mean(dim=0) - logits.mean(dim=0)).abs().max() <= slack(logits)
    assert (mixed.var(dim=0, correction=0) <= logits.var(dim=0, correction=0) * (1 + 1e-12) + slack(logits) ** 2).all()
    assert (lse(mixed, 0) <= lse(logits, 0) + slack(logits)).all()


def test_with_a_negative_weight_variance_rises_and_energy_falls() -> None:
    """A sharpening kernel, (-1/4, 3/2, -1/4) around a ring, keeps the mean but is not a mean of permutations."""
    eye = torch.eye(8, dtype=torch.float64)
    sharpen = 1.5 * eye - 0.25 * (eye.roll(1, 0) + eye.roll(-1, 0))
    logits = fields("random", Grid(1, 8), 1, seed=0)
    sharper = sharpen @ logits
    assert sharper.mean().item() == pytest.approx(logits.mean().item())
    assert sharper.var() > 1.1 * logits.var()
    assert (lse(sharper, 0) > lse(logits, 0) + 0.1).all()


# Lemma 3.2


@given(grids, sigmas, mean_keeping, kinds, seeds, cuts)
def test_a_layers_energy_does_not_fall(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int, over: str
) -> None:
    """Lemma 3.2: energy is ordered as no blur <= any blur <= mean query. Assumes a mean-keeping boundary.

    It holds for each key and for the sum over queries. It is exact, without a Taylor series, for logits of any size.
    """
    logits = fields(kind, grid, 3, seed)
    none, some, full = (energies(logits, grid, s, boundary, over) for s in (0.0, sigma, math.inf))
    if over == "keys":
        none, some, full = (x.sum(dim=0, keepdim=True) for x in (none, some, full))
    assert (some >= none - grid.tokens * slack(logits)).all()
    assert (full >= some - grid.tokens * slack(logits)).all()
    if over == "queries":
        largest = -logits.mean(dim=0) - math.log(grid.tokens)  # energy of uniform logits with this mean
        torch.testing.assert_close(full, largest, rtol=0.0, atol=slack(logits))


def test_the_log_sum_exp_falls_where_the_papers_words_say_that_it_rises() -> None:
    """Lemma 3.2 says "increases the lse term". Its proof, and a peak, show the opposite."""
    peak = torch.zeros(16, 1, dtype=torch.float64)
    peak[5] = 4.0
    before, after = (-energies(peak, Grid(4, 4), s, "circular").item() for s in (0.0, 1.0))
    assert after < before - 0.5


def test_the_taylor_series_of_the_proof_is_not_needed_and_far_off_for_peaks() -> None:
    """The second order is ``mean + log n + log(1 + variance / 2)``: accurate for small logits, 40 too low for peaks."""
    for size, low, high in ((0.1, -1e-4, 1e-4), (100.0, 40.0, 100.0)):
        logits = torch.zeros(16, dtype=torch.float64)
        logits[5] = size
        series = logits.mean() + math.log(16) + torch.log1p(logits.var(correction=0) / 2)
        assert low < (lse(logits, 0) - series).item() < high


@given(grids, sigmas, boundaries, kinds, seeds)
def test_a_rows_energy_is_not_below_the_blurred_energies(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int
) -> None:
    """``E'((B A)_i) >= sum_j B_ij E'(A_j)`` for any boundary, because E' is concave and the rows of B sum to 1.

    Summed over the rows, it bounds how far reflect can lower a layer's energy: not below ``sum_j c_j E'(A_j)``.
    """
    logits = fields(kind, grid, 3, seed)
    none, some = (energies(logits, grid, s, boundary, "keys") for s in (0.0, sigma))
    blurred = dense(grid, sigma, boundary) @ none
    assert (some >= blurred - slack(logits)).all()
    assert some.sum() >= column_sums(grid, sigma, boundary) @ none - grid.tokens * slack(logits)


def test_one_rows_energy_can_fall() -> None:
    """The energy of a flat row between two peaked rows falls, while the sum over the ring rises."""
    logits = torch.zeros(3, 4, dtype=torch.float64)
    logits[0, 0] = logits[2, 0] = 9.0
    before, after = (energies(logits, Grid(1, 3), s, "circular", "keys") for s in (0.0, 1.0))
    assert after[1] < before[1] - 3.0
    assert after.sum() > before.sum()


@pytest.mark.parametrize("over", ["keys", "queries"])
def test_without_a_mean_keeping_boundary_a_layers_energy_can_fall(over: str) -> None:
    """With reflect, the middle token of a line of three has a weight above 1, so its logits count more."""
    logits = torch.tensor([[0.0, 0.0], [0.2, 0.2], [0.0, 0.0]], dtype=torch.float64)
    assert column_sums(Grid(1, 3), 1.0, "reflect")[1] > 1.2
    before, after = (energies(logits, Grid(1, 3), s, "reflect", over).sum().item() for s in (0.0, 1.0))
    assert after < before - 0.01


@given(grids, sigmas, kinds, seeds)
def test_under_reflect_a_keys_energy_falls_within_a_bound(grid: Grid, sigma: float, kind: str, seed: int) -> None:
    """It falls by at most ``log max c`` with the column sums c: ``sum_i exp((B a)_i) <= sum_j c_j exp(a_j)``."""
    logits = fields(kind, grid, 3, seed)
    before, after = (energies(logits, grid, s, "reflect") for s in (0.0, sigma))
    assert (after >= before - column_sums(grid, sigma, "reflect").max().log() - slack(logits)).all()


# Over sigma


@given(grids, sigmas, mean_keeping, kinds, seeds, cuts, st.integers(2, 4))
def test_energy_rises_each_time_a_blur_is_applied(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int, over: str, times: int
) -> None:
    """Variance falls. This is the "every time we apply" of Lemma 3.1, and it is correct."""
    logits = fields(kind, grid, 3, seed)
    blur = dense(grid, sigma, boundary)
    seen = [torch.linalg.matrix_power(blur, n) @ logits for n in range(times + 1)]
    for one, more in itertools.pairwise(seen):
        rise = energies(more, grid, 0.0, boundary, over).sum() - energies(one, grid, 0.0, boundary, over).sum()
        assert rise >= -grid.tokens * slack(logits)
        assert (more.var(dim=0, correction=0) <= one.var(dim=0, correction=0) * (1 + 1e-9) + slack(logits) ** 2).all()


@given(grids, st.lists(st.sampled_from(SIGMAS[:-1]), min_size=2, max_size=2, unique=True), mean_keeping, kinds, seeds)
def test_how_far_energy_can_fall_as_sigma_grows(
    grid: Grid, pair: list[float], boundary: str, kind: str, seed: int
) -> None:
    """Energy falls by at most half the range of the logits times a distance.

    The distance is that of the wider blur from a blur of the narrower one: the largest row sum of the difference. It is
    0 for continuous Gaussians, so their energy cannot fall. It is nearly 0 for taps cut off at three sigma, but not for
    taps that the grid clamps.
    """
    narrow, wide = sorted(pair)
    logits = fields(kind, grid, 3, seed)
    steps = [dense(grid, s, boundary) for s in (narrow, wide, math.sqrt(wide**2 - narrow**2))]
    distance = (steps[1] - steps[2] @ steps[0]).abs().sum(dim=1).max()
    before, after = (energies(logits, grid, s, boundary) for s in (narrow, wide))
    allowed = distance * (logits.amax(dim=0) - logits.amin(dim=0)) / 2
    assert (after >= before - allowed - slack(logits)).all()


@pytest.mark.parametrize("over", ["keys", "queries"])
@pytest.mark.parametrize(
    "grid, narrow, wide, size",
    [(Grid(1, 4), 1.0, 100.0, 3.0), (Grid(1, 64), 2.2, 2.5, 30.0)],
    ids=["clamped taps", "taps cut off at three sigma"],
)
def test_energy_can_fall_as_sigma_grows(grid: Grid, narrow: float, wide: float, size: float, over: str) -> None:
    """On a checkerboard around a ring: truncated kernels let a part of it through, not less for a larger sigma.

    So "a larger sigma is a smaller one, blurred again" (below Lemma 3.1) does not hold for the discrete kernel.
    """
    board = size * CHECKERED.repeat(grid.tokens // 2)
    logits = torch.stack([board, -board], dim=1)
    before, after = (energies(logits, grid, s, "circular", over).sum().item() for s in (narrow, wide))
    assert after < before - 1e-4
    variances = [moments(logits, grid, s, "circular").variance.max().item() for s in (narrow, wide)]
    assert variances[1] > 2 * variances[0]


@given(st.integers(2, 24), st.lists(st.floats(0.1, 20.0), min_size=2, max_size=2), kinds, seeds)
def test_with_a_kernel_that_is_a_semigroup_energy_does_not_fall(
    length: int, times: list[float], kind: str, seed: int
) -> None:
    """Heat flow around a ring, ``exp(t L)``, is the discrete Gaussian for which the remark holds."""
    eye = torch.eye(length, dtype=torch.float64)
    flow = (eye.roll(1, 0) + eye.roll(-1, 0)) / 2 - eye
    logits = fields(kind, Grid(1, length), 3, seed)
    early, late = (torch.linalg.matrix_exp(t * flow) @ logits for t in sorted(times))
    assert (lse(late, 0) <= lse(early, 0) + 16 * slack(logits)).all()

# SPDX-License-Identifier: Apache-2.0
"""Theorem 3.1: the effect of a blur on the curvature of attention's energy, the claims of the proof, and the facts.

All computations are in float64. Logits are ``[queries, keys]``. If keys are unit vectors, the queries are the logits.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from segkern import Grid
from segkern.analysis import energy
from segkern.analysis.curvature import log_determinant, log_diagonal
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
finite = st.sampled_from(SIGMAS[:-1])
factors = st.sampled_from(["paper", "chain"])
small = st.builds(Grid, st.integers(1, 4), st.integers(2, 4))


def _inputs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits[None, None], torch.eye(logits.shape[1], dtype=torch.float64)[None, None]


def log_det(logits: torch.Tensor, grid: Grid, sigma: float, boundary: str, factor: Any, over: Any = "queries") -> float:
    options: dict[str, Any] = {"over": over, "factor": factor, "boundary": boundary, "dtype": torch.float64}
    return energy.log_curvature(*_inputs(logits), grid, sigma, scale=1.0, **options).item()


def layer_energy(logits: torch.Tensor, grid: Grid, sigma: float, boundary: str, over: Any = "queries") -> float:
    options: dict[str, Any] = {"over": over, "boundary": boundary, "dtype": torch.float64}
    return energy.layer_energy(*_inputs(logits), grid, sigma, scale=1.0, **options).item()


def spectrum(logits: torch.Tensor, grid: Grid, sigma: float, boundary: str, over: Any = "queries") -> torch.Tensor:
    return energy.curvature_spectrum(*_inputs(logits), grid, sigma, over=over, scale=1.0, boundary=boundary)[0, 0]


def form(logits: torch.Tensor, blur: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Return minus the second derivative of each key's energy in a direction, which is a variance under the softmax."""
    p = torch.softmax(blur @ logits, dim=0)
    moved = (blur @ direction)[:, None]
    return (p * (moved - (p * moved).sum(dim=0)).square()).sum(dim=0)


# The determinant


@given(small, sigmas, boundaries, kinds, seeds)
def test_the_exact_determinant_is_zero_with_and_without_a_blur(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int
) -> None:
    """Adding a constant to all logits of a vector changes nothing, so Theorem 3.1 literally says ``0 < 0``."""
    logits = fields(kind, grid, 2, seed)
    for value in (0.0, sigma):
        assert spectrum(logits, grid, value, boundary)[:, -1].max() <= 1e-15


@given(small, st.sampled_from(["random", "smooth", "one-hot"]), seeds)
def test_the_papers_product_is_the_determinant_with_one_logit_held_fixed(grid: Grid, kind: str, seed: int) -> None:
    """``prod p_i``, called approximate, is exact there. Times n, it is the product of the nonzero eigenvalues."""
    logits = fields(kind, grid, 1, seed) / 4
    product = spectrum(logits, grid, 0.0, "reflect")[0, :-1].log().sum().item()
    expected = math.log(grid.tokens) + log_det(logits, grid, 0.0, "reflect", "none")
    assert product == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(grids, sigmas, mean_keeping, kinds, seeds, cuts)
def test_without_the_blurs_own_factor_the_determinant_does_not_fall(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int, over: str
) -> None:
    """``log prod p = sum(logits) + n * energy`` and energy does not fall: the proof's second inequality is reversed."""
    logits = fields(kind, grid, 3, seed)
    before, after = (log_det(logits, grid, s, boundary, "none", over) for s in (0.0, sigma))
    assert after >= before - grid.tokens**2 * 9 * slack(logits)


@pytest.mark.parametrize("boundary", MEAN_KEEPING)
def test_the_proofs_second_inequality_fails_for_a_peak(boundary: str) -> None:
    """It claims that ``prod softmax`` does not rise under a blur, but uniform logits have the largest product."""
    peak = fields("one-hot", Grid(3, 4), 1, seed=1)
    blurred = dense(Grid(3, 4), 1.0, boundary) @ peak
    products = [torch.softmax(x, dim=0).prod().item() for x in (peak, blurred)]
    assert products[1] > 100 * products[0]


@given(grids, finite, mean_keeping, kinds, seeds, cuts, factors)
def test_the_determinant_falls_if_and_only_if_energy_rises_little(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int, over: str, factor: str
) -> None:
    """The mean rise over the vectors must be below minus the logarithm of the blur's factor, per logit.

    Assumes that the mean is kept. The factor is ``b_ii`` in the proof, and ``det(B)^2`` by the chain rule.
    """
    logits = fields(kind, grid, 3, seed)
    keys, tokens = 3, grid.tokens
    before, after = (log_det(logits, grid, s, boundary, factor, over) for s in (0.0, sigma))
    energies = [layer_energy(logits, grid, s, boundary, over) for s in (0.0, sigma)]
    if factor == "paper":
        blur = keys * log_diagonal(grid, sigma, boundary)
    else:
        blur = 2 * (keys if over == "queries" else keys - 1) * log_determinant(grid, sigma, boundary)
    size = tokens if over == "queries" else keys
    rise, allowed = energies[1] - energies[0], -blur / size
    assert after - before == pytest.approx(size * (rise - allowed), abs=1e-6 + 1e-9 * abs(before))
    if abs(rise - allowed) > 1e-6 * (1 + abs(energies[0])):
        assert (after < before) == (rise < allowed)


@given(grids, sigmas, mean_keeping, kinds, seeds, factors)
def test_the_determinant_falls_for_logits_of_a_small_range(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int, factor: str
) -> None:
    """A correct form of Theorem 3.1: ``|det|`` falls if the range r of each key's logits is small enough.

    Assumes a mean-keeping boundary, and ``r^2 / 8`` below minus the logarithm of the blur's factor per logit. Energy
    rises by at most ``r^2 / 8``, because ``lse(a) <= mean + log n + r^2 / 8`` (Hoeffding).
    """
    per_logit = -log_diagonal(grid, sigma, boundary) / grid.tokens
    if factor == "chain":
        per_logit = -2 * log_determinant(grid, sigma, boundary) / grid.tokens
    assume(per_logit > 1e-3)
    logits = fields(kind, grid, 3, seed)
    spread = (logits.amax(dim=0) - logits.amin(dim=0)).max().item()
    if spread > 0:
        logits = logits * min(1.0, math.sqrt(8 * 0.98 * min(per_logit, 100.0)) / spread)
    before, after = (log_det(logits, grid, s, boundary, factor) for s in (0.0, sigma))
    assert after < before


@pytest.mark.parametrize("factor, sigma", [("paper", 1.0), ("paper", math.inf), ("chain", 1.0)])
@pytest.mark.parametrize("over", ["keys", "queries"])
def test_the_determinant_rises_for_a_peak(factor: str, sigma: float, over: str) -> None:
    """So Theorem 3.1 requires logits without peaks, for either meaning of its Hessian."""
    peaks = 40.0 * torch.eye(16, dtype=torch.float64)
    before, after = (log_det(peaks, Grid(4, 4), s, "circular", factor, over) for s in (0.0, sigma))
    assert after > before + 16 * 16


# The paper's approximations


@given(small, kinds, seeds)
def test_the_diagonal_is_as_near_to_the_hessian_as_the_softmax_is_flat(grid: Grid, kind: str, seed: int) -> None:
    """Eigenvalues differ by at most ``sum p_i^2``, the dropped part, which is assumed to be small."""
    logits = fields(kind, grid, 1, seed)
    p = torch.softmax(logits[:, 0], dim=0)
    exact = spectrum(logits, grid, 0.0, "reflect")[0]
    assert (exact - p.sort(descending=True).values).abs().max() <= p.square().sum() + 1e-12


def test_for_a_peak_the_diagonal_is_nothing_like_the_hessian() -> None:
    """The largest curvature is 1 in the approximation and almost 0 in the Hessian."""
    peak = torch.zeros(16, 1, dtype=torch.float64)
    peak[5] = 30.0
    assert torch.softmax(peak, dim=0).max() > 0.999
    assert spectrum(peak, Grid(4, 4), 0.0, "reflect").max() < 1e-10


def test_the_proofs_blurred_hessian_is_not_the_chain_rules() -> None:
    """The proof multiplies entries with those of B, where the chain rule has ``B^T H B``. Shown at uniform logits."""
    blur = dense(Grid(4, 4), 1.0, "circular")
    p = torch.full((16,), 1 / 16, dtype=torch.float64)
    hessian = torch.diag(p) - torch.outer(p, p)
    proofs, exact = hessian * blur, blur.T @ hessian @ blur
    largest = [torch.linalg.eigvalsh(m).max().item() for m in (proofs, exact)]
    assert (proofs - exact).norm() > 0.3 * exact.norm()
    assert largest[0] != pytest.approx(largest[1], rel=0.2)


# What holds of the Hessian itself


@given(small, sigmas, boundaries, kinds, seeds)
def test_curvature_never_exceeds_what_the_blur_leaves_possible(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int
) -> None:
    """In direction v at most ``range(B v)^2 / 4 <= range(v)^2 / 4``; over all directions, ``largest_curvature``.

    For any logits and any boundary, because the rows of B are nonnegative and sum to 1. Checked for the vectors of the
    keys and for the rows of the layer.
    """
    logits = fields(kind, grid, 2, seed)
    blur = dense(grid, sigma, boundary)
    direction = fields("random", grid, 1, seed)[:, 0]
    reach = [(x.max() - x.min()).square() / 4 for x in (blur @ direction, direction)]
    assert (form(logits, blur, direction) <= reach[0] * (1 + 1e-12) + 1e-15).all()
    assert reach[0] <= reach[1] * (1 + 1e-12)
    bound = energy.largest_curvature(grid, sigma, boundary)
    assert bound <= 0.5
    assert spectrum(logits, grid, sigma, boundary).max() <= bound + 1e-12
    largest_row = torch.linalg.matrix_norm(blur, 2).square().item() / 2  # rows: B^T H B with every H at most one half
    assert spectrum(logits, grid, sigma, boundary, "keys").max() <= largest_row + 1e-12


@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.0])
def test_the_bound_on_curvature_is_reached(sigma: float) -> None:
    """By logits whose blur puts half of the softmax on each of the two tokens with the most distant rows."""
    grid = Grid(3, 4)
    blur = dense(grid, sigma, "symmetric")
    apart = torch.cdist(blur, blur)
    first, second = divmod(int(apart.argmax()), grid.tokens)
    wanted = torch.zeros(grid.tokens, 1, dtype=torch.float64)
    wanted[[first, second]] = 50.0
    largest = spectrum(torch.linalg.solve(blur, wanted), grid, sigma, "symmetric").max().item()
    assert largest == pytest.approx(energy.largest_curvature(grid, sigma, "symmetric"), rel=1e-9)


@given(small, sigmas, mean_keeping, st.floats(-3.0, 3.0), cuts)
def test_for_uniform_logits_no_eigenvalue_rises(
    grid: Grid, sigma: float, boundary: str, level: float, over: str
) -> None:
    """The Hessian is then equal at all tokens, and a mean-keeping blur shortens every direction."""
    logits = torch.full((grid.tokens, 3), level, dtype=torch.float64)
    before, after = (spectrum(logits, grid, s, boundary, over) for s in (0.0, sigma))
    assert (after <= before + 1e-14).all()


@given(small, sigmas, boundaries, kinds, seeds)
def test_no_direction_gets_steeper_than_the_softmax_is_uneven(
    grid: Grid, sigma: float, boundary: str, kind: str, seed: int
) -> None:
    """The blurred curvature is at most ``s^2 max(p~) / min(p)`` times the original in every direction, where s is how
    much B stretches zero-mean vectors. It falls in all directions if that factor is below 1: for nearly uniform
    logits.
    """
    logits = fields(kind, grid, 2, seed)
    blur = dense(grid, sigma, boundary)
    centre = torch.eye(grid.tokens, dtype=torch.float64) - 1 / grid.tokens
    stretch = torch.linalg.matrix_norm(centre @ blur @ centre, 2).square()
    before, after = (torch.softmax(x, dim=0) for x in (logits, blur @ logits))
    allowed = stretch * after.amax(dim=0) / before.amin(dim=0)
    direction = fields("random", grid, 1, seed)[:, 0]
    none = torch.eye(grid.tokens, dtype=torch.float64)
    assume(bool(torch.isfinite(allowed).all()))
    result = form(logits, blur, direction)
    assert (result <= allowed * form(logits, none, direction) * (1 + 1e-9) + 1e-13 * allowed.clamp_min(1)).all()


@pytest.mark.parametrize("over", ["keys", "queries"])
def test_at_a_peak_the_exact_curvature_rises(over: str) -> None:
    """The largest eigenvalue rises: the softmax of a peak hardly changes, but the blurred one does."""
    peaks = 20.0 * torch.eye(12, dtype=torch.float64)
    before, after = (spectrum(peaks, Grid(3, 4), s, "circular", over).max().item() for s in (0.0, 1.0))
    assert before < 1e-6
    assert after > 1e3 * max(before, 1e-6)


@given(small, seeds)
def test_log_sum_exp_and_energy_agree(grid: Grid, seed: int) -> None:
    """The helpers of this file agree with the package."""
    logits = fields("random", grid, 2, seed)
    assert layer_energy(logits, grid, 0.0, "reflect") == pytest.approx(-lse(logits, 0).sum().item())

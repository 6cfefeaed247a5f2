# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks energy`` counts correctly."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import energy
from segkern import Grid
from segkern.analysis.energy import OverSigma, over_sigma

SIGMAS = (0.0, 1.0, math.inf)


def cell(logits: torch.Tensor, grid: Grid, boundary: str) -> tuple[OverSigma, OverSigma]:
    """Return both cuts of a record of one head with these logits ``[queries, keys]``."""
    inputs = logits[None, None], torch.eye(logits.shape[1], dtype=torch.float64)[None, None]
    by_query, by_key = (
        over_sigma(*inputs, grid, SIGMAS, over=over, scale=1.0, boundary=boundary, dtype=torch.float64)
        for over in ("keys", "queries")
    )
    return by_query, by_key


def test_shares_are_counted_over_heads_queries_and_keys() -> None:
    """One head's energy rises. The other's falls, because reflect gives its bump a weight above 1."""
    bump = torch.zeros(3, 3, dtype=torch.float64)
    bump[1] = 0.2
    peaks = 5.0 * torch.eye(3, dtype=torch.float64)
    counts = energy.count([cell(logits, Grid(1, 3), "reflect") for logits in (bump, peaks)])
    assert counts["cells"] == 2
    assert counts["energy_by_query_rises"] == [0.5, 1.0]
    assert counts["energy_by_key_rises"] == [0.5, 1.0]
    assert counts["a_querys_own_rises"][0] == pytest.approx(4 / 6)  # the energy of the bump's neighbours falls
    assert counts["variance_left"][1] == pytest.approx(0.0, abs=1e-12)
    assert counts["determinant_chain"]["change"][1] == -math.inf


def test_a_determinant_that_rises_is_not_counted() -> None:
    flat, peaks = torch.randn(16, 16, dtype=torch.float64) / 4, 40.0 * torch.eye(16, dtype=torch.float64)
    counts = energy.count([cell(logits, Grid(4, 4), "circular") for logits in (flat, peaks)])
    assert counts["determinant_none"]["falls"] == [0.0, 0.0]
    assert counts["determinant_paper"]["falls"] == [0.5, 0.5]

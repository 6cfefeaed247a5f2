# SPDX-License-Identifier: Apache-2.0
"""FLOPs of the package's operators as counted by PyTorch's counter, without data."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import segkern
from segkern import Grid
from segkern.ops import flops  # noqa: F401  registers our operators with the counter


@pytest.mark.parametrize("sigma", [(0.0, 2.0), (0.0, math.inf)], ids=str)
def test_operators_count_as_the_path_that_is_open(sigma: tuple[float, ...]) -> None:
    """An operator counts as many FLOPs as its PyTorch operations do without the operator."""
    query, key, value = (torch.empty(2, 3, 30, 16, device="meta") for _ in range(3))
    grid = Grid(5, 6)
    with FlopCounterMode(display=False) as counter:
        segkern.ops.torch_attention.seg_attention(query, key, value, None, grid, sigma, 0.25, "reflect", False)
    operator = torch.ops.segkern.seg_attention
    with FlopCounterMode(display=False) as behind:
        operator(query, key, value, None, 5, 6, 0, list(sigma), 0.25, "reflect", "torch", False)
    assert behind.get_total_flops() == counter.get_total_flops() > 0


def test_the_counter_sees_sigmas_that_are_known_only_when_it_runs_as_every_row() -> None:
    query = torch.empty(2, 3, 30, 16, device="meta")
    sigma = torch.tensor([0.0, 2.0])
    with FlopCounterMode(display=False) as counter:
        torch.ops.segkern.seg_attention_at(query, query, query, None, 5, 6, 0, sigma, 0.25, "reflect", "torch")
    assert counter.get_total_flops() == 4 * 2 * 3 * 30 * 30 * 16


def test_masses_count_the_scores_twice_and_energies_once() -> None:
    query, key = torch.empty(3, 2, 30, 16, device="meta"), torch.empty(3, 2, 40, 16, device="meta")
    scores = 2 * 2 * 30 * 40 * 16  # per sample
    with FlopCounterMode(display=False) as counter:
        torch.ops.segkern.attention_mass(query, key, 0.25, "torch")
    assert counter.get_total_flops() == 2 * 3 * scores
    with FlopCounterMode(display=False) as counter:
        torch.ops.segkern.attention_energy(query, key, 5, 6, 0, [0.0, 2.0, math.inf], 0.25, "reflect", "torch")
    blur = 2 * 2 * 16 * 30 * (5 + 6)
    assert counter.get_total_flops() == 2 * scores + scores // 30 + blur
    with FlopCounterMode(display=False) as counter:
        torch.ops.segkern.attention_mass_backward(key[..., 0], query, key, 0.25)
    assert counter.get_total_flops() == 3 * 3 * scores

# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks``: SDXL's two layers under pytest-benchmark, which saves, compares and plots runs.

Plain attention, the official algorithm and segkern form one group for each layer and sigma. ``python -m benchmarks``
measures everything else, in interleaved rounds, and writes the result files.
"""

from __future__ import annotations

import math

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import checks, timing
from benchmarks.cases import CASES
from benchmarks.measure import usual_rounds
from benchmarks.providers import PROVIDERS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.mark.parametrize("way", ["sdpa", "official", "auto"])
@pytest.mark.parametrize("sigma", [1.0, 10.0, math.inf], ids=str)
@pytest.mark.parametrize("name", ["sdxl-32x32", "sdxl-64x64"])
def test_attention(
    benchmark: BenchmarkFixture, monkeypatch: pytest.MonkeyPatch, name: str, sigma: float, way: str
) -> None:
    """Check, then time, a layer's attention for a batch of three whose last third is blurred."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the official convolution is checked in float32
    case, provider = CASES[name], PROVIDERS[way]
    inputs = case.inputs(DEVICE)
    call = provider.make(inputs, sigma)
    _, wrong = checks.judge(provider, call(), inputs, checks.expected(inputs, sigma, provider.kind))
    assert not wrong
    benchmark.group = f"{name}, sigma {sigma:g}"
    benchmark.pedantic(lambda: timing.wall(call, DEVICE), rounds=usual_rounds(DEVICE)(case))

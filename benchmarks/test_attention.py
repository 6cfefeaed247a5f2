# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks``: SDXL's two layers under pytest-benchmark, which saves and compares runs in its own way.

Every round runs plain attention and the official algorithm as well, so that they see the same machine; pytest-benchmark
times ours. ``python -m benchmarks`` measures everything and writes result files. A case whose result is not that of the
float64 reference reports no time.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch

from benchmarks import checks, timing
from benchmarks.cases import CASES
from benchmarks.conftest import ROWS
from benchmarks.measure import usual_rounds
from benchmarks.providers import PROVIDERS
from benchmarks.suites import SIGMAS

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
torch.backends.cudnn.allow_tf32 = False  # the official convolution must pass the float32 check too
OTHERS, OURS = ("sdpa", "official"), "auto"


@pytest.mark.parametrize("sigma", SIGMAS, ids=str)
@pytest.mark.parametrize("name", ["sdxl-32x32", "sdxl-64x64"])
def test_guided_attention(benchmark: Any, name: str, sigma: float) -> None:
    """Time ours, and in the same rounds plain attention and the official algorithm."""
    case = CASES[name]
    inputs = case.inputs(DEVICE)
    calls = {}
    for which in (*OTHERS, OURS):
        provider = PROVIDERS[which]
        calls[which] = provider.make(inputs, sigma)
        _, wrong = checks.judge(provider, calls[which](), inputs, checks.expected(inputs, sigma, provider.kind))
        assert not wrong, f"{which}: {wrong}"
    milliseconds: dict[str, list[float]] = {which: [] for which in OTHERS}

    def others_first() -> None:
        for which, found in milliseconds.items():
            found.append(timing.wall(calls[which], DEVICE))

    benchmark.group = name
    benchmark.pedantic(lambda: timing.wall(calls[OURS], DEVICE), setup=others_first, rounds=usual_rounds(DEVICE)(case))
    medians = {which: statistics.median(found) for which, found in milliseconds.items()}
    medians[OURS] = benchmark.stats.stats.median * 1e3
    row = {"case": name, "sigma": f"{sigma:g}", **medians}
    benchmark.extra_info.update(row)
    ROWS.append(row)

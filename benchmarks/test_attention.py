# SPDX-License-Identifier: Apache-2.0
"""One layer's attention in a guided step: ours against plain attention and the official algorithm, interleaved.

Every round runs all three, so that they see the same machine; pytest-benchmark times ours. A case whose result is
not that of the float64 reference reports no time.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any

import pytest
import torch

from benchmarks.conftest import ROWS
from benchmarks.providers import Case, Provider, official, ours, sdpa
from segkern import Grid, reference

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
torch.backends.cudnn.allow_tf32 = False  # the official convolution must pass the float32 check too
CASES = [Case(Grid(32, 32), 20), Case(Grid(64, 64), 10)]
SIGMAS = [1.0, 3.0, 4.0, 10.0, 16.0, math.inf]
ROUNDS = {1024: 15, 4096: 7}


def timed(provider: Provider) -> float:
    """Seconds that one call takes, the device's work included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    provider()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def relative_error(found: torch.Tensor, query: Any, key: Any, value: Any, case: Case, sigma: float) -> float:
    """Of the perturbed samples' first head, against the reference in float64."""
    sample = slice(case.batch - 1, case.batch)
    inputs = [x[sample, :1].double() for x in (query, key, value)]
    expected = reference.seg_attention(*inputs, case.grid, sigma)
    assert isinstance(expected, torch.Tensor)
    return ((found[sample, :1].double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("sigma", SIGMAS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_guided_attention(benchmark: Any, case: Case, sigma: float) -> None:
    """Time ours, and in the same rounds plain attention and the official algorithm."""
    inputs = case.inputs(DEVICE)
    providers = {"sdpa": sdpa, "official": official, "segkern": ours}
    calls = {name: make(*inputs, case, sigma) for name, make in providers.items()}
    for name in ("official", "segkern"):
        assert relative_error(calls[name](), *inputs, case, sigma) < 1e-5, f"{name} computes something else"
    calls["sdpa"]()
    seconds: dict[str, list[float]] = {"sdpa": [], "official": []}

    def others_first() -> None:
        for name, found in seconds.items():
            found.append(timed(calls[name]))

    benchmark.group = case.label
    benchmark.pedantic(lambda: timed(calls["segkern"]), setup=others_first, rounds=ROUNDS[case.grid.tokens])
    medians = {name: statistics.median(found) * 1e3 for name, found in seconds.items()}
    medians["segkern"] = benchmark.stats.stats.median * 1e3
    row = {"case": case.label, "dtype": str(case.dtype).removeprefix("torch."), "batch": case.batch}
    row |= {"sigma": str(sigma), "rounds": ROUNDS[case.grid.tokens]}
    row |= {f"{name}_ms": median for name, median in medians.items()}
    row["ratio_to_sdpa"] = medians["segkern"] / medians["sdpa"]
    row["ratio_to_official"] = medians["segkern"] / medians["official"]
    benchmark.extra_info.update(row)
    ROWS.append(row)

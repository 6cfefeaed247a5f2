# SPDX-License-Identifier: Apache-2.0
"""The suite of guided steps: every way is held against the official algorithm before it has a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import sdxl, steps
from benchmarks.steps import Bench, Way
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(sdxl.TINY, CPU, torch.float32, backend="eager")


def test_latents_that_are_not_the_official_algorithms_have_no_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way("CFG + segkern mid sigma 3", "segkern", True, 3.0, ("mid",))
    wrong = replace(way, sigma=2.0)
    real = bench.runner

    def spoiled(one: Way, *arguments: Any) -> Any:
        return real(wrong if one is way else one, *arguments)

    monkeypatch.setattr(bench, "runner", spoiled)
    monkeypatch.setattr(steps, "counted", lambda size, names: {"CFG": 1.0, way.name: 1.3})
    (row,) = steps.measure(bench, (way,), steps=2, rounds=1)
    assert row["ms"] is None
    assert "off the latents of the official algorithm" in row["reason"]
    assert steps.lines({"rows": [row]})[0][1].startswith("no time: ")


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("sigma", [3.0, math.inf])
def test_ours_are_the_official_latents(bench: Bench, sigma: float, cfg: bool) -> None:
    official, ours = (bench.run(Way("", kind, cfg, sigma, ("mid", "up")), 3)[0] for kind in ("official", "segkern"))
    assert relative(ours, official) < PIPELINE_TOLERANCE
    assert relative(bench.run(Way("", "plain", cfg), 3)[0], official) > 1e-4
    assert not bench.pipe.unet._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "official", "pag", "segkern"])
def test_compiled_ways_give_the_same_latents(bench: Bench, kind: str) -> None:
    way = Way("", kind, True, 3.0 if kind in ("official", "segkern") else 0.0, ("mid",))
    eager, compiled = (bench.run(replace(way, compiled=compiled), 2)[0] for compiled in (False, True))
    assert relative(compiled, eager) < PIPELINE_TOLERANCE


def test_compiled_ways_are_compared_with_the_compiled_plain_run() -> None:
    ways = steps.find_ways(["CFG", "CFG + segkern mid sigma 3"], compiled=True)
    assert [way.name for way in ways] == [
        "CFG",
        "CFG + segkern mid sigma 3",
        "CFG, compiled",
        "CFG + segkern mid sigma 3, compiled",
    ]
    assert steps.plain(ways[3]) == "CFG, compiled"
    assert len(steps.ways()) * 2 == len(steps.ways(compiled=True))


def test_the_official_way_puts_the_processors_back(bench: Bench) -> None:
    before = bench.pipe.unet.attn_processors
    bench.run(Way("", "official", True, 3.0, ("mid",)), 1)
    after = bench.pipe.unet.attn_processors
    assert all(after[name] is before[name] for name in before)

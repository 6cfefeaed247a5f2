# SPDX-License-Identifier: Apache-2.0
"""The suite of guided steps: every way is compared with the official algorithm before it is timed."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import sdxl, step_graphs, step_suite, steps
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
    ((row,),) = steps.measure(bench, (way,), steps=2, rounds=1)
    assert row["ms"] is None
    assert "off the latents of the official algorithm" in row["reason"]
    assert step_suite.lines({"rows": [row]})[0][1].startswith("not timed: ")


@pytest.mark.one_in(3)
@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("sigma", [3.0, math.inf])
def test_ours_are_the_official_latents(bench: Bench, sigma: float, cfg: bool) -> None:
    official, ours = (bench.run(Way("", kind, cfg, sigma, ("mid", "up")), 3)[0] for kind in ("official", "segkern"))
    assert relative(ours, official) < PIPELINE_TOLERANCE
    assert relative(bench.run(Way("", "plain", cfg), 3)[0], official) > 1e-4
    assert not bench.pipe.unet._forward_hooks


def test_all_branches_in_full_give_the_same_and_cost_half_as_much_again(bench: Bench) -> None:
    (full,) = steps.find_ways(["CFG + segkern mid sigma 10, all branches in full"], compiled=False)
    shared = replace(full, share=True)
    assert relative(bench.run(full, 2)[0], bench.run(shared, 2)[0]) < PIPELINE_TOLERANCE
    pipe = sdxl.pipeline(sdxl.denoiser(sdxl.TINY, "meta"))
    plain, *counts = (steps.count(pipe, sdxl.TINY, way) for way in (Way("", "plain", True), full, shared))
    assert counts[0] / plain == pytest.approx(1.5, abs=0.005)
    assert counts[1] < counts[0]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("cfg", [False, True])
def test_what_a_graph_would_hold_is_the_official_prediction(
    bench: Bench, cfg: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["segkern PAG mid", "segkern mid sigma 10", "segkern mid sigma inf", "segkern mid sigma 3"]
    chosen = steps.find_ways([f"{'CFG + ' * cfg}{name}" for name in names], compiled=False)
    rows: list[dict[str, Any]] = [{"way": way.name, "reason": None} for way in chosen]
    real = step_graphs.official_of
    monkeypatch.setattr(step_graphs, "official_of", lambda way: replace(real(way), sigma=way.sigma and 10.0))
    step_graphs.add_graphs(bench, rows, chosen, rounds=1)
    said = {row["way"].removeprefix("CFG + "): row["graph_ms"] for row in rows}
    assert said["segkern PAG mid"] == said["segkern mid sigma 10"] == "not measured"
    for other in ("segkern mid sigma inf", "segkern mid sigma 3"):
        assert "off the official prediction, above 2e-05" in said[other]
    assert not bench.pipe.unet._forward_hooks


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_guided_calls_of_the_denoiser_have_a_time_as_graphs() -> None:
    bench = Bench(sdxl.TINY, torch.device("cuda", 0), torch.float16)
    chosen = steps.find_ways(["CFG", "CFG + segkern mid sigma *", "CFG + official SEG sigma 10"], compiled=False)
    rows: list[dict[str, Any]] = [{"way": way.name, "reason": None} for way in chosen]
    step_graphs.add_graphs(bench, rows, chosen, rounds=3)
    for row in rows:
        assert isinstance(row["graph_ms"], str if "official" in row["way"] else dict), row


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

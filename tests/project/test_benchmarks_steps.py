# SPDX-License-Identifier: Apache-2.0
"""The suite of guided steps: every way runs, is held against the official algorithm, and comes on the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import approximations, sdxl, step_page, steps
from benchmarks.steps import Bench, Way
from tests.diffusers.diffusers_tools import PIPELINE_TOLERANCE, relative
from tests.project.benchmark_tools import command

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(sdxl.TINY, CPU, torch.float32, backend="eager")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("steps") / "step.json"
    names = "no guidance,CFG,*official SEG sigma 3,*PAG*,*segkern mid sigma 3,CFG + segkern up sigma inf"
    ran = command("run", "--suite", "step", "--quick", "--device", "cpu", "--providers", names, "--out", path)
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert f"wrote {path}" in ran.output
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.slow
def test_every_way_has_a_time_and_a_ratio_to_the_plain_run(measured: dict[str, Any]) -> None:
    rows = {row["way"]: row for row in measured["rows"]}
    assert len(rows) == 11
    for row in rows.values():
        assert row["reason"] is None
        assert row["ms"]["median"] > 0
        assert row["run_seconds"] > 0
        assert row["ratio_to"] == ("CFG" if row["cfg"] else "no guidance")
        assert row["host_ms"] == "not measured"
        assert row["peak_mib"] > 1
        assert (row["error"] is not None) == (row["kind"] == "segkern")
        assert (row["counted"] is not None) == (row["kind"] in ("segkern", "plain"))
    assert rows["CFG"]["peak_mib"] < rows["CFG + official SEG sigma 3"]["peak_mib"]
    assert rows["CFG"]["ratio"]["median"] == rows["CFG"]["counted"] == 1.0
    assert 1 < rows["CFG + segkern mid sigma 3"]["counted"] < 1.5
    assert measured["environment"]["torch"] == torch.__version__


def test_latents_that_are_not_the_official_algorithms_have_no_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = Way("CFG + segkern mid sigma 3", "segkern", True, 3.0, ("mid",))
    wrong = replace(way, sigma=2.0)
    real = bench.runner

    def spoiled(one: Way, *arguments: Any) -> Any:
        return real(wrong if one is way else one, *arguments)

    monkeypatch.setattr(bench, "runner", spoiled)
    monkeypatch.setattr(steps, "counted", lambda size: {"CFG": 1.0, way.name: 1.3})
    (row,) = steps.measure(bench, (way,), steps=2, rounds=1)
    assert row["ms"] is None
    assert "off the latents of the official algorithm" in row["reason"]
    assert steps.lines({"rows": [row]})[0][1].startswith("no time: ")


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize("sigma", [3.0, math.inf])
def test_ours_are_the_official_latents(bench: Bench, sigma: float, cfg: bool) -> None:
    found = [bench.run(Way("", kind, cfg, sigma, ("mid", "up")), 3)[0] for kind in ("official", "segkern")]
    assert relative(found[1], found[0]) < PIPELINE_TOLERANCE
    assert relative(bench.run(Way("", "plain", cfg), 3)[0], found[0]) > 1e-4
    assert not bench.pipe.unet._forward_hooks


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "official", "pag", "segkern"])
def test_compiled_ways_give_the_same_latents(bench: Bench, kind: str) -> None:
    way = Way("", kind, True, 3.0 if kind in ("official", "segkern") else 0.0, ("mid",))
    found = [bench.run(replace(way, compiled=compiled), 2)[0] for compiled in (False, True)]
    assert relative(found[1], found[0]) < PIPELINE_TOLERANCE


def test_compiled_ways_are_compared_with_the_compiled_plain_run() -> None:
    found = steps.find_ways(["CFG", "CFG + segkern mid sigma 3"], compiled=True)
    assert [way.name for way in found] == [
        "CFG",
        "CFG + segkern mid sigma 3",
        "CFG, compiled",
        "CFG + segkern mid sigma 3, compiled",
    ]
    assert steps.plain(found[3]) == "CFG, compiled"
    assert len(steps.ways()) * 2 == len(steps.ways(compiled=True))


def test_the_official_way_puts_the_processors_back(bench: Bench) -> None:
    before = bench.pipe.unet.attn_processors
    bench.run(Way("", "official", True, 3.0, ("mid",)), 1)
    after = bench.pipe.unet.attn_processors
    assert all(after[name] is before[name] for name in before)


@pytest.mark.slow
def test_the_page_and_the_picture_show_what_was_measured(measured: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image

    page = step_page.page({"here": measured})
    assert "**GPU: not measured.**" in page
    for row in measured["rows"]:
        assert f"| {row['way']} | {row['ms']['median']:.4g} |" in page
    step_page.picture(measured, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 200
    summary = step_page.summary(measured)
    assert "| 3 |" in summary
    assert "| inf |" not in summary, "only what was measured"
    assert "Not measured." in step_page.page({})


def test_unknown_ways_are_refused() -> None:
    ran = command("run", "--suite", "step", "--providers", "turbo")
    assert ran.exit_code == 2
    assert "'turbo' fits none of no guidance; CFG" in ran.output
    ran = command("run", "--suite", "step", "--cases", "tiny-6x10")
    assert ran.exit_code == 2
    assert "takes no --dtype and no --cases" in ran.output


def test_the_committed_page_is_made_from_the_committed_files() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "pipelines.md").read_text()
    assert page == step_page.page(steps.committed(), approximations.committed()), "run python -m benchmarks.readme"


@pytest.mark.slow
def test_approximations_are_measured_and_shown(tmp_path: Path) -> None:
    wanted = approximations.settings()
    assert [approximations.computed(setting, 10) for setting in wanted] == [0, 10, 5, 4, 2, 5, 5, 6]
    heard: list[int] = []
    out = tmp_path / "found.json"
    found = approximations.measure(
        tmp_path / "cells", lambda name, n: heard.append(n), torch.float32, images=8, seeds=(1,), steps=2, out=out
    )
    assert json.loads(out.read_text())["rows"] == found["rows"]
    assert sum(heard) == 8 * len(wanted)
    table = approximations.table(found)
    assert "branch at every 2. step | 1 of 2 |" in table
    assert approximations.table(found) in step_page.page({}, found)

# SPDX-License-Identifier: Apache-2.0
"""Sampling, measuring, going on, choosing and reporting, on the bundled model with very few images."""

from __future__ import annotations

import copy
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from segkern.generation.loading import DEMO, find_model, load_pipeline
from studies import comparisons
from studies.evaluation import report
from studies.evaluation.judge import Judge, load_judge
from studies.evaluation.plots import curves, plot
from studies.evaluation.run import Design, carry_out, choose, verdict
from studies.evaluation.study import Setting, Study, family, grid, prompts, sample, variants
from tests.diffusers.probes import hooks_of

STEPS = 2


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(autouse=True)
def few_real_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.evaluation.study.reference.__defaults__", (64, (64, 64)))


def pictures(pipe: Any, setting: Setting, count: int = 3, batch: int = 64) -> torch.Tensor:
    return torch.cat(list(sample(pipe, setting, 5, count, STEPS, batch)))


def cell(setting: Setting, seed: int, distance: float) -> dict[str, Any]:
    return {"setting": setting.to_dict(), "seed": seed, "images": 8, "measures": {"frechet_distance": distance}}


def test_samples_do_not_depend_on_the_batch(pipe: Any) -> None:
    setting = Setting("prompts", seg=2.0, sigma=math.inf, layers="mid")
    together, apart = pictures(pipe, setting), pictures(pipe, setting, batch=2)
    assert together.dtype == torch.uint8
    assert together.shape == (3, 3, 64, 64)
    assert (together.int() - apart.int()).abs().max() <= 1


def test_samples_of_a_seed_differ_and_repeat(pipe: Any) -> None:
    """Without prompts nothing but the noise tells them apart."""
    first, second = pictures(pipe, Setting("unconditional"), count=2)
    assert (first.int() - second.int()).abs().float().mean() > 1
    assert torch.equal(first, pictures(pipe, Setting("unconditional"), count=2)[0])


def test_unguided_samples_are_the_stock_pipelines(pipe: Any) -> None:
    own = pictures(pipe, Setting("prompts"), count=1)
    noise = torch.Generator().manual_seed(5 * 1_000_003)
    (stock,) = pipe(
        prompts(5, 1)[0].caption, guidance_scale=1.0, num_inference_steps=STEPS, generator=noise, output_type="np"
    ).images
    levels = torch.from_numpy(stock).permute(2, 0, 1) * 255
    assert (own[0].float() - levels).abs().max() <= 0.51


def test_measures_do_not_depend_on_the_size_of_features(judge: Judge, pipe: Any, tmp_path: Path) -> None:
    """Features are divided by what the same features of real drawings spread over."""
    larger = copy.deepcopy(judge)
    larger.project.weight.mul_(7), larger.project.bias.mul_(7)
    found, expected = (
        Study(pipe, one, tmp_path / name, 16, STEPS).drawn(3) for name, one in (("7", larger), ("1", judge))
    )
    for name in ("frechet_distance", "kernel_distance", "precision", "recall"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


@pytest.mark.slow
def test_real_drawings_of_prompts_are_what_their_captions_say(judge: Judge, pipe: Any, tmp_path: Path) -> None:
    study = Study(pipe, judge, tmp_path / "cells.jsonl", 64, STEPS)
    found = study.drawn(3)
    assert found["caption_accuracy"] > 0.95
    assert found != study.drawn(4)
    unguided = study.measure(Setting("prompts"), 3, lambda _: None)["measures"]  # two steps draw nothing yet
    assert found["frechet_distance"] < unguided["frechet_distance"]
    assert found["caption_accuracy"] > unguided["caption_accuracy"]


def test_every_kind_of_guidance_acts(pipe: Any) -> None:
    plain = pictures(pipe, Setting("prompts")).int()
    for setting in (
        Setting("prompts", cfg=3.0),
        Setting("prompts", seg=2.0, sigma=2.0, layers="mid"),
        Setting("prompts", seg=2.0, sigma=math.inf, layers="mid,up", start=0.5),
        Setting("unconditional"),
    ):
        assert (pictures(pipe, setting).int() - plain).abs().float().mean() > 0.1, setting


def test_guidance_is_removed_when_sampling_stops(pipe: Any) -> None:
    before, hooks = dict(pipe.unet.attn_processors), hooks_of(pipe.unet)
    running: Any = sample(pipe, Setting("prompts", seg=2.0, sigma=1.0, layers="mid"), 5, 4, STEPS, 2)
    next(running)
    assert hooks_of(pipe.unet) > hooks
    running.close()
    assert hooks_of(pipe.unet) == hooks
    assert pipe.unet.attn_processors == before


def test_settings_survive_json() -> None:
    for setting in [*grid("prompts", [0.25, 3.0], [1.0, math.inf], [1.5]), *variants("unconditional", [1.0], math.inf)]:
        assert Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) == setting


def test_a_study_goes_on_where_it_was_cut_off(
    pipe: Any, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cells.jsonl"
    guided = Setting("unconditional", seg=1.0, sigma=1.0, layers="mid")
    first = Study(pipe, judge, path, 8, STEPS)
    seen: list[int] = []
    made = first.measure(guided, 1, seen.append)
    assert sum(seen) == 8
    assert all(math.isfinite(value) for value in made["measures"].values())
    assert made["measures"]["distance_to_unguided"] > 0

    again = Study(pipe, judge, path, 8, STEPS)
    monkeypatch.setattr("studies.evaluation.study.sample", None)  # whoever samples now fails
    assert again.measure(guided, 1, seen.append) == made
    assert again.find(guided, 2) is None
    assert Study(pipe, judge, path, 16, STEPS).find(guided, 1) is None


def test_measurements_of_another_model_are_refused(pipe: Any, judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    Study(pipe, judge, path, 8, STEPS)
    kept = path.read_bytes()
    weight = pipe.unet.conv_out.bias
    before = weight.detach().clone()
    weight.data += 1
    try:
        with pytest.raises(ValueError, match=r"cells.jsonl' holds measurements of .* choose another --out"):
            Study(pipe, judge, path, 8, STEPS)
    finally:
        weight.data.copy_(before)
    assert path.read_bytes() == kept


@pytest.mark.slow
def test_a_whole_evaluation(pipe: Any, judge: Judge, tmp_path: Path) -> None:
    design = Design(("unconditional", "prompts"), (1.0,), (math.inf,), (2.0,), "mid", (1, 2), (9,))
    study = Study(pipe, judge, tmp_path / "cells.jsonl", 8, STEPS)
    counted = {"images": 0}
    found = carry_out(study, design, lambda name, count: counted.update(images=counted["images"] + count))
    assert counted["images"] <= design.runs * 8
    described = [report.describe(report.setting_of(row)) for row in found["rows"]]
    assert described[:2] == ["none", "SEG σ=∞ scale 1"]
    assert {"CFG 2", "CFG 2 SEG σ=∞ scale 1"} <= set(described)
    assert all(row["seeds"] == 2 and row["images"] == 16 for row in found["rows"])
    chosen = Setting.from_dict(found["chosen"])
    assert chosen.seg
    assert chosen in map(report.setting_of, found["rows"])
    assert all(row["seeds"] == 1 for row in found["selection"])
    values = [c["measures"]["recall"] for c in study.cells if c["setting"] == found["rows"][0]["setting"]]
    drawings = {name: value["mean"] for name, value in found["drawings"].items()}
    assert drawings == pytest.approx(
        {name: statistics.fmean(study.drawn(seed)[name] for seed in (1, 2)) for name in drawings}
    )
    recall = found["rows"][0]["measures"]["recall"]
    assert recall["mean"] == pytest.approx(statistics.fmean(values[-2:]))
    assert recall["spread"] == pytest.approx(statistics.stdev(values[-2:]))


def test_choice_and_verdict() -> None:
    plain, weak, strong = Setting("unconditional"), *grid("unconditional", [0.5, 4.0], [1.0], [])[1:]
    tried = [cell(plain, 1, 5.0), cell(weak, 1, 4.0), cell(strong, 1, 9.0)]
    assert choose(tried) == weak
    assert choose([]) is None

    def judgement(*distances: float) -> str:
        cells = [cell(plain, seed, 5.0 + seed) for seed in range(len(distances))]
        return verdict(cells + [cell(weak, seed, distance) for seed, distance in enumerate(distances)], weak)

    assert "beyond the spread over seeds: 5.50 without, 4.60 with; gain 0.90 ± 0.14" in judgement(4.2, 5.0)
    assert "within the spread" in judgement(4.0, 5.9)
    assert "does not lower" in judgement(5.4, 6.2)
    assert "One seed has no spread" in judgement(4.0)


def test_choosing_on_reported_seeds_is_refused() -> None:
    with pytest.raises(ValueError, match=r"other seeds than the reported ones; \[2\]"):
        Design(("unconditional",), (1.0,), (1.0,), (), "mid", (1, 2), (2,))


def test_committed_evaluation_belongs_to_the_bundled_weights(judge: Judge, tmp_path: Path) -> None:
    found = report.read(DEMO / "evaluation.json")
    pipe = load_pipeline(find_model("demo"), getattr(torch, found["dtype"]), torch.device("cpu"))
    assert Study(pipe, judge, tmp_path / "cells.jsonl", 8, 1).kind["weights"] == found["weights"]
    assert all(row["images"] >= 256 and row["seeds"] >= 2 for row in found["rows"])
    settings = [report.setting_of(row) for row in found["rows"]]
    for mode in ("unconditional", "prompts"):
        assert {s.sigma for s in settings if s.mode == mode and s.seg} >= {1.0, 2.0, 5.0, 10.0, math.inf}
        scales = {s.seg for s in settings if s.mode == mode and s.seg}
        assert min(scales) <= 0.25
        assert max(scales) >= 4
        assert sum(report.is_papers(s) for s in settings if s.mode == mode and s.cfg == 1) == 2
    assert not set(found["seeds"]) & set(found["selection_seeds"])


def test_plot_and_table_show_every_setting(tmp_path: Path) -> None:
    found = report.read(DEMO / "evaluation.json")
    plot(found["rows"], tmp_path / "plot.png", report.title(found), found["drawings"])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    text = report.markdown(found)
    assert text.count("| real drawings |") == 2
    for row in [*found["rows"], *found["selection"]]:
        assert f"| {report.describe(report.setting_of(row))} |" in text
    assert "★" in text


def test_plot_takes_every_kind_of_setting(tmp_path: Path) -> None:
    """Two settings of one scale and sigma in other layers among them, which must not share a curve."""
    measures = dict.fromkeys(("frechet_distance", "kernel_distance", "precision", "recall"), 0.5)
    places = [*grid("unconditional", [1.0, 3.0], [5.0, math.inf], []), *variants("unconditional", [1.0], math.inf)]
    prompted = grid("prompts", [1.0, 3.0], [5.0, math.inf], [2.0])
    cells = [cell(setting, seed, 1.0 + seed) for setting in [*places, *prompted] for seed in (1, 2)]
    for one in cells:
        one["measures"] |= measures | {"caption_accuracy": 0.5, "distance_to_unguided": 0.1}
    rows = report.summarise(cells)
    plot(rows, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    unconditional = [row for row in rows if row["setting"]["mode"] == "unconditional"]
    drawn = [
        [(s.layers, s.start, s.stop, s.sigma, s.seg) for s in map(report.setting_of, points)]
        for _, points in curves(unconditional)
    ]
    mid = ("mid", 0.0, 1.0)
    assert drawn[:2] == [[(*mid, sigma, scale) for scale in (1.0, 3.0)] for sigma in (5.0, math.inf)]
    assert all(len(points) == 1 for points in drawn[2:])
    assert len(drawn) == 2 + 5
    starred = [report.setting_of(row) for row in rows if report.is_papers(report.setting_of(row))]
    assert starred == [
        Setting(mode, seg=3.0, sigma=sigma, layers="mid")
        for mode in ("unconditional", "prompts")
        for sigma in (5.0, math.inf)
    ]


def test_candidates_are_each_tried_once() -> None:
    for layers in ("mid", "up"):
        tried = Design(("unconditional",), (1.0,), (math.inf,), (), layers, (1,), (2,)).candidates
        assert len(tried) == len(set(tried))


def test_a_line_that_was_cut_off_is_taken_away(pipe: Any, judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    plain = Setting("unconditional")
    made = Study(pipe, judge, path, 8, STEPS).measure(plain, 1, lambda _: None)
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + whole.splitlines()[-1][:40], encoding="utf-8")
    assert Study(pipe, judge, path, 8, STEPS).find(plain, 1) == made
    assert path.read_text(encoding="utf-8") == whole
    path.write_text(whole[:10], encoding="utf-8")
    assert Study(pipe, judge, path, 8, STEPS).cells == []


def test_more_images_than_real_drawings_are_refused(pipe: Any, judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4096 real drawings to compare with, fewer than 5000"):
        Study(pipe, judge, tmp_path / "cells.jsonl", 5000, STEPS)


@pytest.mark.parametrize("mode", ["unconditional", "prompts"])
@pytest.mark.slow
def test_the_family_has_every_guidance_and_combinations(mode: str, pipe: Any) -> None:
    found = family(mode)
    assert len(set(found)) == len(found)
    methods = {setting.method for setting in found}
    assert methods >= {"none", "SEG", "PAG", "SAG", "SEG + PAG"}
    assert (mode == "prompts") == ({"CFG", "CFG + SEG", "CFG + PAG", "CFG + SAG", "CFG + SEG + PAG"} <= methods)
    assert [Setting.from_dict(setting.to_dict()) for setting in found] == found
    assert len({report.describe(setting) for setting in found}) == len(found)
    drawn = {}
    for setting in found:
        (drawn[setting],) = sample(pipe, setting, 3, 2, 2)
    plain = drawn[Setting(mode)]
    assert all(not torch.equal(drawn[setting], plain) for setting in found[1:])


def test_comparisons_are_measured_from_their_settings(tmp_path: Path) -> None:
    reuse = [setting.reuse for setting in comparisons.approximations()]
    assert reuse == [1, 1, 2, 3, 5, 1, 1, 1]
    assert {setting.mode for setting in comparisons.family()} == {"unconditional", "prompts"}
    settings = [Setting("unconditional"), Setting("unconditional", sag=1.0)]
    result = comparisons.measure(settings, tmp_path, lambda name, n: None, images=8, seeds=(1,), steps=4)
    assert [report.describe(report.setting_of(row)) for row in result["rows"]] == ["none", "SAG scale 1"]
    assert result["rows"][1]["measures"]["distance_to_unguided"]["mean"] > 0

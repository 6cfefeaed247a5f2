# SPDX-License-Identifier: Apache-2.0
"""Sampling, measuring, resuming, choosing and reporting, with very few images of the bundled model."""

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
from studies import approximations
from studies.drawings.sheet import held_out, trained
from studies.evaluation import __main__ as command
from studies.evaluation import report
from studies.evaluation.design import Design, choose, verdict
from studies.evaluation.judge import Judge, load_judge
from studies.evaluation.plots import curves, plot
from studies.evaluation.settings import Setting, grid, variants
from studies.evaluation.study import Study, prompts, sample, training
from tests.cli.cli_tools import done, picture, refusal
from tests.diffusers.probes import hooks_of

STEPS = 2


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(autouse=True)
def few_compositions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.evaluation.study.reference.__defaults__", (64,))
    monkeypatch.setattr("studies.evaluation.study.training.__defaults__", (96,))


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


def test_unguided_samples_are_the_stock_pipelines(pipe: Any) -> None:
    own = pictures(pipe, Setting("prompts"), count=2)
    noise = torch.Generator().manual_seed(5 * 1_000_003)
    (stock,) = pipe(
        prompts(5, 1)[0].caption, guidance_scale=1.0, num_inference_steps=STEPS, generator=noise, output_type="np"
    ).images
    levels = torch.from_numpy(stock).permute(2, 0, 1) * 255
    assert (own[0].float() - levels).abs().max() <= 0.51
    assert (own[0].int() - own[1].int()).abs().float().mean() > 1


@pytest.mark.parametrize(
    "setting",
    [
        Setting("prompts", cfg=3.0),
        Setting("prompts", seg=2.0, sigma=math.inf, layers="mid,up", start=0.5),
        Setting("prompts", pag=2.0),
        Setting("prompts", sag=1.0),
    ],
    ids=report.describe,
)
def test_every_kind_of_guidance_acts(pipe: Any, setting: Setting) -> None:
    plain = pictures(pipe, Setting("prompts"), count=1).int()
    assert (pictures(pipe, setting, count=1).int() - plain).abs().float().mean() > 0.1


def test_guidance_is_removed_when_sampling_stops(pipe: Any) -> None:
    before, hooks = dict(pipe.unet.attn_processors), hooks_of(pipe.unet)
    running: Any = sample(pipe, Setting("prompts", seg=2.0, sigma=1.0, layers="mid"), 5, 4, STEPS, 2)
    next(running)
    assert hooks_of(pipe.unet) > hooks
    running.close()
    assert hooks_of(pipe.unet) == hooks
    assert pipe.unet.attn_processors == before


def test_measures_do_not_depend_on_the_size_of_features(judge: Judge, pipe: Any, tmp_path: Path) -> None:
    """Features are divided by the spread of the same features of real compositions."""
    larger = copy.deepcopy(judge)
    larger.project[1].weight.mul_(7), larger.project[1].bias.mul_(7)
    measures = Study(pipe, larger, tmp_path / "7", 16, STEPS).drawn(3)
    expected = Study(pipe, judge, tmp_path / "1", 16, STEPS).drawn(3)
    for name in ("frechet_distance", "kernel_distance", "precision", "recall"):
        assert measures[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-6), name


def test_copies_of_training_images_are_counted(judge: Judge, pipe: Any, tmp_path: Path) -> None:
    study = Study(pipe, judge, tmp_path / "cells.jsonl", 16, STEPS)
    scenes = prompts(3, 16)
    copies = study._judged(training()[:16], scenes)
    assert (copies["copies"], copies["training_distance"]) == (1.0, pytest.approx(0, abs=1e-3))
    assert study.drawn(3)["copies"] < 0.2
    unseen = study.unseen(3)
    assert unseen["training_distance"] > 0
    assert not set(trained()) & {name for scene in prompts(3, 16, held_out()) for name in scene.names}
    assert set(trained()) >= {name for scene in scenes for name in scene.names}


def test_settings_differ_and_survive_json() -> None:
    settings = [*grid("prompts", [0.25, 3.0], [1.0, math.inf], [1.5]), *variants("unconditional", [1.0], math.inf)]
    settings += approximations.approximations()[2:]
    settings = list(dict.fromkeys(settings))
    assert [Setting.from_dict(json.loads(json.dumps(setting.to_dict()))) for setting in settings] == settings
    assert len(settings) == len({(setting.mode, report.describe(setting)) for setting in settings})


def test_a_study_goes_on_where_it_was_cut_off(
    pipe: Any, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cells.jsonl"
    guided = Setting("unconditional", seg=1.0, sigma=1.0, layers="mid")
    seen: list[int] = []

    def advance(name: str, count: int) -> None:
        seen.append(count)

    made = Study(pipe, judge, path, 8, STEPS).measure(guided, 1, advance)
    assert sum(seen) == 8
    assert all(math.isfinite(value) for value in made["measures"].values())
    assert made["measures"]["distance_to_unguided"] > 0
    assert made["measures"]["training_distance"] > 0
    assert 0 <= made["measures"]["copies"] <= 1

    complete = path.read_text(encoding="utf-8")
    path.write_text(complete + complete.splitlines()[-1][:40], encoding="utf-8")
    again = Study(pipe, judge, path, 8, STEPS)
    assert path.read_text(encoding="utf-8") == complete
    monkeypatch.setattr("studies.evaluation.study.sample", None)  # sampling now fails
    assert again.measure(guided, 1, advance) == made
    assert again.find(guided, 2) is None
    assert Study(pipe, judge, path, 16, STEPS).find(guided, 1) is None


def test_measurements_of_another_model_are_refused(pipe: Any, judge: Judge, tmp_path: Path) -> None:
    path = tmp_path / "cells.jsonl"
    path.write_text('{"weights": "others", "dtype": "float32"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"cells.jsonl' holds measurements of .*others.* choose another --out"):
        Study(pipe, judge, path, 8, STEPS)
    assert path.read_text(encoding="utf-8").count("\n") == 1


@pytest.mark.slow
def test_the_command_writes_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    design = Design((1.0,), (math.inf,), (1, 2), (9,), ())
    monkeypatch.setattr(command, "Design", lambda: design)
    output = done("--images", "8", "--steps", "2", "--device", "cpu", "--out", tmp_path, program=command.app)
    evaluation = report.read(tmp_path / "evaluation.json")
    assert picture(tmp_path / "evaluation.png").width > 1000
    assert {"model", "device", "threads", "torch", "diffusers", "commit", "weights", "dtype"} <= set(evaluation)
    assert (evaluation["images_per_seed"], evaluation["seeds"]) == (8, [1, 2])
    rows = {report.setting_of(row): row for row in evaluation["rows"]}
    assert set(rows) == {*design.reported, Setting.from_dict(evaluation["chosen"])}
    assert all(row["seeds"] == 2 and row["images"] == 16 for row in evaluation["rows"])
    assert [report.setting_of(row) for row in evaluation["selection"]] == design.candidates
    assert "| SEG σ=∞ scale 1 |" in output

    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text(encoding="utf-8").splitlines()[1:]]
    plain = [cell for cell in cells if cell["setting"] == design.reported[0].to_dict() and cell["seed"] != 9]
    recalls = [cell["measures"]["recall"] for cell in plain]
    recall = rows[design.reported[0]]["measures"]["recall"]
    assert (recall["mean"], recall["spread"]) == pytest.approx((statistics.fmean(recalls), statistics.stdev(recalls)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--images", "5000"), "4096 new compositions to compare with, fewer than 5000"), (("/no/model",), "/no/model")],
)
def test_what_cannot_be_evaluated_is_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    assert message in refusal(*arguments, "--out", tmp_path, program=command.app)


def test_choice_and_verdict() -> None:
    plain, weak, strong = Setting("unconditional"), *grid("unconditional", [0.5, 4.0], [1.0], [])[1:]
    assert choose([cell(plain, 1, 3.0), cell(weak, 1, 4.0), cell(strong, 1, 9.0)]) == weak
    assert len(set(Design().candidates)) == len(Design().candidates)
    assert not set(Design().seeds) & set(Design().selection_seeds)

    def judgement(*distances: float) -> str:
        cells = [cell(plain, seed, 5.0 + seed) for seed in range(len(distances))]
        return verdict(cells + [cell(weak, seed, distance) for seed, distance in enumerate(distances)], weak)

    assert "beyond the spread over seeds: 5.50 without, 4.60 with; gain 0.90 ± 0.14" in judgement(4.2, 5.0)
    assert "within the spread" in judgement(4.0, 5.9)
    assert "does not lower" in judgement(5.4, 6.2)
    assert "One seed has no spread" in judgement(4.0)


def test_committed_evaluation_belongs_to_the_bundled_weights(judge: Judge, tmp_path: Path) -> None:
    evaluation = report.read(DEMO / "evaluation.json")
    pipe = load_pipeline(find_model("demo"), getattr(torch, evaluation["dtype"]), torch.device("cpu"))
    assert Study(pipe, judge, tmp_path / "cells.jsonl", 8, 1).kind["weights"] == evaluation["weights"]
    assert {report.setting_of(row) for row in evaluation["rows"]} >= set(Design().reported)
    assert all(row["images"] >= 256 and row["seeds"] >= 2 for row in evaluation["rows"])


def test_plot_and_table_show_every_setting(tmp_path: Path) -> None:
    evaluation = report.read(DEMO / "evaluation.json")
    plot(evaluation, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    text = report.text(evaluation)
    assert text.count("| real drawings |") == 2
    for row in [*evaluation["rows"], *evaluation["selection"]]:
        assert f"| {report.describe(report.setting_of(row))} |" in text
    assert "★" in text


def test_settings_in_other_layers_do_not_share_a_curve() -> None:
    settings = [*grid("unconditional", [1.0, 3.0], [5.0, math.inf], []), *variants("unconditional", [1.0], math.inf)]
    rows = report.summarise([cell(setting, 1, 1.0) for setting in settings])
    places = [
        [(s.layers, s.start, s.stop, s.sigma, s.seg) for s in map(report.setting_of, curve_rows)]
        for _, curve_rows in curves(rows)
    ]
    assert places[:2] == [[("mid", 0.0, 1.0, sigma, scale) for scale in (1.0, 3.0)] for sigma in (5.0, math.inf)]
    assert [len(place) for place in places[2:]] == [1] * 5
    starred = [setting for setting in settings if report.is_papers(setting)]
    assert starred == [Setting("unconditional", seg=3.0, sigma=sigma, layers="mid") for sigma in (5.0, math.inf)]


def test_approximations_are_measured_from_their_settings(tmp_path: Path) -> None:
    reuse = [setting.reuse for setting in approximations.approximations()]
    assert reuse == [1, 1, 2, 3, 5, 1, 1, 1]
    settings = [Setting("unconditional"), Setting("unconditional", sag=1.0)]
    result = approximations.measure(settings, tmp_path, lambda name, n: None, images=8, seeds=(1,), steps=2)
    assert [report.describe(report.setting_of(row)) for row in result["rows"]] == ["none", "SAG scale 1"]
    assert result["rows"][1]["measures"]["distance_to_unguided"]["mean"] > 0

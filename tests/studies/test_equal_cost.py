# SPDX-License-Identifier: Apache-2.0
"""The comparison at equal cost: candidates, numbers of steps, choice, and differences to a baseline."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from segkern.generation.loading import find_model, load_pipeline
from studies import equal_cost
from studies.evaluation import report
from studies.evaluation.judge import load_judge
from studies.evaluation.settings import Setting
from studies.evaluation.study import Study

SEG = {"sigma": math.inf, "layers": "mid"}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))


def test_every_method_has_the_same_number_of_candidates() -> None:
    groups = equal_cost.candidates()
    assert {len(group) for group in groups} == {4}
    settings = [setting for group in groups for setting in group]
    assert len({(setting.mode, report.describe(setting)) for setting in settings}) == len(settings)
    assert [Setting.from_dict(setting.to_dict()) for setting in settings] == settings
    assert all(len({setting.method for setting in group}) == 1 for group in groups)
    assert not set(equal_cost.SEEDS) & set(equal_cost.SELECTION_SEEDS)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (Setting("prompts", sag=1.0), 2.0),
        (Setting("prompts", seg=1.0, **SEG), 1.69),
        (Setting("prompts", cfg=2.0, seg=1.0, **SEG), 2.69),
    ],
    ids=["SAG", "SEG", "CFG + SEG"],
)
def test_guided_runs_have_fewer_steps(pipe: Any, setting: Setting, expected: float) -> None:
    per_step = equal_cost.operations(pipe, setting, 5) / equal_cost.operations(pipe, Setting("prompts"), 5)
    assert per_step == pytest.approx(expected, abs=0.04)
    count, cost = equal_cost.affordable(pipe, setting, 10)
    assert count == round(10 / expected)
    assert cost == pytest.approx(count * per_step / 10, rel=0.02)


@pytest.mark.slow
def test_choice_and_differences(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.evaluation.study.reference.__defaults__", (64,))
    monkeypatch.setattr("studies.evaluation.study.training.__defaults__", (96,))
    weak, strong = (Setting("prompts", seg=scale, **SEG) for scale in (0.5, 20.0))
    cfg, both = Setting("prompts", cfg=2.0), Setting("prompts", cfg=2.0, seg=1.0, **SEG)
    study = Study(pipe, load_judge(), tmp_path / "cells.jsonl", 16, 3)
    done = equal_cost.measure(study, lambda name, count: None, [[strong, weak], [cfg], [both]], (1, 2), (9,))
    rows = {report.setting_of(row): row for row in done["rows"]}
    assert list(rows) == [Setting("prompts"), weak, cfg, both]
    assert [[row["steps"] for row in group] for group in done["selection"]] == [[2, 2], [2], [1]]
    assert [rows[setting]["steps"] for setting in rows] == [3, 2, 2, 1]

    plain, guided = ([study.find(setting, seed, steps) for seed in (1, 2)] for setting, steps in ((cfg, 2), (both, 1)))
    distances = [[cell["measures"]["frechet_distance"] for cell in cells if cell] for cells in (plain, guided)]
    values = [after - before for before, after in zip(*distances, strict=True)]
    row = rows[both]["to_cfg"]["frechet_distance"]
    assert row["mean"] == pytest.approx(sum(values) / 2)
    assert row["spread"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert rows[Setting("prompts")]["to_unguided"]["caption_accuracy"] == {"mean": 0.0, "spread": 0.0}
    assert "to_cfg" not in rows[cfg]
    assert "to_cfg" not in rows[weak]

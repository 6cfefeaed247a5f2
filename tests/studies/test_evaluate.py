# SPDX-License-Identifier: Apache-2.0
"""``python -m studies.evaluation``: what it writes, how it goes on, what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies.evaluation import report
from studies.evaluation.__main__ import app
from tests.cli.cli_tools import done, picture, refusal

FEW = ("--images", "8", "--steps", "1", "--scales", "1", "--sigmas", "inf", "--cfg-scales", "2", "--device", "cpu")


@pytest.mark.slow
def test_evaluate_writes_everything_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("studies.evaluation.study.reference.__defaults__", (64, (64, 64)))
    output = done(*FEW, "--seeds", "1", "--selection-seeds", "", "--out", tmp_path, program=app)
    found = report.read(tmp_path / "evaluation.json")
    assert (tmp_path / "evaluation.md").read_text(encoding="utf-8") == report.markdown(found)
    assert picture(tmp_path / "evaluation.png").width > 1000
    assert {"model", "device", "threads", "torch", "diffusers", "commit", "weights", "dtype"} <= set(found)
    assert (found["images_per_seed"], found["seeds"], found["chosen"]) == (8, [1], None)
    assert [row["setting"]["mode"] for row in found["rows"]] == ["unconditional"] * 2 + ["prompts"] * 4
    assert "| SEG σ=∞ scale 1 |" in output

    before = (tmp_path / "cells.jsonl").read_text(encoding="utf-8")
    done(*FEW, "--seeds", "1,2", "--selection-seeds", "", "--modes", "unconditional", "--out", tmp_path, program=app)
    after = (tmp_path / "cells.jsonl").read_text(encoding="utf-8")
    assert after.startswith(before)
    assert after.count("\n") == before.count("\n") + 2
    assert report.read(tmp_path / "evaluation.json")["seeds"] == [1, 2]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--modes", "conditional"), ["'conditional'", "prompts"]),
        (("--modes", ""), ["--modes", "at least one"]),
        (("--scales", "big"), ["--scales", "'big'"]),
        (("--scales", "0,1"), ["--scales", "above 0", "got 0"]),
        (("--sigmas", "1,-2"), ["sigma", "-2"]),
        (("--cfg-scales", "1"), ["--cfg-scales", "above 1"]),
        (("--cfg-scales", "nan"), ["--cfg-scales", "nan"]),
        (("--seeds", "99999999999"), ["99999999999"]),
        (("--images", "5000"), ["4096", "5000"]),
        (("--seeds", "1,1"), ["--seeds", "1 comes twice"]),
        (("--seeds", "1.5"), ["--seeds", "'1.5'"]),
        (("--seeds", "1", "--selection-seeds", "1"), ["other seeds", "[1]"]),
        (("--layers", "middle"), ["'middle'"]),
        (("no/such/model",), ["'no/such/model'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_evaluation_is_one_line(
    arguments: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(*arguments, program=app)
    for word in words:
        assert word in message
    assert not (tmp_path / "outputs").exists()

# SPDX-License-Identifier: Apache-2.0
"""``segkern energy``: its files, its output and its errors."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler

from segkern.analysis import plots, report
from segkern.cli.energy import _steps
from segkern.generation.demo import PROMPTED
from segkern.generation.loading import find_model, load_pipeline
from segkern.generation.pictures import difference
from tests.cli.cli_tools import done, picture, refusal

pytest.importorskip("matplotlib", reason="pictures need matplotlib")

PROMPT = PROMPTED[0].prompt
SMALL = ("--width", "64", "--height", "48", "--steps", "3", "--device", "cpu")
FILES = ("picture.png", "energy.json", "maps.png", "over-sigma.png", "over-steps.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run with the default options on an image that is not square, and return the output folder."""
    out = tmp_path_factory.mktemp("energy") / "made"
    output = done("energy", "demo", PROMPT, *SMALL, "--out", out)
    for name in FILES:
        assert f"wrote {out / name}" in output
    assert "σ ∞" in output
    assert "12x16" in output
    return out


def test_the_picture_is_the_stock_pipelines(folder: Path, tmp_path: Path) -> None:
    done("generate", "demo", PROMPT, *SMALL, "--guidance", "none", "--out", tmp_path / "a.png")
    drawn = picture(folder / "picture.png")
    assert difference(drawn, picture(tmp_path / "a.png")) == 0
    assert (drawn.text["guidance"], drawn.text["prompt"]) == ("none", PROMPT)
    for name in FILES[2:]:
        assert picture(folder / name).width > 800


def test_the_json_holds_what_was_recorded(folder: Path) -> None:
    summary = report.read(folder / "energy.json")
    assert (summary["model"], summary["width"], summary["height"], summary["seed"]) == ("demo", 64, 48, 1)
    assert summary["sigmas"] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf]
    assert [layer["name"] for layer in summary["layers"]] == ["d0", "m0", "u0", "u1"]
    assert report.chosen_steps(summary) == [0, 1, 2]
    for layer in summary["layers"]:
        assert layer["grid"] == [12, 16]
        assert len(layer["energy"]) == 3
        for step, at in layer["at"].items():
            over_grid = torch.tensor(at["map_by_query"])
            assert over_grid.shape == torch.tensor(at["map_by_key"]).shape == (12, 16)
            assert over_grid.mean().item() == pytest.approx(layer["energy"][int(step)], abs=1e-3)
            assert at["by_query"]["energy"][0] == pytest.approx(layer["energy"][int(step)], abs=1e-5)
            variance = at["query_variance"]
            assert variance[0] > variance[3] > variance[-1]
            assert variance[-1] == pytest.approx(0.0, abs=1e-6)
            none, paper, chain = (at["by_key"]["log_curvature"][name] for name in ("none", "paper", "chain"))
            assert none[0] == paper[0] == chain[0]
            assert chain[-1] == -math.inf
            assert paper[-1] == pytest.approx(none[-1] - math.log(12 * 16), rel=1e-4)


def test_the_json_is_json(folder: Path) -> None:
    text = (folder / "energy.json").read_text(encoding="utf-8")
    assert "Infinity" not in text
    assert json.loads(text)["sigmas"][-1] == "inf"
    assert len(text.splitlines()) < 40


def test_options_reach_the_record(tmp_path: Path) -> None:
    options = ("--layers", "mid", "--sigmas", "inf,2,0", "--at", "last,2", "--boundary", "circular", "--seed", "7")
    done("energy", "demo", *SMALL, *options, "--guidance-scale", "1", "--out", tmp_path)
    summary = report.read(tmp_path / "energy.json")
    settings = [summary[name] for name in ("boundary", "seed", "guidance_scale", "prompt")]
    assert settings == ["circular", 7, 1.0, ""]
    assert summary["sigmas"] == [0.0, math.inf, 2.0]
    assert [layer["name"] for layer in summary["layers"]] == ["m0"]
    assert report.chosen_steps(summary) == [2]
    energy = summary["layers"][0]["at"]["2"]["by_query"]["energy"]
    assert energy[0] < energy[2] < energy[1]  # a circular boundary keeps the mean


def test_files_are_not_replaced_unasked(folder: Path, tmp_path: Path) -> None:
    for name in ("energy.json", "maps.png"):
        (tmp_path / name).write_text("mine")
        message = refusal("energy", "demo", *SMALL, "--out", tmp_path)
        assert name in message
        assert "--overwrite" in message
        assert (tmp_path / name).read_text() == "mine"
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--layers", "middle"), ["--layers", "'middle'"]),
        (("--sigmas", "big"), ["--sigmas", "'big'"]),
        (("--sigmas", "-1"), ["--sigmas", "positive", "-1"]),
        (("--sigmas", "nan"), ["--sigmas", "nan"]),
        (("--at", "soon"), ["--at", "'soon'"]),
        (("--at", "3"), ["--at", "3 denoiser calls"]),
        (("--boundary", "zero"), ["--boundary", "'zero'"]),
        (("--width", "63"), ["--width", "63"]),
        (("--dtype", "fp8"), ["'fp8'"]),
        (("--device", "abacus"), ["'abacus'"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_words_are_one_line(arguments: tuple[str, ...], words: list[str], tmp_path: Path) -> None:
    message = refusal("energy", "demo", *SMALL, "--out", tmp_path / "out", *arguments)
    for word in words:
        assert word in message
    assert not (tmp_path / "out").exists()


def test_wrong_models_are_one_line(tmp_path: Path) -> None:
    assert "'no/such/model'" in refusal("energy", "no/such/model", "--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "file" in refusal("energy", "demo", *SMALL, "--out", tmp_path / "file")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name))
    message = refusal("energy", "demo", *SMALL, "--out", tmp_path)
    assert message == 'segkern: matplotlib is not installed; pip install "segkern[plots]"\n'


def test_the_last_step_is_the_last_call_of_the_denoiser(tmp_path: Path) -> None:
    pipe = load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "model")
    options = ("--layers", "mid", "--sigmas", "1", "--at", "first,last", "--out", tmp_path / "out")
    done("energy", tmp_path / "model", "for $5 \\frac and $10", *SMALL, *options)
    summary = report.read(tmp_path / "out" / "energy.json")
    assert report.chosen_steps(summary) == [0, 4]
    assert summary["prompt"] == "for $5 \\frac and $10"


def test_words_that_look_like_numbers_stay_words(tmp_path: Path) -> None:
    report.write(tmp_path / "a.json", {"prompt": "inf", "model": "nan", "sigmas": [math.inf], "layers": []})
    summary = report.read(tmp_path / "a.json")
    assert summary == {"prompt": "inf", "model": "nan", "sigmas": [math.inf], "layers": []}


def test_steps_in_words() -> None:
    assert _steps("first,middle,last,3", 20) == (0, 10, 19, 3)
    assert _steps("first,middle,last", 1) == (0,)


def test_zero_and_infinity_stand_beside_the_finite_sigmas() -> None:
    assert plots._places([0.0, 0.5, 4.0, math.inf]) == [-2.0, -1.0, 2.0, 3.0]
    assert plots._places([0.0, math.inf]) == [-1.0, 1.0]


def test_sheets_of_many_layers() -> None:
    assert plots.map_files(6) == ["maps.png"]
    assert plots.map_files(7) == ["maps-1.png", "maps-2.png"]


def fake(layers: int, sigmas: list[float]) -> dict[str, Any]:
    """Return a summary with this number of layers."""
    values = [float(index) for index in range(len(sigmas))]
    cut = {"energy": values, "log_curvature": {"none": values, "paper": values, "chain": [0.0] * len(sigmas)}}
    at = {"map_by_query": [[0.0, 1.0]], "query_variance": values, "by_query": cut, "by_key": cut}
    known = {"model": "demo", "prompt": "x" * 90, "width": 8, "height": 8, "seed": 1, "boundary": "reflect"}
    made = [{"name": f"u{i}", "grid": [1, 2], "energy": [0.0, 1.0], "at": {"1": at}} for i in range(layers)]
    return {**known, "sigmas": sigmas, "layers": made}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("layers", "sigmas"), [(1, [0.0]), (11, [0.0, math.inf]), (11, [0.0, 1.0, math.inf])], ids=str)
def test_every_number_of_layers_and_sigmas_can_be_drawn(layers: int, sigmas: list[float], tmp_path: Path) -> None:
    summary = fake(layers, sigmas)
    assert len(plots.plot_maps(summary, tmp_path)) == (1 if layers == 1 else 2)
    plots.plot_over_sigma(summary, tmp_path / "sigma.png")
    plots.plot_over_steps(summary, tmp_path / "steps.png")
    report.write(tmp_path / "a.json", summary)
    assert report.read(tmp_path / "a.json") == summary

# SPDX-License-Identifier: Apache-2.0
"""Result files: their schema, comparisons and plots."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from benchmarks import plots, results
from benchmarks.compare import compare, regressed
from tests.project.benchmark_tools import command, quick_run


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_run(tmp_path_factory.mktemp("results"))


def test_a_file_of_another_schema_is_refused(quick: Path, tmp_path: Path) -> None:
    for content in ({"schema": 2, "rows": []}, {"environment": {}}):
        (tmp_path / "other.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is not a result file of schema 3: it has"):
            results.read(tmp_path / "other.json")


def changed(file: results.Result, provider: str, factor: float, spread: float = 1.0) -> results.Result:
    file = copy.deepcopy(file)
    for row in file["rows"]:
        if row["provider"] == provider and row["wall_ms"] is not None:
            middle = row["wall_ms"]["median"] * factor
            row["wall_ms"] = {"median": middle, "p20": middle / (1 + spread / 100), "p80": middle * (1 + spread / 100)}
    return file


def test_runs_are_compared_beyond_their_noise(quick: Path) -> None:
    before = changed(results.read(quick), "auto", 1.0)

    def verdicts(after: results.Result) -> set[str]:
        return {line.verdict for line in compare(before, after) if line.key[3] == "auto"}

    assert verdicts(before) == {"same"}
    assert verdicts(changed(before, "auto", 1.2)) == {"slower"}
    assert verdicts(changed(before, "auto", 0.8)) == {"faster"}
    assert verdicts(changed(before, "auto", 1.2, spread=30.0)) == {"same"}, "the change is within the noise"
    assert verdicts(changed(before, "auto", 1.02, spread=0.1)) == {"same"}, "the change is too small to count"
    lost = copy.deepcopy(before)
    for row in lost["rows"]:
        if row["provider"] == "auto":
            row |= {"wall_ms": None, "reason": "it broke"}
    assert verdicts(lost) == {"lost"}
    assert {line.verdict for line in compare(lost, before) if line.key[3] == "auto"} == {"gained"}
    assert regressed(compare(before, lost))
    assert not regressed(compare(lost, before))


def test_compare_ends_with_1_on_a_regression(quick: Path, tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    results.write_json(before, changed(results.read(quick), "auto", 1.0))
    results.write_json(after, changed(results.read(quick), "auto", 1.5))
    assert command("compare", before, before).exit_code == 0
    worse = command("compare", before, after)
    assert worse.exit_code == 1
    assert "12 slower" in worse.output
    assert command("compare", after, before).exit_code == 0


def test_pictures_are_written(quick: Path, tmp_path: Path) -> None:
    from PIL import Image

    drawn = command("plot", quick, "--out", tmp_path)
    assert drawn.exit_code == 0, drawn.output
    assert "wrote " in drawn.output
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    assert names == ["quick-ratio-float32.png"]
    for name in names:
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 400
            assert len(image.convert("L").getcolors() or []) > 50, "the plot is almost empty"


def test_pictures_show_every_point(quick: Path) -> None:
    from matplotlib.figure import Figure

    (rows,) = plots.rows_by_picture("x", results.read(quick)).values()
    for row in rows:
        if row["sigma"] == "inf" and row["ratio"]:
            row["ratio"]["median"] /= 9  # infinity is faster
    figure = Figure()
    plots.draw_ratios(figure, rows)
    for panel in figure.axes:
        heights = [y for line in panel.get_lines() for y in line.get_ydata()]
        assert len(heights) > 20
        low, high = panel.get_ylim()
        assert all(low <= y <= high for y in heights), "points are missing"


def test_ratios_far_from_one_are_named_and_leave_room_for_the_others(quick: Path) -> None:
    from matplotlib.figure import Figure

    result = results.read(quick)
    for row in result["rows"]:
        if row["ratio"]:
            row["ratio"] = {"median": 7.7 if row["provider"] == "dense" else 1.04}
    (rows,) = plots.rows_by_picture("x", result).values()
    figure = Figure()
    plots.draw_ratios(figure, rows)
    for panel in figure.axes:
        assert panel.get_yscale() == "linear"
        assert panel.get_ylim()[1] == 2.0
        (said,) = (text.get_text() for text in panel.texts)
        assert said == "beyond the scale:\ndense: 7.7 to 7.7"


def test_no_line_is_drawn_through_what_was_not_measured() -> None:
    rows = [{"sigma": sigma} for sigma in ("30", "0.5", "1")]
    pieces = plots._unbroken(rows, ["0.5", "1", "3", "30", "inf"])
    assert [places for places, _ in pieces] == [[0, 1], [3]]
    assert [row["sigma"] for _, run in pieces for row in run] == ["0.5", "1", "30"]

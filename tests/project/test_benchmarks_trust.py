# SPDX-License-Identifier: Apache-2.0
"""Estimates of coarse queries' error beside the true ones: what the study computes, and what it says of it."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks import trust
from segkern import Grid, reference
from tests.core.drawn_inputs import KINDS
from tests.project import benchmark_tools


def test_drawn_inputs_and_the_models_are_compared(tmp_path: Path) -> None:
    layers = [*trust.drawn(1, Grid(12, 14)), *itertools.islice(trust.of_model(steps=1), 3)]
    assert [layer.kind for layer in layers] == [*KINDS, *3 * [trust.MODEL]]
    rows = [row for found in trust.compare(iter(layers)) for row in found]
    assert len(rows) == len(layers) * len(trust.STRIDES)
    first, row = layers[0], rows[0]
    true = reference.coarse_error(first.query, first.key, first.value, first.grid, first.sigma, row["stride"])
    assert row["true"] == pytest.approx(true.item(), rel=1e-6)
    assert any(row["estimated"] for row in rows)
    trust.write(rows, tmp_path / "estimate.json")
    trust.picture(rows, tmp_path / "estimate.png")
    assert (tmp_path / "estimate.png").stat().st_size > 1000
    assert {line[0] for line in trust.kinds(rows)} == {*KINDS, trust.MODEL}


def test_tables_tell_the_worst_and_what_auto_would_take() -> None:
    def row(number: int, stride: int, true: float, estimated: float | None) -> dict:
        return {"input": number, "kind": "a", "sigma": 4.0, "stride": stride, "true": true, "estimated": estimated}

    rows = [
        row(0, 2, 1e-4, 2e-4),
        row(0, 3, 3e-4, 2e-4),
        row(0, 4, 1e-5, 1e-5),
        row(1, 2, 0.5, None),
        row(1, 3, 1, 1e-9),
    ]
    assert trust.kinds(rows)[1] == ["a", "3", "2 of 2", "3e-04 to 1e+00", "5.0e-01 / 1.0e-04", "1000000000.00"]
    assert trust.kinds(rows)[0][2] == "1 of 2"
    assert trust.choices(rows) == [["a", "1: 1, 3: 1", "3.0e-04", "3.9e-03"]]


def test_the_command_writes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = list(trust.drawn(1, Grid(8, 9)))
    monkeypatch.setattr(trust, "drawn", lambda count: iter(layers[:2]))
    monkeypatch.setattr(trust, "of_model", lambda: iter(()))
    ran = benchmark_tools.command("trust", "--count", 1, "--out", tmp_path / "estimate.json")
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert (tmp_path / "estimate.json").exists()


@pytest.mark.skipif(trust.committed() is None, reason="no study is committed")
def test_the_committed_study_holds_what_is_claimed() -> None:
    found = trust.committed()
    assert found is not None
    rows = [row for row in found["rows"] if row["kind"] != trust.MODEL]
    assert len({row["input"] for row in rows}) >= 100
    assert all(row["true"] <= 2 * row["estimated"] for row in found["rows"] if row["estimated"] is not None)

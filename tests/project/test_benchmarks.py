# SPDX-License-Identifier: Apache-2.0
"""Measurements: incorrect results are not timed, rounds alternate, all ways agree, work is counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import checks, machine, results, tables, timing, tune
from benchmarks.cases import CASES, TINY, Case, Inputs
from benchmarks.measure import measure
from benchmarks.providers import BLURS, PROVIDERS, SUITES, Call, Provider, find_providers
from segkern import Grid
from segkern.cli import explain
from segkern.kernels._configs import Tile
from tests.project.benchmark_tools import quick_run

CPU = torch.device("cpu")
TEXT = CASES["tiny-text-5x7"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quick_run(tmp_path_factory.mktemp("results"))


def test_a_quick_run_has_a_row_for_every_way_case_and_sigma(quick: Path) -> None:
    result = results.read(quick)
    assert (result["suite"], result["complete"], result["quick"], result["headline"]) == (
        *("attention", True, True, "wall"),
    )
    assert result["environment"]["commit"] == machine.described(CPU)["commit"]
    ways = [provider.name for provider in find_providers("attention") if provider.name != "flex"]
    expected = {(case, "float32", f"{sigma:g}", way) for case in TINY for sigma in SUITES["attention"] for way in ways}
    assert {results.key(row) for row in result["rows"]} == expected
    assert len(result["rows"]) == len(expected)


def test_rows_have_times_errors_and_ratios_or_a_reason(quick: Path) -> None:
    rows = results.read(quick)["rows"]
    reasons = {row["provider"]: row["reason"] for row in rows if row["reason"]}
    on_a_gpu = {"sdpa efficient", "sdpa cudnn", "triton", "blur + sdpa flash", "blur + sdpa cudnn", *BLURS}
    assert reasons.keys() == on_a_gpu, reasons
    for row in rows:
        if row["reason"]:
            assert row["wall_ms"] is row["ratio"] is row["tflops"] is None
            continue
        time = row["wall_ms"]
        assert 0 < time["p20"] <= time["median"] <= time["p80"]
        assert row["hot_ms"] == row["cold_ms"] == row["graph_ms"] == row["peak_mib"] == "not measured"
        assert row["ratio_to"].startswith("sdpa")
        assert (row["error"]["relative"] < 1e-6) == (row["exact"] or row["sigma"] == "inf")
    same = [row for row in rows if row["provider"] == row["ratio_to"]]
    assert same
    assert all(row["ratio"]["median"] == 1.0 for row in same)


def rows_of(*providers: Provider, sigma: float = 1.0) -> dict[str, dict[str, Any]]:
    (rows,) = measure(TEXT, (sigma,), [PROVIDERS["sdpa"], *providers], CPU, rounds=2)
    return {row["provider"]: row for row in rows}


def spoiled(name: str, spoil: Callable[[torch.Tensor], torch.Tensor], of: str = "auto") -> Provider:
    def make(inputs: Inputs, sigma: float) -> Call:
        call = PROVIDERS[of].make(inputs, sigma)
        return lambda: spoil(call())

    return replace(PROVIDERS[of], name=name, make=make)


def test_a_wrong_result_has_no_time() -> None:
    def fails(result: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand a long story")

    rows = rows_of(
        PROVIDERS["auto"],
        spoiled("off", lambda result: result * 1.0001),
        spoiled("nan", lambda result: torch.full_like(result, math.nan)),
        spoiled("shape", lambda result: result[:, :1]),
        spoiled("dtype", lambda result: result.half()),
        spoiled("fails", fails),
        replace(PROVIDERS["auto"], name="unblurred", make=PROVIDERS["sdpa"].make),
    )
    assert rows["auto"]["reason"] is None
    assert rows["auto"]["wall_ms"]["median"] > 0
    for name, reason in {
        "off": "wrong under the numerics contract",
        "nan": "not finite",
        "shape": "shape of the result is (3, 1, 38, 16), expected (3, 2, 38, 16)",
        "dtype": "torch.float16, expected torch.float32",
        "fails": "RuntimeError: no kernel for this",
        "unblurred": "wrong under the numerics contract",
    }.items():
        assert reason in rows[name]["reason"]
        assert rows[name]["wall_ms"] is rows[name]["ratio"] is None
    assert "story" not in rows["fails"]["reason"]


def test_another_sigma_is_wrong_in_half_precision_too() -> None:
    inputs = Case("square", Grid(32, 32), 8, 64, 3, 32 * 32, torch.bfloat16).inputs(CPU)
    wanted = checks.expected(inputs, 10.0, "attention")
    auto = PROVIDERS["auto"]
    _, wrong = checks.judge(auto, auto.make(inputs, 10.0)(), inputs, wanted)
    assert not wrong
    _, wrong = checks.judge(auto, auto.make(inputs, 4.0)(), inputs, wanted)
    assert "wrong in the blurred sample" in wrong, "the larger values of the other sample would hide it"


def test_an_approximation_is_timed_and_its_error_told() -> None:
    rows = rows_of(PROVIDERS["stride 4"], spoiled("nan", lambda result: result * math.nan, of="stride 4"))
    assert rows["stride 4"]["reason"] is None
    assert not rows["stride 4"]["exact"]
    assert rows["stride 4"]["error"]["relative"] > 1e-3
    assert "not finite" in rows["nan"]["reason"]


@pytest.mark.parametrize("sigma", [0.5, 10.0, math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_ways_compute_the_same_around_text(sigma: float, dtype: torch.dtype) -> None:
    inputs = TEXT.of(dtype).inputs(CPU)
    wanted = {kind: checks.expected(inputs, sigma, kind) for kind in ("plain", "attention", "blur", "mass")}
    looked_at = 0
    for name, provider in PROVIDERS.items():
        if name == "flex" or not provider.exact or provider.why_not(inputs, sigma):
            continue
        if name == "blur official" and dtype == torch.float32:
            continue  # its two-dimensional sum rounds more than the contract allows at large sigma
        _, wrong = checks.judge(provider, provider.make(inputs, sigma)(), inputs, wanted[provider.kind])
        assert not wrong, f"{name}: {wrong}"
        looked_at += 1
    assert looked_at >= 10


def test_what_does_not_fit_the_memory_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda device: 1000.0)
    rows = rows_of(PROVIDERS["dense"], PROVIDERS["auto"])
    assert "GiB are free" in rows["dense"]["reason"]
    assert rows["auto"]["reason"] is None


def test_rounds_take_turns_in_ever_other_orders() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples, missing = timing.time_calls(calls, CPU, rounds=12)
    rounds = ["".join(order[first : first + 3]) for first in range(0, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)
    followed = {pair for turn in rounds for pair in (turn[:2], turn[1:])}
    assert len(followed) == 6, "every call should follow every other call in some round"
    assert {name: len(clocks["wall"]) for name, clocks in samples.items()} == {"a": 12, "b": 12, "c": 12}
    assert missing["a"] == {"hot": "not measured", "cold": "not measured", "graph": "not measured"}


def test_calls_of_seconds_are_timed_in_the_first_rounds_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_SLOW_MS", 0.0)
    samples, _ = timing.time_calls({"a": lambda: None}, CPU, rounds=5)
    assert len(samples["a"]["wall"]) == 2
    (rows,) = measure(TEXT, (1.0,), [PROVIDERS["sdpa"], PROVIDERS["auto"]], CPU, rounds=5)
    assert [row["rounds"] for row in rows] == [2, 2]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_all_clocks() -> None:
    device = torch.device("cuda", 0)
    chosen = [PROVIDERS[name] for name in ("sdpa", "official", "auto", "triton")]
    (rows,) = measure(CASES["sdxl-32x32"].of(torch.float16), (3.0,), chosen, device, rounds=3)
    for row in rows:
        assert row["reason"] is None, row
        assert row["peak_mib"] > 0
        assert all(row[f"{clock}_ms"]["median"] > 0 for clock in ("wall", "hot", "cold"))
        assert isinstance(row["graph_ms"], str if row["provider"] == "official" else dict), row


def test_writing_results_does_not_make_the_checkout_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(status: str) -> str:
        ran = SimpleNamespace(returncode=0, stdout=status)
        monkeypatch.setattr(machine.subprocess, "run", lambda *arguments, **options: ran)
        monkeypatch.setattr(machine, "environment", lambda *arguments: {"device": "d", "commit": "abc-dirty"})
        return str(machine.described(CPU)["commit"])

    assert said(" M benchmarks/results/amd-epyc-attention.json\n") == "abc"
    assert said(" M benchmarks/results/a.json\n M segkern/api.py\n") == "abc-dirty"


def test_tiles_that_do_not_compile_or_err_are_out(device: torch.device) -> None:
    case = CASES["tiny-6x10"].of(torch.float16)
    good = tune.candidates(case, device)
    assert good[0] == tune._configs.attention_tile(tune._configs.architecture(device), case.head_dim, case.dtype)
    assert len(good) == len(set(good)) > 20
    screened = tune.screen(case, 1.0, [Tile(32, 32, 16, 4, 1), Tile(48, 32, 16, 4, 1)], device, rounds=2)
    first, last = screened["tiles"]
    assert first["tile"] == screened["now"] == asdict(Tile(32, 32, 16, 4, 1))
    assert first["ms"]["median"] > 0
    assert last["tile"]["block_m"] == 48, "invalid: a product's sides are powers of two"
    assert last["ms"] is None
    assert last["reason"]
    assert screened["environment"]["torch"] == torch.__version__
    assert tables.of_tiles(screened).row_count == 2
    assert tune.fastest([screened, screened]) == Tile(32, 32, 16, 4, 1)
    assert tune.fastest([screened, screened | {"now": last["tile"]}]) is None, "the current tile is not timed there"


def confirmed(
    case: str,
    sdpa: float | None = 1.0,
    *,
    tokens: int = 4096,
    chosen: str = "before",
    best: Tile | None = None,
    **ms: float | None,
) -> dict[str, Any]:
    """Return a result of ``confirm``: calls take 1 ms except the given ones, and are inaccurate if None is given."""
    calls = {f"{which}, triton {blur}": 1.0 for which in ("now", "best") for blur in ("prologue", "before")}
    calls |= {name.replace("_", ", triton "): value for name, value in ms.items()}
    calls |= {"sdpa default": sdpa, "sdpa flash": None, "sdpa cudnn": None if sdpa is None else sdpa - 0.01}
    now = tune._configs.default_tile("sm_90", 64, torch.bfloat16)
    return {
        "architecture": "sm_90",
        "dtype": "bfloat16",
        "head_dim": 64,
        "case": case,
        "tokens": tokens,
        "environment": {"device": "a GPU", "torch": "2", "triton": "3", "commit": "abc"},
        "now": asdict(now),
        "best": asdict(best or Tile(64, 32, 16, 8, 2)),
        "blur": dict.fromkeys(("now", "best"), f"triton {chosen}"),
        "calls": {
            name: {"reason": "wrong" if value is None else None, "ms": None if value is None else {"median": value}}
            for name, value in calls.items()
        },
    }


@pytest.mark.parametrize(
    ("cases", "said", "sdpa", "which"),
    [
        ([confirmed("a", best_before=0.99)], "stays", None, None),
        ([confirmed("a", best_before=0.8), confirmed("b", best_before=0.9)], "15.1% faster", {}, "best"),
        ([confirmed("a", best_before=0.8), confirmed("b", best_before=None)], "stays", None, None),
        ([confirmed("a", best_before=0.8, best_prologue=None)], "stays", None, None),
        ([confirmed("a", chosen="prologue", best_before=0.5)], "stays", None, None),
        ([confirmed("a", 0.95, best_before=0.9)], "is 10.0% faster", {}, "best"),
        ([confirmed("a", 0.82, best_before=0.9)], "(cudnn) are 10.0% faster", {"large": "cudnn"}, "best"),
        ([confirmed("a", 0.81, tokens=1024)], "(cudnn) are 20.0% faster", {"small": "cudnn"}, "now"),
        ([confirmed("a", 0.81), confirmed("b", tokens=1024)], "large: blurring", {"large": "cudnn"}, "now"),
        ([confirmed("a", None, now_before=None, best_before=0.1)], "unchanged, the current tile", None, None),
    ],
)
def test_the_fastest_that_is_right_everywhere_is_installed(
    cases: list[dict[str, Any]], said: str, sdpa: dict[str, str] | None, which: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    (line,) = tune.install(cases, path)
    assert said in line
    table = json.loads(path.read_text())
    if which is None:
        assert table == {}
        return
    entry = table["sm_90"]["bfloat16"]["64"]
    assert (entry["sdpa"], entry["tile"]) == (sdpa, cases[0][which])
    assert (entry["device"], entry["commit"], entry["cases"]) == ("a GPU", "abc", [case["case"] for case in cases])
    (line,) = tune.install([confirmed("a")], path)
    assert "stays" in line
    assert json.loads(path.read_text()) == {}, "an entry that no longer wins is removed"


def test_what_is_installed_is_read_and_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    path.write_text("{}")
    monkeypatch.setattr(tune._configs, "TUNED", path)
    usual = tune._configs.attention_tile("sm_90", 64, torch.float16)
    other = Tile(64, 32, 16, 8, 2)

    def explained(sigma: float) -> dict[str, str]:
        clear_tuned()
        call = explain.Call(Grid(64, 64), 10, 64, sigma, dtype=torch.bfloat16)
        return dict(explain.explain(call, CPU, "sm_90"))

    try:
        tune.install([confirmed("a", best_before=0.9)], path)
        assert "separate kernel" in explained(10.0)["blur computed in"]
        assert tune._configs.measured("sm_90", 64, torch.bfloat16) == tune._configs.Tuned(other, {})
        assert tune._configs.attention_tile("sm_90", 64, torch.bfloat16) == other
        assert tune._configs.attention_tile("sm_90", 64, torch.bfloat16, masked=True) != other
        assert tune._configs.attention_tile("sm_90", 64, torch.float16) == usual
        tune.install([confirmed("a", 0.5, best=replace(other, descriptors=True), best_before=0.9)], path)
        assert "PyTorch's attention (cudnn)" in explained(3.0)["computed by"]
        tune.install([confirmed("a", best=replace(other, descriptors=True), best_before=0.9)], path)
        assert "descriptors for keys and values (measured)" in explained(3.0)["attention tile"]
    finally:
        clear_tuned()


def clear_tuned() -> None:
    for cache in (tune._configs.tuned, tune._configs.attention_tile):
        cache.cache_clear()

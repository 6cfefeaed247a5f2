# SPDX-License-Identifier: Apache-2.0
"""``make device``: if a stage dies, hangs or runs out of time, the others still run; the rehearsal runs all stages."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer

from benchmarks import __main__ as commands
from benchmarks import device, device_stages
from benchmarks.cases import CASES, SDXL
from benchmarks.device import CUT, FAILED, PASSED, SKIPPED, Stage, run_stages, stages
from benchmarks.providers import PROVIDERS, find_providers
from benchmarks.results import read_json
from benchmarks.steps import find_ways
from tests.project.benchmark_tools import command

CPU = torch.device("cpu")


def stage(name: str, code: str, limit: float = 30.0) -> Stage:
    return Stage(name, limit, ("-c", "import os, signal, subprocess, sys, time; from pathlib import Path; " + code))


def writes(path: Path, text: str = "done") -> str:
    return f"Path({str(path)!r}).write_text({text!r})"


def test_a_stage_that_dies_or_hangs_loses_only_itself(tmp_path: Path) -> None:
    first, part, last = (tmp_path / name for name in ("first.json", "part.json", "last.json"))
    child = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']).pid"
    lines: list[str] = []
    done = run_stages(
        [
            stage("good", writes(first)),
            stage("killed", "print('so far', flush=True); os.kill(os.getpid(), signal.SIGKILL)"),
            stage("wrong", "sys.exit('no such kernel')"),
            stage("hangs", f"Path({str(part)!r}).write_text(str({child})); time.sleep(60)", 4.0),
            stage("last", writes(last)),
        ],
        tmp_path,
        60.0,
        tell=lines.append,
    )
    assert [outcome.status for outcome in done] == [PASSED, FAILED, FAILED, CUT, PASSED]
    assert done[1].why == "ended by SIGKILL, so far"
    assert done[2].why == "exit code 1, no such kernel"
    assert done[3].why == "it took longer than 4 s, its limit"
    assert first.read_text() == last.read_text() == "done"
    assert not alive(int(part.read_text())), "processes that the stage started are ended too"
    assert [line.split()[3] for line in lines] == ["good", "killed:", "wrong:", "hangs:", "last"]
    summary = read_json(tmp_path / device.SUMMARY)
    assert summary["complete"]
    assert [(row["name"], row["status"]) for row in summary["stages"]] == [(o.name, o.status) for o in done]
    assert summary["stages"][1]["printed"] == "so far"


def alive(process: int) -> bool:
    for _ in range(50):
        try:
            os.kill(process, 0)
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        if state == "Z":
            return False
        time.sleep(0.1)
    return True


def test_the_budget_ends_a_stage_and_those_after_it(tmp_path: Path) -> None:
    start = time.monotonic()
    chosen = [stage("long", "time.sleep(60)"), stage("late", writes(tmp_path / "late.json"))]
    done = run_stages(chosen, tmp_path, 2.0, least=1.0)
    assert time.monotonic() - start < 15
    assert [outcome.status for outcome in done] == [CUT, SKIPPED]
    assert done[0].why == "it took longer than 2 s, the rest of the budget of 2 s"
    assert done[1].why == "0 s of the budget of 2 s are left"
    assert not (tmp_path / "late.json").exists()


def test_a_run_that_is_terminated_ends_its_stage(tmp_path: Path) -> None:
    pid, code = tmp_path / "pid", "import os, signal, time; from pathlib import Path; from benchmarks import device; "
    hangs = (
        f"import os, time; from pathlib import Path; Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    code += f"device.stages = lambda folder, dry: (device.Stage('hangs', 60.0, ('-c', {hangs!r})),); "
    code += f"device.run(Path({str(tmp_path / 'out')!r}), 60.0, None, True, [], print)"
    run = subprocess.Popen([sys.executable, "-c", code], cwd=device._ROOT)
    for _ in range(600):
        if pid.exists() and pid.read_text():
            break
        time.sleep(0.1)
    run.terminate()
    assert run.wait(30) == 128 + 15
    assert not alive(int(pid.read_text()))
    (row,) = read_json(tmp_path / "out" / device.SUMMARY)["stages"]
    assert (row["name"], row["status"]) == ("hangs", device.RUNNING)


def test_the_summary_says_what_runs(tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    code = f"Path({str(copy)!r}).write_bytes(Path({str(tmp_path / device.SUMMARY)!r}).read_bytes())"
    run_stages([stage("first", ""), stage("second", code)], tmp_path, 60.0)
    during = json.loads(copy.read_text())
    assert not during["complete"]
    assert [(row["name"], row["status"]) for row in during["stages"]] == [("first", PASSED), ("second", device.RUNNING)]


def test_a_stage_without_its_packages_is_not_started(tmp_path: Path) -> None:
    needy = replace(stage("needy", writes(tmp_path / "needy.json")), needs=("no_such_package",))
    (outcome,) = run_stages([needy], tmp_path, 60.0)
    assert (outcome.status, outcome.why[:33]) == (SKIPPED, "no_such_package is not installed;")
    (tmp_path / "site" / "no_such_package").mkdir(parents=True)
    (outcome,) = run_stages([needy], tmp_path, 60.0, os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert outcome.status == PASSED


def test_the_exit_code_and_the_last_lines_name_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old.json"
    old.touch()
    both = (Stage("good", 30.0, ("-c", "", "--out", str(old))), stage("bad: one", "sys.exit(3)"))
    monkeypatch.setattr(device, "stages", lambda folder, dry: both)
    ran = command("device", "--dry", "--out", tmp_path)
    assert ran.exit_code == 1
    assert not old.exists(), "files of an earlier run are deleted"
    assert f"1 of 2 stages passed; wrote {tmp_path}\nfailed" in ran.output
    assert ran.output.endswith("bad: one: exit code 3\n")
    assert command("device", "--dry", "--out", tmp_path, "--only", "good").exit_code == 0
    assert [row["name"] for row in read_json(tmp_path / device.SUMMARY)["stages"]] == ["good"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_is_refused(tmp_path: Path) -> None:
    for arguments, quoted in ((), "pass --dry for a rehearsal"), (("--dry", "--only", "stairs"), "got stairs"):
        refused = command("device", "--out", tmp_path / "none", *arguments)
        assert refused.exit_code == 2
        assert refused.stderr.count("\n") == 1
        assert quoted in refused.stderr
    assert not (tmp_path / "none").exists()


def test_stages_come_in_the_order_of_their_worth(tmp_path: Path) -> None:
    dry, real = stages(tmp_path, True), stages(tmp_path, False)
    assert [stage.name for stage in dry] == [stage.name for stage in real]
    kinds = list(dict.fromkeys(stage.name.partition(":")[0] for stage in real))
    assert kinds == ["environment", "compilation", "blur", "attention", "tuning", "tests", "step"]
    for stage in (*dry, *real):
        written = [Path(value) for value in stage.arguments if value.endswith(".json")]
        assert all(path.parent == tmp_path for path in written)
    names = {value for stage in real for value in stage.arguments if value.endswith(".json")}
    assert len(names | {device.SUMMARY}) <= 8, "a device may return at most eight files"


@pytest.mark.parametrize("dry", [False, True])
def test_the_arguments_of_stages_are_understood(dry: bool, tmp_path: Path) -> None:
    """Time on a device is too short to find a misspelt option there."""
    groups = {"benchmarks": commands.app, "benchmarks.device_stages": device_stages.app}
    for stage in stages(tmp_path, dry):
        _, module, name, *rest = stage.arguments
        group = typer.main.get_command(groups[module])
        options = group.commands[name].make_context(name, rest).params  # type: ignore[attr-defined]
        if options.get("cases") and options.get("suite") != "step":
            assert set(options["cases"].split(",")) <= set(CASES)
            assert dry or set(options["cases"].split(",")) == set(SDXL)
        if options.get("suite") == "step":
            assert len(find_ways(options["providers"].split(","), False)) >= 8
        elif options.get("providers"):
            find_providers(options["suite"], options["providers"].split(","))
        assert options.get("way", "auto") in PROVIDERS


def test_missing_packages_come_from_a_folder_of_wheels(tmp_path: Path) -> None:
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with pytest.raises(ValueError, match=r"holds no \*\.whl"):
        device.install_missing(wheels, site)
    for name in ("segkern_missing", "torch"):
        with zipfile.ZipFile(wheels / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            info = f"{name}-1.0.dist-info"
            wheel.writestr(f"{name}/__init__.py", "here = True\n")
            wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    assert device.install_missing(wheels, site) == ["segkern_missing"]
    assert (site / "segkern_missing" / "__init__.py").exists()
    assert not (site / "torch").exists()


def test_a_checkout_that_is_not_installed_has_its_integrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "segkern").mkdir()
    (tmp_path / "integrations").mkdir()
    (tmp_path / "integrations" / "here.py").touch()
    monkeypatch.setattr(device, "_ROOT", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    link = tmp_path / "segkern" / "integrations"
    with device.integrations_as_installed():
        assert (link / "here.py").exists()
    assert not link.is_symlink()
    monkeypatch.undo()
    with device.integrations_as_installed():
        assert not link.is_symlink(), "the integrations are installed"


def test_a_way_to_blur_that_is_wrong_fails_or_changes_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, way = CASES["tiny-6x10"].of(torch.float16).inputs(CPU), "blur + sdpa"
    real = PROVIDERS[way].make(inputs, 3.0)

    def held(call: object) -> str | None:
        monkeypatch.setitem(PROVIDERS, way, replace(PROVIDERS[way], make=lambda inputs, sigma: call))
        return device_stages._held(way, inputs, 3.0, 3)["reason"]

    def breaks() -> torch.Tensor:
        raise RuntimeError("misaligned address")

    results = iter([real(), real() * 1.0, real() * 1.001, real()])
    assert held(real) is None
    assert held(lambda: real() * 1.05).startswith("wrong")  # type: ignore[union-attr]
    assert held(lambda: next(results)) == "1 of 3 more calls gave another result"
    assert held(breaks) == "RuntimeError: misaligned address"


def test_ways_to_blur_add_to_one_file_and_a_wrong_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "blur.json"

    def run(way: str) -> int:
        with pytest.raises(typer.Exit) as ended:
            device_stages.blur(way, out, "tiny-6x10", quick=True)
        return ended.value.exit_code

    assert run("auto") == 0
    official = PROVIDERS["sdpa"].make
    monkeypatch.setitem(PROVIDERS, "blur + sdpa", replace(PROVIDERS["blur + sdpa"], make=official))
    assert run("blur + sdpa") == 1
    rows = read_json(out)["rows"]
    assert {(row["way"], row["reason"] is None) for row in rows} == {("auto", True), ("blur + sdpa", False)}
    assert [row["sigma"] for row in rows if row["way"] == "auto"] == ["1", "3", "10", "inf"]


def test_outcomes_of_tests_are_written_as_they_come(tmp_path: Path) -> None:
    outcomes = device_stages._Outcomes(tmp_path / "tests.json", {})

    def report(when: str, outcome: str) -> SimpleNamespace:
        about = {"when": when, "outcome": outcome, "nodeid": "tests/a.py::b", "longreprtext": "assert 1 == 2"}
        return SimpleNamespace(**about, passed=outcome == "passed", failed=outcome == "failed")

    for one in (report("setup", "passed"), report("call", "passed"), report("setup", "skipped")):
        outcomes.pytest_runtest_logreport(one)
    outcomes.pytest_runtest_logreport(report("call", "failed"))
    written = read_json(tmp_path / "tests.json")
    assert (written["passed"], written["failed"], written["skipped"], written["complete"]) == (1, 1, 1, False)
    assert written["failures"] == [{"test": "tests/a.py::b", "message": "assert 1 == 2"}]
    outcomes.pytest_sessionfinish()
    assert read_json(tmp_path / "tests.json")["complete"]


def test_the_backend_of_pytorchs_attention_is_told() -> None:
    assert "flash" in device_stages.attention_backend(CASES["tiny-6x10"].inputs(CPU))


@pytest.mark.slow
def test_the_rehearsal_runs_every_stage(tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks", "device", "--dry", "--out", str(tmp_path)]
    ran = subprocess.run(arguments, capture_output=True, text=True, cwd=device._ROOT)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    summary = read_json(tmp_path / device.SUMMARY)
    assert {row["status"] for row in summary["stages"]} == {PASSED}
    files = {path.name for path in tmp_path.iterdir()}
    expected = ("environment", "blur", "attention", "tune", "tests", "step")
    assert files == {device.SUMMARY, *(f"{name}.json" for name in expected)}
    assert read_json(tmp_path / "tests.json")["passed"] > 3
    assert all(row["reason"] is None for row in read_json(tmp_path / "blur.json")["rows"])
    assert all(row["graph_ms"].startswith("not measured") for row in read_json(tmp_path / "step.json")["rows"])

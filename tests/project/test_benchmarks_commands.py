# SPDX-License-Identifier: Apache-2.0
"""Every command of ``python -m benchmarks`` runs in its smallest form and refuses invalid input."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from benchmarks import compatibility, doc_tables, results
from benchmarks.__main__ import app
from tests.project.benchmark_tools import command

RUN = ("run", "--quick", "--device", "cpu", "--suite")
STEP = "CFG + segkern mid sigma 3"
QUICK: dict[str, tuple[str, ...]] = {
    "run attention": (*RUN, "attention", "--providers", "sdpa,auto"),
    "run infinite": (*RUN, "infinite", "--providers", "sdpa,auto"),
    "run coarse": (*RUN, "coarse", "--providers", "sdpa,stride 2"),
    "run blur": (*RUN, "blur"),
    "run mass": (*RUN, "mass"),
    "run step": (*RUN, "step", "--providers", f"CFG,{STEP}"),
    "host": ("host", "--quick", "--device", "cpu"),
    "tune": ("tune", "--quick"),
    "energy": ("energy", "--quick"),
    "compatibility": ("compatibility",),
    "tables": ("tables",),
}
# These commands are tested elsewhere: they need files, separate processes (test_benchmarks_device.py), or a process
# that does not use Triton's interpreter (tests/kernels/test_compile.py).
ELSEWHERE = {"plot", "compare", "compile", "device"}


SLOW = {"run step", "tune", "energy"}  # other test files cover the functions that these call


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in QUICK])
def test_every_command_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_tables, "ROOT", tmp_path)
    for page in doc_tables.PAGES:
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text("<!-- compiled -->\n<!-- /compiled -->\n", encoding="utf-8")
    if name == "compatibility":
        monkeypatch.setattr(subprocess, "run", pretend_to_test)
    out = tmp_path / ("folder" if name == "energy" else "out.json")
    ran = command(*QUICK[name], *(() if name == "tables" else ("--out", out)))
    assert ran.exit_code == 0, (ran.output, ran.exception)
    assert f"wrote {tmp_path}" in ran.output
    if name.startswith("run"):
        assert command("plot", out).exit_code == 0
    if name == "run step":
        rows = {row["way"]: row for row in results.read_json(out)["rows"]}
        assert all(row["reason"] is None and row["ms"]["median"] > 0 for row in rows.values())
        assert rows["CFG"]["ratio"]["median"] == rows["CFG"]["counted"] == 1.0 < rows[STEP]["counted"] < 1.5
    elif name.startswith("run"):
        reasons = {row["reason"] for row in results.read(out)["rows"]} - {None, "Triton has no CPU target"}
        assert reasons <= {"runs on CUDA only"} or name == "run blur"
        assert command("compare", out, out).exit_code == 0


def pretend_to_test(command: list[str], **options: Any) -> SimpleNamespace:
    """Replace pytest: write the outcomes of a run of one test."""
    if "--compatibility" in command:
        outcomes = {"environment": {"diffusers": "1.2", "commit": "abc"}, "tests": [{"outcome": "passed"}]}
        Path(command[command.index("--compatibility") + 1]).write_text(json.dumps(outcomes), encoding="utf-8")
    return SimpleNamespace(returncode=0, stdout="")


def test_no_command_is_forgotten() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert commands == {name.partition(" ")[0] for name in QUICK} | ELSEWHERE


def test_a_run_with_another_diffusers_than_the_folders_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", pretend_to_test)
    with pytest.raises(ValueError, match=r"ran with diffusers 1\.2, which is not the one in"):
        compatibility.run(tmp_path, tmp_path / "out.json")


@pytest.mark.parametrize(
    "arguments, quoted",
    [
        (("run", "--suite", "stairs"), "'stairs'"),
        (("run", "--cases", "sdxl-9*"), "'sdxl-9*'"),
        (("run", "--dtype", "fp8"), "'fp8'"),
        (("run", "--device", "toaster"), "'toaster'"),
        (("run", "--providers", "magic"), "'magic'"),
        (("run", "--suite", "step", "--providers", "turbo"), "'turbo'"),
        (("run", "--suite", "step", "--dtype", "fp16"), "--dtype cannot be used"),
        (("run", "--suite", "step", "--cases", "tiny-6x10"), "'tiny-6x10'"),
        (("run", "--steps", "3"), "--steps can only be used with --suite step"),
        (("plot", "nowhere.json"), "nowhere.json"),
        (("plot", __file__), "is not a JSON file"),
        (("compare", __file__, "nowhere.json"), "is not a JSON file"),
        (("tune", "--device", "cpu"), "'cpu'"),
        (("compile", "sm_12"), "'sm_12'"),
        (("compile", "--save", "--few"), "--save records everything"),
    ],
)
def test_refusals_are_one_line_that_quotes(arguments: tuple[object, ...], quoted: str) -> None:
    refused = command(*arguments)
    assert refused.exit_code == 2, (refused.output, refused.exception)
    assert refused.stderr.startswith("benchmarks: ")
    assert refused.stderr.count("\n") == 1
    assert quoted in refused.stderr

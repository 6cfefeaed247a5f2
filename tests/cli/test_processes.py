# SPDX-License-Identifier: Apache-2.0
"""Processes that share the images of one command: each image is generated once, and launchers are checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from segkern.generation.demo import PROMPTED
from segkern.generation.pictures import difference
from segkern.generation.processes import Processes
from tests.cli.cli_tools import done, picture, refusal
from tests.cli.test_prompts import NAMES, PROMPTS, SMALL


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def launched(prompts: Path, launcher: Sequence[str], *arguments: object) -> subprocess.Popen[str]:
    """Start two processes."""
    program = [sys.executable, "-m", *launcher, "segkern.cli", "generate", "demo", "--prompts", prompts, *SMALL]
    program += ["--images", 2, "--out", prompts.parent / "out", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [str(word) for word in program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module"]
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_two_processes_draw_each_picture_once_even_if_they_are_killed(launcher: list[str], prompts: Path) -> None:
    out = prompts.parent / "out"
    first = launched(prompts, launcher)
    deadline = time.monotonic() + 120
    while first.poll() is None and not list(out.glob("[0-9]*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if first.poll() is None:
        os.killpg(first.pid, signal.SIGKILL)
    said, _ = first.communicate(timeout=60)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png")}
    assert there, said
    second = launched(prompts, launcher)
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{n}.{end}" for n in NAMES for end in ("png", "json"))
    for name, written in there.items():
        assert (out / name).stat().st_mtime_ns == written, "what is complete is left alone"
    drawn = [line for line in said.splitlines() if line.startswith("wrote")]
    assert len(drawn) == len(NAMES) - len(there)
    assert all("process 1 of 2)" in line or "process 2 of 2)" in line for line in drawn)
    # A single process generates the same images.
    alone = prompts.parent / "alone.png"
    done("generate", "demo", PROMPTED[0].prompt, *SMALL, "--device", "cpu", "--out", alone)
    assert difference(picture(out / "00001-seed-5.png"), picture(alone)) <= 1
    for name in NAMES:
        assert json.loads((out / f"{name}.json").read_text())["prompt"]


@pytest.mark.slow
def test_two_processes_share_batches_and_failures(prompts: Path) -> None:
    prompts.write_bytes(b"a\n" * 7 + b"\xff\n" + b"b\n" * 4)
    run = launched(prompts, TORCHRUN, "--batch-size", 2)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 1, said
    assert "segkern: 1 failed" in said
    written = [line for line in said.splitlines() if line.startswith("wrote")]
    assert len(written) == len(set(written)) == 22
    assert {line.rpartition("process ")[2] for line in written} == {"1 of 2)", "2 of 2)"}
    out = prompts.parent / "out"
    assert len(list(out.iterdir())) == 2 * 22 + 1
    assert json.loads((out / "failures.jsonl").read_text())["line"] == 8


def test_several_processes_do_not_draw_one_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes" in refusal("generate", "demo", "a", *SMALL, "--out", tmp_path / "a.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a")
    said = refusal("generate", "demo", "--prompts", prompts, *SMALL, "--device", "cuda:1", "--out", tmp_path / "out")
    assert "2 processes" in said


@pytest.mark.parametrize(
    "variables, quoted",
    [
        (
            {"WORLD_SIZE": "2"},
            "WORLD_SIZE means 2 processes, but RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a number, got 'two'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE is 2, but WORLD_SIZE is not set"),
        ({"SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "2"}, "SLURM_STEP_NUM_TASKS is 4, but WORLD_SIZE is 2"),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "1"}, "SLURM_STEP_NUM_TASKS is 2"),
        ({"SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}, "WORLD_SIZE means 8 processes"),
        (
            {"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"},
            "RANK 2 and LOCAL_RANK 0 contradict WORLD_SIZE 2",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_launchers_that_contradict_each_other_are_refused(
    variables: dict[str, str], quoted: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    said = refusal("generate", "demo", "--prompts", prompts, *SMALL, "--device", "cpu")
    assert quoted in said
    assert "accelerate launch or torchrun" in said


def two_processes(monkeypatch: pytest.MonkeyPatch, sent: list[object]) -> Processes:
    """Return the main process of two, without a connection."""
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda decision, group: sent.extend(decision))
    processes = Processes("cpu", many=True)
    processes.count = 2
    return processes


def test_whatever_goes_wrong_in_the_first_process_reaches_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def prepare() -> None:
        raise PermissionError("not yours")

    sent: list[object] = []
    with pytest.raises(ValueError, match="not yours"):
        two_processes(monkeypatch, sent).start(tmp_path, prepare)
    assert sent == [None, "not yours"]

    def broadcast(decision: list[object], group: object) -> None:
        raise RuntimeError("Connection closed by peer")

    processes = two_processes(monkeypatch, [])
    monkeypatch.setattr("torch.distributed.broadcast_object_list", broadcast)
    with pytest.raises(ValueError, match="lost the connection to the main process"):
        processes.start(tmp_path, prepare)


def test_a_block_is_claimed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = Processes("cpu", many=True), two_processes(monkeypatch, [])
    assert first.claim(0)
    assert first.claim(0), "a single process has all blocks"
    second.start(tmp_path, lambda: None)
    first._claims = second._claims
    assert [first.claim(0), second.claim(0), second.claim(1), first.claim(1)] == [True, False, True, False]
    second._claims.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="another command uses"):
        second.claim(2)
    second.index, second._claims = 1, None
    monkeypatch.setattr(
        "torch.distributed.broadcast_object_list", lambda decision, group: decision.__setitem__(0, ".elsewhere")
    )
    with pytest.raises(ValueError, match="is not the same folder for all 2 processes"):
        second.start(tmp_path, lambda: None)

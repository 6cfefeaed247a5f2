# SPDX-License-Identifier: Apache-2.0
"""Batches of images: shared by processes, resumed after interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from segkern.generation import prompt_batches
from segkern.generation.demo import PROMPTED
from segkern.generation.drawing import ImageRequest, ImageResult
from segkern.generation.pictures import difference
from tests.cli.cli_tools import done, picture, refusal

PROMPTS = f"{PROMPTED[0].prompt}\n\n  {PROMPTED[1].prompt}  \n"
NAMES = ["00001-seed-5", "00001-seed-6", "00003-seed-5", "00003-seed-6"]
SMALL = ("--width", "48", "--height", "32", "--steps", "2", "--seed", "5")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(PROMPTS, encoding="utf-8")
    return path


def many(prompts: Path, *arguments: object, device: str = "cpu") -> str:
    options = ("--device", device, "--images", 2, "--out", prompts.parent / "out")
    return done("generate", "demo", "--prompts", prompts, *SMALL, *options, *arguments)


def files(prompts: Path) -> dict[str, int]:
    """Return the files in the folder with their modification times."""
    return {path.name: path.stat().st_mtime_ns for path in (prompts.parent / "out").iterdir()}


def test_each_prompt_and_seed_is_a_picture_and_a_record(prompts: Path) -> None:
    output = many(prompts)
    assert "00003-seed-6.png (4 of 4)" in output
    assert sorted(files(prompts)) == sorted(f"{name}.{end}" for name in NAMES for end in ("png", "json"))
    out = prompts.parent / "out"
    single = prompts.parent / "single.png"
    done("generate", "demo", PROMPTED[1].prompt, *SMALL, "--device", "cpu", "--out", single)
    assert difference(picture(out / "00003-seed-5.png"), picture(single)) == 0
    assert dict(picture(out / "00003-seed-5.png").text) == dict(picture(single).text)
    record = json.loads((out / "00001-seed-6.json").read_text())
    assert (record["prompt"], record["seed"], record["seg_sigma"]) == (PROMPTED[0].prompt, 6, "inf")
    assert record["seconds"] > 0
    assert record["guidance_report"]["layers"][0]["fired"] == 2
    assert record["guidance_report"]["specs"][0]["sigma"] == "inf"


def test_an_interrupted_run_goes_on_where_it_was(prompts: Path) -> None:
    many(prompts)
    out, before = prompts.parent / "out", files(prompts)
    (out / "00001-seed-5.png").unlink()
    (out / "00003-seed-5.json").unlink()
    (out / "00003-seed-6.png").write_bytes(b"half a picture")
    (out / ".00001-seed-5.123.png").write_bytes(b"what a killed run leaves")
    (out / ".my-seed-list.txt").write_bytes(b"what is the user's own")
    output = many(prompts)
    assert output.count("wrote") == 2
    (out / ".my-seed-list.txt").unlink()
    after = files(prompts)
    assert after.keys() == before.keys()
    drawn = {name for name in after if after[name] != before[name]}
    assert drawn == {f"{name}.{end}" for name in ("00001-seed-5", "00003-seed-6") for end in ("png", "json")} | {
        "00003-seed-5.json"
    }
    assert "already" in many(prompts)
    assert files(prompts) == after


def test_pictures_with_other_settings_are_not_taken_for_these(prompts: Path) -> None:
    many(prompts)
    before = files(prompts)
    options = ("--device", "cpu", "--images", 2, "--out", prompts.parent / "out")
    said = refusal("generate", "demo", "--prompts", prompts, *SMALL, *options, "--sigma", 4)
    assert "00001-seed-5.png has seg_sigma 'inf', not '4'" in said
    assert files(prompts) == before
    assert many(prompts, "--sigma", 4, "--overwrite").count("wrote") == 4
    assert picture(prompts.parent / "out" / "00001-seed-5.png").text["seg_sigma"] == "4"


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (("generate", "demo"), "a prompt is missing"),
        (("generate", "demo", "a", "--prompts", "FILE"), "use either a prompt or --prompts, not both"),
        (("generate", "demo", "a", "--images", 2), "--images 2 needs --prompts"),
        (("generate", "demo", "--prompts", "FILE", "--compare"), "not both"),
        (("generate", "demo", "--prompts", "nowhere.txt"), "no file 'nowhere.txt'"),
        (("generate", "demo", "--prompts", "EMPTY"), "contains no prompts"),
        (("generate", "demo", "--prompts", "LATIN"), "not UTF-8 text"),
        (("generate", "demo", "--prompts", "FILE", *SMALL, "--device", "cpu", "--out", "FILE"), "is a file"),
        (("generate", "demo", "--prompts", "FILE", *SMALL, "--device", "cpu", "--out", "a/b"), "does not exist"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    arguments: tuple[object, ...], quoted: str, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prompts.parent)
    (prompts.parent / "empty.txt").write_text(" \n\n")
    (prompts.parent / "latin.txt").write_bytes("grün".encode("latin-1"))
    named = {"FILE": prompts.name, "EMPTY": "empty.txt", "LATIN": "latin.txt"}
    assert quoted in refusal(*(named.get(str(word), word) for word in arguments))
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["empty.txt", "latin.txt", "prompts.txt"]


def launched(prompts: Path, *arguments: object) -> subprocess.Popen[str]:
    """Start ``accelerate launch`` with two processes."""
    program = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    program += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--module", "segkern.cli"]
    program += ["generate", "demo", "--prompts", prompts, *SMALL, "--images", 2, "--out", prompts.parent / "out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        [str(word) for word in (*program, *arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_two_processes_draw_each_picture_once_even_if_they_are_killed(prompts: Path) -> None:
    out = prompts.parent / "out"
    first = launched(prompts)
    deadline = time.monotonic() + 120
    while first.poll() is None and not list(out.glob("[0-9]*.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    if first.poll() is None:
        os.killpg(first.pid, signal.SIGKILL)
    said, _ = first.communicate(timeout=60)
    there = {path.name: path.stat().st_mtime_ns for path in out.glob("[0-9]*.png")}
    assert there, said
    second = launched(prompts)
    said, _ = second.communicate(timeout=240)
    assert second.returncode == 0, said
    assert sorted(path.name for path in out.iterdir()) == sorted(f"{n}.{end}" for n in NAMES for end in ("png", "json"))
    for name, written in there.items():
        assert (out / name).stat().st_mtime_ns == written, "what is complete is left alone"
    drawn = [line for line in said.splitlines() if line.startswith("wrote")]
    assert len(drawn) == len(NAMES) - len(there)
    # A single process generates the same images.
    alone = prompts.parent / "alone.png"
    done("generate", "demo", PROMPTED[0].prompt, *SMALL, "--device", "cpu", "--out", alone)
    assert difference(picture(out / "00001-seed-5.png"), picture(alone)) <= 1
    for name in NAMES:
        assert json.loads((out / f"{name}.json").read_text())["prompt"]


def test_several_processes_do_not_draw_one_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "2 processes" in refusal("generate", "demo", "a", *SMALL, "--out", tmp_path / "a.png")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a")
    said = refusal("generate", "demo", "--prompts", prompts, *SMALL, "--device", "cuda:1", "--out", tmp_path / "out")
    assert "2 processes" in said


def test_a_picture_that_could_not_be_written_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(image: Image.Image, path: Path, details: object) -> None:
        path.write_bytes(b"half a picture")
        raise OSError("no space left")

    monkeypatch.setattr(prompt_batches.pictures, "save", half)
    item = prompt_batches.BatchItem("00001-seed-1", ImageRequest("a", "", 8, 8, 1, 1, 1.0))
    with pytest.raises(OSError, match="no space left"):
        prompt_batches.write(tmp_path, item, ImageResult(Image.new("RGB", (8, 8)), None, 1.0), {})
    assert list(tmp_path.iterdir()) == []


class Group:
    """Stand-in for a group of two processes, seen from the main process."""

    is_main_process = True
    left = False

    def destroy_process_group(self) -> None:
        self.left = True


def test_whatever_goes_wrong_in_the_first_process_reaches_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", sent.extend)
    processes = prompt_batches.Processes("cpu", many=True)
    processes._state = group = Group()

    def decide() -> list[prompt_batches.BatchItem]:
        raise PermissionError("not yours")

    with pytest.raises(ValueError, match="not yours"):
        processes.share(decide)
    assert sent == [None, "not yours"]
    assert group.left

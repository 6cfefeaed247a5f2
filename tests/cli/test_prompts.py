# SPDX-License-Identifier: Apache-2.0
"""Many images in a folder: batches, failures, resumed after interruptions."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from segkern.cli.many_images import first_prompts
from segkern.generation import engine
from segkern.generation.demo import PROMPTED
from segkern.generation.drawing import ImageRequest, ImageResult
from segkern.generation.engine import Job
from segkern.generation.image_folder import ImageFolder
from segkern.generation.pictures import difference
from segkern.generation.prompt_files import count_rows, read_rows
from segkern.generation.storage import LocalFolder
from tests.cli.cli_tools import done, picture, refusal, segkern

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
    (out / ".claims-1234").mkdir()
    (out / ".claims-1234" / "0").touch()
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
        (("generate", "demo", "a", "--batch-size", 2), "--batch-size 2 needs --prompts"),
        (("generate", "demo", "--prompts", "FILE", "--batch-size", "0"), "--batch-size must be auto or an integer"),
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


@pytest.mark.parametrize("batch_size", ["3", "auto"])
def test_batches_of_uneven_prompts(batch_size: str, prompts: Path) -> None:
    rows = [
        {"prompt": PROMPTED[0].prompt},
        {"prompt": PROMPTED[1].prompt, "width": 32, "sigma": 2, "seed": 9},
        {"prompt": PROMPTED[1].prompt, "sigma": "inf", "negative_prompt": PROMPTED[0].prompt},
        {"prompt": PROMPTED[1].prompt, "scale": 1.5, "steps": 1, "guidance_scale": 1},
    ]
    file = prompts.with_suffix(".jsonl")
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = prompts.parent / "out"
    options = ("--device", "cpu", "--images", 2, "--out", out, "--batch-size", batch_size)
    done("generate", "demo", "--prompts", file, *SMALL, *options)
    names = [
        f"0000{line}-seed-{seed}" for line, first in ((1, 5), (2, 9), (3, 5), (4, 5)) for seed in (first, first + 1)
    ]
    assert sorted(files(prompts)) == sorted(f"{name}.{end}" for name in names for end in ("png", "json"))
    single = prompts.parent / "single.png"
    own = ("--width", "32", "--height", "32", "--steps", "2", "--seed", "10", "--sigma", 2)
    done("generate", "demo", PROMPTED[1].prompt, *own, "--device", "cpu", "--out", single)
    assert difference(picture(out / "00002-seed-10.png"), picture(single)) < 0.1
    assert dict(picture(out / "00002-seed-10.png").text) == dict(picture(single).text)
    record = json.loads((out / "00004-seed-6.json").read_text())
    assert (record["seg_scale"], record["steps"], record["guidance_scale"]) == (1.5, 1, 1)
    assert (record["guidance_report"]["forwards"], record["guidance_report"]["layers"][0]["fired"]) == (1, 1)


def test_words_of_prompts_and_negative_prompts_are_checked(prompts: Path) -> None:
    file = prompts.with_suffix(".jsonl")
    file.write_text('{"prompt": "a", "negative_prompt": "b"}\n[\n{"prompt": "c"}\n', encoding="utf-8")
    assert list(first_prompts(str(file))) == ["a", "b", "c"]


def test_failures_are_listed_and_tried_again(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw_batch(pipe: Any, requests: Sequence[ImageRequest], *arguments: Any) -> Any:
        if any(request.seed == 6 for request in requests):
            raise RuntimeError("a bad seed")
        return original(pipe, requests, *arguments)

    out, file = prompts.parent / "out", prompts.with_suffix(".jsonl")
    lines = [
        "{}",
        '{"prompt": "a", "width": 9}',
        '{"prompt": 1}',
        '{"prompt": "a", "size": 1}',
        "[",
        "grün",
    ]
    content = [b'{"prompt": "a"}', *(line.encode("latin-1") for line in lines)]
    file.write_bytes(b"\n".join([*content, b'{"prompt": "b"}']))
    command = ("generate", "demo", "--prompts", file, *SMALL, "--device", "cpu", "--images", 2, "--out", out)
    original = engine.draw_batch
    with monkeypatch.context() as patch:
        patch.setattr(engine, "draw_batch", draw_batch)
        result = segkern(*command, "--batch-size", 4)
    assert result.exit_code == 1, result.exception
    assert f"segkern: 8 failed; see {out / 'failures.jsonl'}" in result.stderr
    records = [json.loads(line) for line in (out / "failures.jsonl").read_text(encoding="utf-8").splitlines()]
    failed = {record.get("name") or record["line"]: record["reason"] for record in records}
    assert failed.pop("00001-seed-6") == failed.pop("00008-seed-6") == "RuntimeError: a bad seed"
    reasons = {
        2: "with a prompt",
        3: "width must be",
        4: "must be str",
        5: "'size'",
        6: "not valid JSON",
        7: "not UTF-8",
    }
    assert failed.keys() == reasons.keys()
    assert all(reason in failed[line] for line, reason in reasons.items())
    assert sorted(path.stem for path in out.glob("*.png")) == ["00001-seed-5", "00008-seed-5"]
    result = segkern(*command)
    assert result.exit_code == 1
    assert "00008-seed-6" not in (out / "failures.jsonl").read_text(encoding="utf-8")
    assert len(list(out.glob("*.png"))) == 4


def on_a_full_disk(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content[:10])
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_the_run(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "write_bytes", on_a_full_disk)
    out = prompts.parent / "out"
    result = segkern("generate", "demo", "--prompts", prompts, *SMALL, "--device", "cpu", "--out", out)
    assert result.exit_code == 1, result.exception
    assert "segkern: stopped: [Errno 28] No space left on device; repeat the command" in result.stderr
    assert list(out.iterdir()) == []


def test_prompts_are_read_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    with path.open("w", encoding="utf-8") as file:
        file.writelines("a fox\n" for _ in range(100_000))
    tracemalloc.start()
    try:
        assert count_rows(path) == 100_000
        assert sum(row.settings["prompt"] == "a fox" for row in read_rows(path)) == 100_000
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 1_000_000


def test_a_picture_that_could_not_be_written_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(ImageRequest("a", "", 8, 8, 1, 1, 1.0), (), "00001-seed-1")
    images = ImageFolder(LocalFolder(tmp_path), lambda job: {}, False)
    monkeypatch.setattr(Path, "write_bytes", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"):
        images.write(job, ImageResult(Image.new("RGB", (8, 8)), None, 1.0))
    assert list(tmp_path.iterdir()) == []

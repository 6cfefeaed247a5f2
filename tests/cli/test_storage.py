# SPDX-License-Identifier: Apache-2.0
"""Prompt files and output folders in object stores, Parquet files, and shards."""

from __future__ import annotations

import json
import sys
import tarfile
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import fsspec
import pytest
import typer
from PIL import Image

from segkern.cli.app import app
from segkern.generation import loading
from segkern.generation.cluster import read_blocks
from segkern.generation.drawing import ImageRequest, ImageResult
from segkern.generation.engine import Job
from segkern.generation.image_folder import ImageFolder, OtherSettingsError
from segkern.generation.prompt_files import Row, count_rows, read_rows
from segkern.generation.shards import Shards, check_layout
from segkern.generation.storage import Folder, LocalFolder, open_folder
from tests.cli.cli_tools import done, refusal, segkern
from tests.cli.test_prompts import NAMES, PROMPTS, SMALL

REQUEST = ImageRequest("a red fox", "", 8, 8, 1, 2, 5.0)
RESULT = ImageResult(Image.new("RGB", (8, 8), "red"), None, 1.0)


@pytest.fixture
def bucket() -> Iterator[str]:
    """URL of an empty folder in fsspec's object store in memory."""
    url = f"memory://{uuid.uuid4().hex}"
    yield url
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(url):
        filesystem.rm(url, recursive=True)


def objects(url: str) -> list[str]:
    return sorted(path.rpartition("/")[2] for path in fsspec.filesystem("memory").ls(url, detail=False))


def metadata(job: Job) -> dict[str, object]:
    return {"seed": job.request.seed, "guidance_scale": job.request.guidance_scale}


def job(seed: int) -> Job:
    return Job(replace(REQUEST, seed=seed), (), f"00001-seed-{seed}")


def test_prompts_and_images_in_an_object_store(bucket: str) -> None:
    with fsspec.open(f"{bucket}/prompts.txt", "w") as file:
        file.write(PROMPTS)
    out = f"{bucket}/out"
    command = ("generate", "demo", "--prompts", f"{bucket}/prompts.txt", *SMALL, "--images", 2, "--device", "cpu")
    assert f"wrote {out}/00003-seed-6.png (4)" in done(*command, "--out", out)
    assert objects(out) == sorted(f"{name}.{end}" for name in NAMES for end in ("png", "json"))
    fsspec.filesystem("memory").rm(f"{out}/00001-seed-5.png")
    assert done(*command, "--out", out).count("wrote") == 1
    assert "already contains all images" in done(*command, "--out", out)
    with fsspec.open(f"{bucket}/prompts.txt", "ab") as file:
        file.write(b"\xff\n")
    result = segkern(*command, "--out", out)
    assert result.exit_code == 1
    assert json.loads(fsspec.filesystem("memory").cat(f"{out}/failures.jsonl"))["line"] == 4


@pytest.mark.parametrize(
    ("arguments", "quoted"),
    [
        (("a", "--out", "memory://a/a.png"), "is a URL, which needs --prompts"),
        (("a", "--ray"), "--ray needs --prompts"),
        (("--prompts", "FILE", "--shards", 3), "--shards 3 needs --ray"),
        (("--prompts", "memory://nowhere/a.txt"), "cannot read --prompts 'memory://nowhere/a.txt'"),
        (("--prompts", "unknown://a.txt"), "cannot read --prompts 'unknown://a.txt'"),
        (("--prompts", "FILE", *SMALL, "--device", "cpu", "--out", "unknown://a"), "cannot use --out 'unknown://a'"),
        (("--prompts", "s3://a/a.txt"), "cannot read --prompts 's3://a/a.txt': Install s3fs"),
        (
            ("--prompts", "FILE", *SMALL, "--device", "cpu", "--out", "s3://a"),
            "cannot use --out 's3://a': Install s3fs",
        ),
    ],
)
def test_unusable_locations_are_refused(
    arguments: tuple[object, ...], quoted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    (tmp_path / "a.txt").write_text("a")
    assert quoted in refusal("generate", "demo", *(tmp_path / "a.txt" if a == "FILE" else a for a in arguments))


def test_an_unfinished_upload_is_not_an_image(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe_file(self: object, path: str, content: bytes, **options: object) -> None:
        raise RuntimeError("the connection was lost")

    images = ImageFolder(open_folder(bucket), metadata, False)
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("memory")), "pipe_file", pipe_file)
        with pytest.raises(OSError, match="RuntimeError: the connection was lost"):
            images.write(job(1), RESULT)
    assert not images.contains(job(1))


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path, bucket: str) -> Folder:
    return open_folder(str(tmp_path) if request.param == "local" else bucket)


def shard_of(folder: Folder, tmp_path: Path) -> dict[str, bytes]:
    """Return the files in the first shard. A name that occurs twice is an error."""
    folder.download("shard-000000.tar", tmp_path / "copy.tar")
    with tarfile.open(tmp_path / "copy.tar") as tar:
        names = tar.getnames()
        assert len(names) == len(set(names))
        return {name: tar.extractfile(name).read() for name in names}


def test_a_shard_has_an_image_and_a_record_per_sample(folder: Folder, tmp_path: Path) -> None:
    shards = Shards(folder, metadata, False)
    with shards.block(0) as shard:
        for seed in (1, 2):
            assert not shard.contains(job(seed))
            shard.write(job(seed), RESULT)
        assert folder.read("shard-000000.tar") is None, "a shard is written when it is complete"
    files = shard_of(folder, tmp_path)
    assert list(files) == ["00001-seed-1.png", "00001-seed-1.json", "00001-seed-2.png", "00001-seed-2.json"]
    assert json.loads(files["00001-seed-2.json"])["seed"] == 2
    assert files["00001-seed-1.png"].startswith(b"\x89PNG")
    # A resumed run adds the image that failed before.
    with shards.block(0) as shard:
        assert [shard.contains(job(seed)) for seed in (1, 2, 3)] == [True, True, False]
        shard.write(job(3), RESULT)
    assert {name.partition(".")[0] for name in shard_of(folder, tmp_path)} == {f"00001-seed-{s}" for s in (1, 2, 3)}
    records = [json.loads(line)["name"] for line in folder.read("shard-000000.jsonl").splitlines()]
    assert sorted(records) == [f"00001-seed-{seed}" for seed in (1, 2, 3)]


def test_an_interrupted_shard_is_not_written(folder: Folder) -> None:
    def interrupted() -> None:
        with Shards(folder, metadata, False).block(0) as shard:
            shard.write(job(1), RESULT)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert folder.read("shard-000000.tar") is None
    with Shards(folder, metadata, False).block(0) as shard:
        assert not shard.contains(job(1))


def test_shards_with_other_settings_are_kept(folder: Folder, tmp_path: Path) -> None:
    with Shards(folder, metadata, False).block(0) as shard:
        shard.write(job(1), RESULT)
    other = replace(job(1), request=replace(job(1).request, guidance_scale=2.0))
    with Shards(folder, metadata, False).block(0) as shard, pytest.raises(OtherSettingsError, match="guidance_scale"):
        shard.contains(other)
    with Shards(folder, metadata, True).block(0) as shard:
        assert not shard.contains(other)
        shard.write(other, RESULT)
    assert json.loads(shard_of(folder, tmp_path)["00001-seed-1.json"])["guidance_scale"] == 2.0


def test_the_number_of_lines_per_shard_stays(folder: Folder) -> None:
    check_layout(folder, 3)
    check_layout(folder, 3)
    with pytest.raises(OtherSettingsError, match="images of 3 lines, not 4"):
        check_layout(folder, 4)


def test_a_full_disk_leaves_the_earlier_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copyfile(source: Path, target: Path) -> None:
        target.write_bytes(b"half a shard")
        raise OSError(28, "No space left on device")

    def add(seed: int) -> None:
        with Shards(LocalFolder(tmp_path), metadata, False).block(0) as shard:
            shard.write(job(seed), RESULT)

    monkeypatch.setattr("shutil.copyfile", copyfile)
    with pytest.raises(OSError, match="No space left"):
        add(1)
    assert list(tmp_path.iterdir()) == []


def test_lines_of_a_cluster_are_read_as_needed() -> None:
    read = 0

    def rows() -> Iterator[Row]:
        nonlocal read
        while True:
            read += 1
            yield Row(read, {"prompt": "a"})

    blocks = read_blocks(rows(), 5)
    assert [(block.number, [row.number for row in block.rows]) for block in (next(blocks), next(blocks))] == [
        (0, [1, 2, 3, 4, 5]),
        (1, [6, 7, 8, 9, 10]),
    ]
    assert read == 10


@pytest.mark.parametrize(
    ("words", "address"),
    [(("--ray",), ""), (("--ray", "HOST:1"), "HOST:1"), (("--ray", "--steps", "1"), ""), ((), None)],
)
def test_the_address_of_a_cluster_is_optional(words: tuple[str, ...], address: str | None) -> None:
    group: Any = typer.main.get_command(app)
    with click.Context(group) as context:
        command = group.get_command(context, "generate")
        assert command.make_context("generate", ["demo", *words], parent=context).params["ray"] == address


def test_a_missing_ray_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(loading, "missing_packages", lambda *packages: list(packages))
    said = refusal("generate", "demo", "--prompts", tmp_path / "a.txt", "--ray")
    assert said == 'segkern: ray is not installed; pip install "segkern[cluster]"\n'


class TestParquet:
    """Rows of Parquet files."""

    @pytest.fixture
    def write(self, tmp_path: Path) -> Any:
        """A function that writes columns to a Parquet file and returns its path."""
        pytest.importorskip("pyarrow", reason="pyarrow is not installed; make test-cluster installs it")
        import pyarrow
        import pyarrow.parquet

        def write(columns: dict[str, list[Any]], **options: Any) -> str:
            pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet", **options)
            return str(tmp_path / "rows.parquet")

        return write

    def test_columns_are_settings_and_nulls_are_defaults(self, write: Any) -> None:
        path = write(
            {
                "prompt": ["a", "b", None],
                "seed": [5.0, float("nan"), 1.0],
                "sigma": [None, 2.0, 1.0],
                "width": [64, None, 32],
            }
        )
        assert count_rows(path) == 3
        first, second, third = read_rows(path)
        assert (first.number, first.settings) == (1, {"prompt": "a", "seed": 5, "width": 64})
        assert (second.number, second.settings) == (2, {"prompt": "b", "sigma": 2.0})
        assert (third.number, third.error) == (3, "the prompt is missing")

    def test_wrong_types_are_errors_of_their_row(self, write: Any) -> None:
        first, second = read_rows(write({"prompt": ["a", "b"], "seed": [1.5, 2.0]}))
        assert first.error == "seed must be int, got 1.5"
        assert second.settings["seed"] == 2

    @pytest.mark.parametrize(
        ("columns", "quoted"),
        [({"text": ["a"]}, "no column prompt, but text"), ({"prompt": ["a"], "sead": [1]}, "unknown column 'sead'")],
    )
    def test_unknown_columns_are_refused(self, columns: dict[str, list[Any]], quoted: str, write: Any) -> None:
        assert quoted in refusal("generate", "demo", "--prompts", write(columns))

    def test_other_files_are_refused(self, write: Any, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_text("a red fox")
        assert "is not a Parquet file" in refusal("generate", "demo", "--prompts", tmp_path / "a.parquet")

    def test_row_groups_are_read_as_needed(self, write: Any) -> None:
        import pyarrow

        path = write({"prompt": [f"a fox with {number} trees" for number in range(200_000)]}, row_group_size=2000)
        rows, before = read_rows(path), pyarrow.total_allocated_bytes()
        assert next(rows).settings["prompt"] == "a fox with 0 trees"
        assert pyarrow.total_allocated_bytes() - before < 2_000_000
        assert sum(1 for _ in rows) == 199_999

    def test_images_of_a_parquet_file(self, write: Any, tmp_path: Path) -> None:
        path = write({"prompt": ["a", "b"], "seed": [3, None], "sigma": ["inf", "2"]})
        done("generate", "demo", "--prompts", path, *SMALL, "--device", "cpu", "--out", tmp_path / "out")
        names = sorted(file.name for file in (tmp_path / "out").glob("*.json"))
        assert names == ["00001-seed-3.json", "00002-seed-5.json"]
        assert json.loads((tmp_path / "out" / names[1]).read_text())["seg_sigma"] == "2"

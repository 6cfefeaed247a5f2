# SPDX-License-Identifier: Apache-2.0
"""Images of a Ray cluster of two nodes are those of one process, even if nodes, workers and images fail."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from segkern.generation import cluster as cluster_module
from segkern.generation import engine
from segkern.generation.cluster_worker import Worker
from segkern.generation.pictures import difference
from segkern.generation.vocabulary import NAMES
from tests.cli.cli_tools import done, picture, segkern

ray = pytest.importorskip("ray", reason="ray is not installed; make test-cluster installs it")

from ray.cluster_utils import Cluster  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

SMALL = ("--width", "48", "--height", "32", "--steps", "2", "--device", "cpu", "--batch-size", "4")
DEADLY = "a prompt that ends its process"
ROWS = [{"prompt": name} for name in json.loads(NAMES.read_text(encoding="utf-8"))["drawings"][:24]]


class FragileWorker(Worker):
    """A worker whose process ends if it generates an image of the deadly prompt."""

    def load(self) -> str:
        original = engine.draw_batch

        def draw_batch(pipe: Any, requests: Any, *arguments: Any) -> Any:
            if any(request.prompt == DEADLY for request in requests):
                os._exit(1)
            return original(pipe, requests, *arguments)

        module: Any = engine
        module.draw_batch = draw_batch
        return super().load()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A cluster with two nodes, whose workers also find this module."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    options = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**options, "include_dashboard": False})
    cluster.add_node(**options)
    yield cluster
    cluster.shutdown()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def images(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("[0-9]*.png"))


def test_a_lost_node_and_failing_images_do_not_affect_others(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*ROWS[:10], {"prompt": DEADLY}, *ROWS[10:20], {"prompt": "fox", "width": 9}, *ROWS[20:]]
    prompts, out, alone = write_rows(tmp_path / "a.jsonl", rows), tmp_path / "out", tmp_path / "alone"
    lost = threading.Event()

    def lose_a_node() -> None:
        while not lost.is_set() and len(images(out)) < 6:
            time.sleep(0.05)
        nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)

    monkeypatch.setattr(cluster_module, "Worker", FragileWorker)
    thread = threading.Thread(target=lose_a_node)
    thread.start()
    result = segkern("generate", "demo", "--prompts", prompts, *SMALL, "--out", out, "--ray", nodes.address)
    lost.set()
    thread.join()
    assert result.exit_code == 1, (result.output, result.exception)
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert sorted(failure.get("name", failure.get("line")) for failure in failures if "name" in failure) == [
        "00011-seed-1"
    ]
    assert "2 workers were lost with this image" in next(f["reason"] for f in failures if "name" in f)
    assert [failure["line"] for failure in failures if "line" in failure] == [22]
    assert "segkern: 2 failed" in result.stderr
    assert "the bundled model does not know the words " in result.stderr

    wrote = [line.split()[1] for line in result.stdout.splitlines() if line.startswith("wrote")]
    assert len(wrote) == len(set(wrote)), "each image is printed once"
    done("generate", "demo", "--prompts", write_rows(tmp_path / "b.jsonl", ROWS), *SMALL, "--out", alone)
    expected = {picture(alone / name).text["prompt"]: picture(alone / name) for name in images(alone)}
    assert len(expected) == len(ROWS) == len(images(out))
    assert {path.name for path in out.iterdir()} == {
        *images(out),
        *(name.replace(".png", ".json") for name in images(out)),
        "failures.jsonl",
    }
    for name in images(out):
        image = picture(out / name)
        assert dict(image.text) == dict(expected[image.text["prompt"]].text)
        assert difference(image, expected[image.text["prompt"]]) <= 1


def test_shards_of_a_cluster(nodes: Cluster, tmp_path: Path) -> None:
    prompts, out = write_rows(tmp_path / "a.jsonl", ROWS[:5]), tmp_path / "out"
    command = ("generate", "demo", "--prompts", prompts, *SMALL, "--out", out, "--ray", nodes.address, "--shards", 2)
    assert f"wrote {out / 'shard-000002.tar'}" in done(*command)
    files = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                assert name not in files
                files[name] = tar.extractfile(name).read()
    names = [f"0000{line}-seed-1" for line in range(1, 6)]
    assert sorted(files) == sorted(f"{name}.{end}" for name in names for end in ("png", "json"))
    single = tmp_path / "single.png"
    done("generate", "demo", ROWS[4]["prompt"], *SMALL[:-2], "--out", single)
    assert difference(Image.open(io.BytesIO(files["00005-seed-1.png"])), picture(single)) <= 1
    (out / "shard-000001.jsonl").unlink()
    output = done(*command)
    assert output.count("wrote") == 1
    assert "shard-000001.tar" in output


def test_an_image_that_ends_its_worker_is_listed_if_there_is_one_node(
    nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for node in nodes.worker_nodes.copy():
        nodes.remove_node(node, allow_graceful=False)
    prompts, out = write_rows(tmp_path / "a.jsonl", [{"prompt": DEADLY}, *ROWS[:3]]), tmp_path / "out"
    monkeypatch.setattr(cluster_module, "Worker", FragileWorker)
    result = segkern("generate", "demo", "--prompts", prompts, *SMALL, "--out", out, "--ray", nodes.address)
    assert result.exit_code == 1, (result.output, result.exception)
    assert "segkern: 1 failed" in result.stderr
    assert images(out) == [f"0000{line}-seed-1.png" for line in (2, 3, 4)]

# SPDX-License-Identifier: Apache-2.0
"""The ``--ray`` option of ``segkern generate``: many images on the machines of a Ray cluster."""

from __future__ import annotations

import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import typer

from segkern.cli.many_images import Tally
from segkern.cli.terminal import CountProgress, fail, refusing, warn
from segkern.generation.cluster import (
    Block,
    ClusterError,
    WorkerPool,
    connected,
    count_workers,
    read_blocks,
    uses_gpus,
)
from segkern.generation.cluster_worker import MARKER, WorkerPlan
from segkern.generation.engine import BatchSize, largest_batch
from segkern.generation.image_folder import OtherSettingsError
from segkern.generation.prompt_files import read_rows
from segkern.generation.row_jobs import RowSettings
from segkern.generation.shards import check_layout, shard_name
from segkern.generation.storage import is_url, open_folder

_BATCHES = 4  # per block, at most; with several batches, images of different sizes still share batches
_BLOCKS = 8  # per worker, at least, so that workers finish at about the same time


def generate_on_cluster(
    address: str,
    prompts: str,
    out: str,
    settings: RowSettings,
    *,
    model: str,
    config: str | None,
    dtype: str,
    device: str,
    batch_size: BatchSize,
    rows: int | None,
    shards: int | None,
    overwrite: bool,
) -> None:
    """Generate the missing images of a prompt file, and exit with code 1 if an image failed.

    Args:
        address: Address of the cluster; empty to start one.
        prompts: Path or URL of the prompt file.
        out: Output folder or URL.
        settings: Settings of the images.
        model: Model, as on the command line.
        config: Configuration of a single file.
        dtype: Value of ``--dtype``.
        device: Value of ``--device``.
        batch_size: Images per batch.
        rows: Number of lines; None if it is unknown.
        shards: Images per shard; None for two files per image.
        overwrite: Whether to replace images with other settings.
    """
    images = settings.images
    out = out if is_url(out) else str(Path(out).expanduser().absolute())
    token = secrets.token_hex(8)
    with ExitStack() as stack:
        with refusing():
            folder = open_folder(out)
            folder.prepare()
            if shards is not None:
                check_layout(folder, _lines(shards, images))
            folder.write(MARKER, token.encode())
            stack.callback(folder.remove, MARKER)
            stack.enter_context(connected(address))
            on_gpu = uses_gpus(device)
            workers = count_workers(on_gpu)
        plan = WorkerPlan(
            model=_absolute(model),
            config=None if config is None else _absolute(config),
            dtype=dtype,
            on_gpu=on_gpu,
            settings=settings,
            batch_size=batch_size,
            out=out,
            token=token,
            overwrite=overwrite,
            sharded=shards is not None,
        )
        total = None if rows is None else rows * images
        lines = _lines(shards, images) if shards else _lines_per_block(batch_size, on_gpu, workers, total, images)
        tally = Tally(folder, total)
        pool = WorkerPool(plan, read_blocks(read_rows(prompts), lines), warn)
        with CountProgress(total, lines=shards is not None) as progress:
            try:
                for item in pool.run():
                    _show(item, tally, progress, plan.sharded)
            except OtherSettingsError as error:
                fail(error)
            except (ClusterError, OSError) as error:
                if isinstance(error, ClusterError) and not tally.done:
                    fail(error)
                raise tally.stop(error) from None
        tally.finish()
    tally.conclude(tally.written, tally.failed)
    if tally.failed:
        raise typer.Exit(1)


def _show(item: Any, tally: Tally, progress: CountProgress, sharded: bool) -> None:
    """Count the images of an event or of a complete shard, and print what was written."""
    if not isinstance(item, Block):
        progress.advance(item.images)
        if not sharded:
            tally.add(item)
        return
    if sharded:
        for event in item.events.values():
            tally.add(event, show=False)
        if any(event.kind == "written" for event in item.events.values()):
            tally.print(f"{shard_name(item.number)}.tar")


def _lines(images: int, images_per_line: int) -> int:
    """Return the number of lines with at least this number of images."""
    return -(-images // images_per_line)


def _lines_per_block(batch_size: BatchSize, on_gpu: bool, workers: int, total: int | None, images_per_line: int) -> int:
    """Return the number of lines in a block. As far as possible, their images fill whole batches."""
    batch = largest_batch(batch_size, "cuda" if on_gpu else "cpu")
    batches = _BATCHES if total is None else min(max(1, total // (_BLOCKS * workers * batch)), _BATCHES)
    return max(1, batches * batch // images_per_line)


def _absolute(location: str) -> str:
    """Return the absolute path of a file or folder, because workers have another working directory."""
    path = Path(location).expanduser()
    return str(path.absolute()) if location != "demo" and path.exists() else location

# SPDX-License-Identifier: Apache-2.0
"""WebDataset shards: tar files with ``NAME.png`` and ``NAME.json`` for each image.

A shard contains the images of a fixed number of lines, so its name tells which images it contains. It is written when
all of its images are generated. ``shard-000000.jsonl`` lists the records of ``shard-000000.tar`` and is written last.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from segkern.generation import pictures
from segkern.generation.drawing import ImageResult
from segkern.generation.engine import Job
from segkern.generation.image_folder import Metadata, OtherSettingsError, Target, image_record, is_same, to_json
from segkern.generation.storage import Folder

_LAYOUT = "shards.json"


def check_layout(folder: Folder, lines: int) -> None:
    """Record the number of lines per shard in a folder, or compare it with that of earlier runs.

    Raises:
        OtherSettingsError: If the folder contains shards with another number of lines.
    """
    content = folder.read(_LAYOUT)
    if content is None:
        folder.write(_LAYOUT, to_json({"lines_per_shard": lines}))
        return
    present = json.loads(content)["lines_per_shard"]
    if present != lines:
        raise OtherSettingsError(
            f"{folder.place(_LAYOUT)}: shards have the images of {present} lines, not {lines}; use the same --shards "
            f"and --images, or another --out"
        )


def shard_name(number: int) -> str:
    """Return the name of a shard without suffix."""
    return f"shard-{number:06d}"


class Shards:
    """A folder of shards.

    Args:
        folder: The folder.
        metadata: Function that returns the settings of a job by name.
        overwrite: Whether to replace images with other settings.
    """

    def __init__(self, folder: Folder, metadata: Metadata, overwrite: bool) -> None:
        self._folder = folder
        self._metadata = metadata
        self._overwrite = overwrite

    @contextmanager
    def block(self, number: int) -> Iterator[Target]:
        """Yield the place for the images of a shard. The shard is written at the end if there are new images.

        Raises:
            OSError: If the shard cannot be written.
        """
        with _Shard(self._folder, self._metadata, self._overwrite, shard_name(number)) as shard:
            yield shard
            shard.finish()


class _Shard:
    """A shard in a temporary file, and the shard of an earlier run."""

    def __init__(self, folder: Folder, metadata: Metadata, overwrite: bool, name: str) -> None:
        self._folder = folder
        self._metadata = metadata
        self._overwrite = overwrite
        self._name = name
        records = folder.read(f"{name}.jsonl") or b""
        self._present: dict[str, dict[str, Any]] = {
            record.pop("name"): record for record in map(json.loads, records.splitlines())
        }
        self._kept: dict[str, dict[str, Any]] = {}  # images of the earlier shard
        self._new: dict[str, dict[str, object]] = {}

    def __enter__(self) -> _Shard:
        self._scratch = tempfile.TemporaryDirectory()
        self._path = Path(self._scratch.name) / "new.tar"
        self._tar = tarfile.open(self._path, "w")
        return self

    def __exit__(self, *details: object) -> None:
        self._tar.close()
        self._scratch.cleanup()

    def contains(self, job: Job) -> bool:
        record = self._present.get(job.name)
        if record is None:
            return False
        metadata = self._metadata(job)
        present = {name: value for name, value in record.items() if name in metadata}
        if not is_same(present, metadata, self._overwrite, f"{self._folder.place(self._name)}.tar, {job.name}"):
            return False
        self._kept[job.name] = record
        return True

    def write(self, job: Job, result: ImageResult) -> None:
        metadata = self._metadata(job)
        record = image_record(metadata, result)
        self._add(f"{job.name}.png", pictures.png(result.image, metadata))
        self._add(f"{job.name}.json", to_json(record))
        self._new[job.name] = record

    def finish(self) -> None:
        """Write the shard if there are new images. It also contains the images that the earlier shard keeps."""
        if not self._new:
            return
        if self._kept:
            earlier = Path(self._scratch.name) / "earlier.tar"
            self._folder.download(f"{self._name}.tar", earlier)
            with tarfile.open(earlier) as tar:
                for member in tar:
                    if member.name.rpartition(".")[0] in self._kept:
                        self._tar.addfile(member, tar.extractfile(member))
        self._tar.close()
        records = [{"name": name, **record} for name, record in {**self._kept, **self._new}.items()]
        # Without its list, a shard counts as missing, so a list never describes another shard.
        self._folder.remove(f"{self._name}.jsonl")
        self._folder.upload(self._path, f"{self._name}.tar")
        self._folder.write(f"{self._name}.jsonl", b"".join(to_json(record, lines=True) for record in records))

    def _add(self, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))

# SPDX-License-Identifier: Apache-2.0
"""A folder of images that can be resumed.

The image of line 12 with seed 3 is ``00012-seed-3.png``. The PNG file contains the settings as text.
``00012-seed-3.json`` contains the settings, the duration and the guidance report. A file gets its final name only when
it is complete. Existing images with the same settings are kept, so an interrupted run can be resumed.
``failures.jsonl`` lists the images that could not be generated in the last run, with the reason.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from segkern.generation import pictures
from segkern.generation.drawing import ImageResult
from segkern.generation.engine import Job
from segkern.generation.processes import CLAIMS

FAILURES = "failures.jsonl"
_LINE_DIGITS = 5
_PARTIAL_FILE = re.compile(rf"\.\d{{{_LINE_DIGITS},}}-seed-\d+\.\d+\.(png|json)")
_PNG_END = b"IEND\xaeB`\x82"  # the last bytes of a complete PNG file
_IGNORED = ("segkern", "torch", "diffusers", pictures.PARAMETERS)  # when settings are compared


def image_name(line: int, seed: int) -> str:
    """Return the name of the files of an image, without suffix."""
    return f"{line:0{_LINE_DIGITS}d}-seed-{seed}"


class OtherSettingsError(ValueError):
    """The folder contains an image with other settings."""


class ImageFolder:
    """A folder of images, their records and a list of failures.

    Args:
        path: The folder.
        metadata: Function that returns the settings of a job by name.
        overwrite: Whether to replace images with other settings.
    """

    def __init__(self, path: Path, metadata: Callable[[Job], dict[str, object]], overwrite: bool) -> None:
        self.path = path
        self._metadata = metadata
        self._overwrite = overwrite

    def prepare(self) -> None:
        """Create the folder if its parent exists, and remove what interrupted runs left.

        Raises:
            ValueError: If the folder cannot be created or written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"--out must be a folder with --prompts, but {str(self.path)!r} is a file")
        if not self.path.parent.is_dir():
            raise ValueError(f"--out {str(self.path)!r} is in a folder that does not exist")
        self.path.mkdir(exist_ok=True)
        if not os.access(self.path, os.W_OK):
            raise ValueError(f"no permission to write to --out {str(self.path)!r}")
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name == FAILURES or (_PARTIAL_FILE.fullmatch(entry.name) and entry.is_file()):
                    os.unlink(entry)
                elif entry.name.startswith(CLAIMS) and entry.is_dir():
                    shutil.rmtree(entry)

    def contains(self, job: Job) -> bool:
        """Return True if the folder contains the image of a job. If its record is missing, write the record.

        Raises:
            OtherSettingsError: If the image has other settings and must not be overwritten.
        """
        present = _read_settings(self.path / f"{job.name}.png")
        if present is None:
            return False
        metadata = self._metadata(job)
        settings = _settings(metadata)
        if self._overwrite and present != settings:
            return False
        if present != settings:
            name = next(key for key in {**present, **settings} if present.get(key) != settings.get(key))
            raise OtherSettingsError(
                f"{self.path / job.name}.png has {name} {present.get(name)!r}, not {settings.get(name)!r}; "
                f"use --overwrite or another --out"
            )
        if not (self.path / f"{job.name}.json").exists():
            self._write_record(job.name, {**metadata, "seconds": None, "guidance_report": None})
        return True

    def write(self, job: Job, result: ImageResult) -> None:
        """Write the image and the record of a job. Files get their final names when they are complete.

        Raises:
            OSError: If a file cannot be written, for example because the disk is full.
        """
        metadata = self._metadata(job)
        (self.path / f"{job.name}.json").unlink(missing_ok=True)  # record of the image that is replaced
        with _complete(self.path / f"{job.name}.png") as path:
            pictures.save(result.image, path, metadata)
        report = None if result.report is None else result.report.to_dict()
        self._write_record(job.name, {**metadata, "seconds": round(result.seconds, 3), "guidance_report": report})

    def add_failure(self, **record: object) -> None:
        """Append a line to the list of failures.

        Raises:
            OSError: If the line cannot be written.
        """
        line = json.dumps(_plain(record), ensure_ascii=False) + "\n"
        # One write to a file opened for appending is not mixed with those of other processes.
        descriptor = os.open(self.path / FAILURES, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def _write_record(self, name: str, record: dict[str, object]) -> None:
        with _complete(self.path / f"{name}.json") as path:
            path.write_text(json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """Return the value with infinity and NaN as strings, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """Yield a temporary path whose file is renamed to ``path`` on success and deleted on failure."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_settings(path: Path) -> dict[str, str] | None:
    """Return the settings in a PNG file, or None if there is no complete image. The pixels are not read."""
    try:
        with path.open("rb") as file:
            file.seek(-len(_PNG_END), os.SEEK_END)
            if file.read() != _PNG_END:
                return None
            file.seek(0)
            with Image.open(file) as image:
                texts = {str(key): value for key, value in image.info.items() if isinstance(value, str)}
                return _settings(texts)
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None


def _settings(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata that determine an image."""
    return {key: str(value) for key, value in metadata.items() if key not in _IGNORED}

# SPDX-License-Identifier: Apache-2.0
"""A folder of images that can be resumed.

The image of line 12 with seed 3 is ``00012-seed-3.png``. The PNG file contains the settings as text.
``00012-seed-3.json`` contains the settings, the duration and the guidance report. A file gets its final name only when
it is complete. Existing images with the same settings are kept, so an interrupted run can be resumed.
``failures.jsonl`` lists the images that could not be generated in the last run, with the reason.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from PIL import Image, UnidentifiedImageError

from segkern.generation import pictures
from segkern.generation.drawing import ImageResult
from segkern.generation.engine import Job
from segkern.generation.storage import Folder

Metadata = Callable[[Job], dict[str, object]]  # returns the settings of a job by name

_HEADER = 2**16  # bytes to read from the start of a PNG file for its settings
_PNG_END = b"IEND\xaeB`\x82"  # the last bytes of a complete PNG file
_IGNORED = ("segkern", "torch", "diffusers", pictures.PARAMETERS)  # when settings are compared


class OtherSettingsError(ValueError):
    """The folder contains an image with other settings."""


class Target(Protocol):
    """The place for the images of a block of lines."""

    def contains(self, job: Job) -> bool:
        """Return True if the image of a job exists.

        Raises:
            OtherSettingsError: If the image has other settings and must not be overwritten.
        """

    def write(self, job: Job, result: ImageResult) -> None:
        """Write the image and the record of a job.

        Raises:
            OSError: If a file cannot be written, for example because the disk is full.
        """


class ImageFolder:
    """A folder with two files per image.

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
        """Yield the place for a block of images."""
        yield self

    def contains(self, job: Job) -> bool:
        """Return True if the folder contains the image of a job. If its record is missing, write the record.

        Raises:
            OtherSettingsError: If the image has other settings and must not be overwritten.
        """
        name = f"{job.name}.png"
        present = _read_settings(self._folder, name)
        if present is None:
            return False
        metadata = self._metadata(job)
        if not is_same(present, metadata, self._overwrite, self._folder.place(name)):
            return False
        if self._folder.start_of(f"{job.name}.json", 1) is None:
            self._folder.write(f"{job.name}.json", to_json({**metadata, "seconds": None, "guidance_report": None}))
        return True

    def write(self, job: Job, result: ImageResult) -> None:
        """Write the image and the record of a job. Files get their final names when they are complete.

        Raises:
            OSError: If a file cannot be written, for example because the disk is full.
        """
        metadata = self._metadata(job)
        self._folder.remove(f"{job.name}.json")  # record of the image that is replaced
        self._folder.write(f"{job.name}.png", pictures.png(result.image, metadata))
        self._folder.write(f"{job.name}.json", to_json(image_record(metadata, result)))


def image_record(metadata: Mapping[str, object], result: ImageResult) -> dict[str, object]:
    """Return the settings of an image, its duration and its guidance report."""
    report = None if result.report is None else result.report.to_dict()
    return {**metadata, "seconds": round(result.seconds, 3), "guidance_report": report}


def is_same(present: Mapping[str, object], metadata: Mapping[str, object], overwrite: bool, place: str) -> bool:
    """Return True if an existing image has the settings of a job, and False if it must be overwritten.

    Args:
        present: Settings of the existing image.
        metadata: Settings of the job.
        overwrite: Whether images with other settings are replaced.
        place: Location of the existing image.

    Raises:
        OtherSettingsError: If the settings differ and ``overwrite`` is false.
    """
    old, new = _settings(present), _settings(metadata)
    if old != new and not overwrite:
        name = next(key for key in {**old, **new} if old.get(key) != new.get(key))
        raise OtherSettingsError(
            f"{place} has {name} {old.get(name)!r}, not {new.get(name)!r}; use --overwrite or another --out"
        )
    return old == new


def to_json(record: Mapping[str, object], *, lines: bool = False) -> bytes:
    """Return a record as JSON, or as a line of JSON Lines."""
    text = json.dumps(_plain(dict(record)), indent=None if lines else 1, ensure_ascii=False)
    return f"{text}\n".encode()


def _plain(value: Any) -> Any:
    """Return the value with infinity and NaN as strings, which JSON lacks."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _read_settings(folder: Folder, name: str) -> dict[str, object] | None:
    """Return the settings in a PNG file, or None if there is no complete image. The pixels are not read."""
    start = folder.start_of(name, _HEADER)
    if start is None or not folder.ends_with(name, _PNG_END):
        return None
    try:
        with Image.open(io.BytesIO(start)) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None


def _settings(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata that determine an image."""
    return {key: str(value) for key, value in metadata.items() if key not in _IGNORED}

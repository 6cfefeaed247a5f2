# SPDX-License-Identifier: Apache-2.0
"""Batches of images in a folder, which can be shared by processes and resumed.

A batch item is one prompt with one seed. Its image is ``00012-seed-3.png``, where 12 is the line number of the prompt
and 3 is the seed. The PNG file contains the settings as text. ``00012-seed-3.json`` contains the settings, the duration
and the guidance report. A file gets its final name only when it is complete. Existing images with the same settings are
kept, so an interrupted batch can be resumed.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, UnidentifiedImageError

from segkern.generation import loading, pictures
from segkern.generation.drawing import ImageRequest, ImageResult

if TYPE_CHECKING:
    from accelerate import PartialState

Metadata = Callable[[ImageRequest], dict[str, object]]  # returns the settings of an image by name

_LINE_DIGITS = 5
_PARTIAL_FILE = re.compile(rf"\.\d{{{_LINE_DIGITS},}}-seed-\d+\.\d+\.(png|json)")
_IGNORED = ("segkern", "torch", "diffusers", pictures.PARAMETERS)  # when settings are compared


@dataclass(frozen=True)
class BatchItem:
    """One image of a batch.

    Attributes:
        name: Name of its files, without suffix.
        request: Settings of the image.
    """

    name: str
    request: ImageRequest


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Return line numbers, counted from 1, and prompts. Empty lines are skipped.

    Raises:
        ValueError: If the file does not exist, has no prompts or is not UTF-8 text.
    """
    if not path.is_file():
        raise ValueError(f"--prompts must be a text file with one prompt per line, but there is no file {str(path)!r}")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {str(path)!r} is not UTF-8 text: {error}") from None
    prompts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {str(path)!r} contains no prompts")
    return prompts


def batch_items(prompts: Sequence[tuple[int, str]], request: ImageRequest, images: int) -> list[BatchItem]:
    """Return the items of a batch: each prompt with ``images`` seeds, starting at the seed of the request."""
    return [
        BatchItem(f"{number:0{_LINE_DIGITS}d}-seed-{seed}", replace(request, prompt=prompt, seed=seed))
        for number, prompt in prompts
        for seed in range(request.seed, request.seed + images)
    ]


def find_missing(folder: Path, items: Sequence[BatchItem], metadata: Metadata, overwrite: bool) -> list[BatchItem]:
    """Return the items whose images are missing from the folder. Create the folder if its parent exists.

    If an image exists but its record is missing, write the record.

    Raises:
        ValueError: If the folder cannot be used, or if an image has other settings and ``overwrite`` is false.
    """
    _check_folder(folder)
    for path in folder.iterdir():
        if _PARTIAL_FILE.fullmatch(path.name) and path.is_file():  # left by a killed process
            path.unlink()
    missing = []
    for item in items:
        settings = _settings(metadata(item.request))
        present = _read_settings(folder / f"{item.name}.png")
        if present is None or (overwrite and present != settings):
            missing.append(item)
            continue
        if present != settings:
            name = next(key for key in {**present, **settings} if present.get(key) != settings.get(key))
            raise ValueError(
                f"{folder / item.name}.png has {name} {present.get(name)!r}, not {settings.get(name)!r}; "
                f"use --overwrite or another --out"
            )
        if not (folder / f"{item.name}.json").exists():
            _write_record(folder, item.name, {**metadata(item.request), "seconds": None, "guidance_report": None})
    return missing


def write(folder: Path, item: BatchItem, result: ImageResult, metadata: dict[str, object]) -> None:
    """Write the image and the record of an item. Files get their final names when they are complete."""
    (folder / f"{item.name}.json").unlink(missing_ok=True)  # record of the image that is replaced
    with _complete(folder / f"{item.name}.png") as path:
        pictures.save(result.image, path, metadata)
    report = None if result.report is None else result.report.to_dict()
    _write_record(folder, item.name, {**metadata, "seconds": round(result.seconds, 3), "guidance_report": report})


def _check_folder(folder: Path) -> None:
    """Create the folder if its parent exists.

    Raises:
        ValueError: If the folder cannot be created or written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out must be a folder with --prompts, but {str(folder)!r} is a file")
    if not folder.parent.is_dir():
        raise ValueError(f"--out {str(folder)!r} is in a folder that does not exist")
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"no permission to write to --out {str(folder)!r}")


def _write_record(folder: Path, name: str, record: dict[str, object]) -> None:
    with _complete(folder / f"{name}.json") as path:
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
    """Return the settings in a PNG file, or None if there is no readable image."""
    try:
        with Image.open(path) as image:
            image.load()
            return _settings(getattr(image, "text", {}))
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None


def _settings(metadata: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata that determine an image."""
    return {key: str(value) for key, value in metadata.items() if key not in _IGNORED}


class Processes:
    """The processes of ``accelerate launch``, or a single process.

    Attributes:
        device: Device of this process.
    """

    def __init__(self, device: str, many: bool) -> None:
        self._state: PartialState | None = None
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            self.device = loading.find_device(device)
            return
        if not many:
            raise ValueError(f"{count} processes would all generate the same image; use --prompts, or one process")
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {device!r} is not possible with {count} processes, which need one device each")
        import torch
        from accelerate import PartialState

        self._state = PartialState(cpu=device == "cpu")
        self.device = torch.device(self._state.device)

    @property
    def place(self) -> str:
        """Text such as ``, process 1`` to append to a line; empty for a single process."""
        if self._state is None:
            return ""
        return f", process {self._state.process_index + 1} of {self._state.num_processes}"

    @property
    def is_main(self) -> bool:
        """True if this process determines the missing items."""
        return self._state is None or self._state.is_main_process

    def share(self, decide: Callable[[], list[BatchItem]]) -> list[BatchItem]:
        """Return this process's share of the items that ``decide`` returns in the main process.

        Raises:
            ValueError: If ``decide`` raises an exception in the main process. All processes raise it.
        """
        if self._state is None:
            return decide()
        from accelerate.utils import broadcast_object_list

        decision: list[Any] = [None, None]  # items and error
        if self.is_main:
            try:
                decision[0] = decide()
            except Exception as error:  # the other processes wait for the broadcast
                decision[1] = str(error)
        broadcast_object_list(decision)
        self._state.destroy_process_group()
        if decision[1] is not None:
            raise ValueError(decision[1])
        with self._state.split_between_processes(decision[0]) as part:
            return list(part)

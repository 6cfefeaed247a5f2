# SPDX-License-Identifier: Apache-2.0
"""Many pictures into one folder: split among processes, each drawn once, whatever happens in between.

A batch item is one prompt with one seed. It becomes ``00012-seed-3.png`` (the prompt's line in the file, the seed),
with its settings as text inside, and ``00012-seed-3.json``, a record with the same settings, the seconds it took and
what guidance did. Both appear under their names only when they are complete. A run that was interrupted goes on where
it was: a picture that is there with the same settings is left alone.
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

Metadata = Callable[[ImageRequest], dict[str, object]]  # all settings of a picture, by name

_LINE_DIGITS = 5
_PARTIAL_FILE = re.compile(rf"\.\d{{{_LINE_DIGITS},}}-seed-\d+\.\d+\.(png|json)")
_VERSIONS = ("segkern", "torch", "diffusers")


@dataclass(frozen=True)
class BatchItem:
    """One picture to draw.

    Attributes:
        name: of its files, without a suffix.
        request: what to draw.
    """

    name: str
    request: ImageRequest


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """Prompts with the numbers of their lines, from 1; empty lines are none.

    Raises:
        ValueError: for a file that is not there, holds no prompts or is no text in UTF-8.
    """
    if not path.is_file():
        raise ValueError(f"--prompts takes a text file with a prompt on each line, and {str(path)!r} is none")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {str(path)!r} is no text in UTF-8: {error}") from None
    prompts = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {str(path)!r} has no prompts, one on each line")
    return prompts


def batch_items(prompts: Sequence[tuple[int, str]], request: ImageRequest, images: int) -> list[BatchItem]:
    """Every prompt with ``images`` seeds, from the request's on."""
    return [
        BatchItem(f"{number:0{_LINE_DIGITS}d}-seed-{seed}", replace(request, prompt=prompt, seed=seed))
        for number, prompt in prompts
        for seed in range(request.seed, request.seed + images)
    ]


def find_missing(folder: Path, items: Sequence[BatchItem], metadata: Metadata, overwrite: bool) -> list[BatchItem]:
    """The items that the folder lacks, which is made if only its last part is missing.

    A picture whose record is missing gets it, from its own text.

    Raises:
        ValueError: for a folder that cannot be one, and for a picture with other settings, unless it is to be
            replaced; the message says which.
    """
    _check_folder(folder)
    for path in folder.iterdir():
        if _PARTIAL_FILE.fullmatch(path.name) and path.is_file():  # of a run that was killed
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
                f"{folder / item.name}.png was drawn with {name} {present.get(name)!r}, not {settings.get(name)!r}; "
                f"give --overwrite or another --out"
            )
        if not (folder / f"{item.name}.json").exists():
            _write_record(folder, item.name, {**metadata(item.request), "seconds": None, "guidance_report": None})
    return missing


def write(folder: Path, item: BatchItem, result: ImageResult, metadata: dict[str, object]) -> None:
    """Write picture and record of an item, each complete as soon as it has its name."""
    (folder / f"{item.name}.json").unlink(missing_ok=True)  # it is of the picture that is replaced
    with _complete(folder / f"{item.name}.png") as path:
        pictures.save(result.image, path, metadata)
    report = None if result.report is None else result.report.to_dict()
    _write_record(folder, item.name, {**metadata, "seconds": round(result.seconds, 3), "guidance_report": report})


def _check_folder(folder: Path) -> None:
    """Make the folder if only its last part is missing.

    Raises:
        ValueError: when it cannot be one; the message quotes it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"with --prompts, --out is a folder for the pictures, and {str(folder)!r} is a file")
    if not folder.parent.is_dir():
        raise ValueError(f"the folder that holds --out {str(folder)!r} does not exist")
    folder.mkdir(exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {str(folder)!r} cannot be written: permission denied")


def _write_record(folder: Path, name: str, record: dict[str, object]) -> None:
    with _complete(folder / f"{name}.json") as path:
        path.write_text(json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """The value as JSON has it: infinities and NaN as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


@contextmanager
def _complete(path: Path) -> Iterator[Path]:
    """A file of another name that takes the path's place when it was written; it is gone if it was not."""
    partial = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_settings(path: Path) -> dict[str, str] | None:
    """The settings in a picture, None where there is no picture that can be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return _settings(getattr(image, "text", {}))
    except (UnidentifiedImageError, OSError, SyntaxError):
        return None


def _settings(metadata: Mapping[str, object]) -> dict[str, str]:
    """The metadata that make a picture the same: all but versions."""
    return {key: str(value) for key, value in metadata.items() if key not in _VERSIONS}


class Processes:
    """The processes of ``accelerate launch``, or this one alone.

    Attributes:
        device: this process's.
    """

    def __init__(self, device: str, many: bool) -> None:
        self._state: PartialState | None = None
        count = int(os.environ.get("WORLD_SIZE", "1"))
        if count == 1:
            self.device = loading.find_device(device)
            return
        if not many:
            raise ValueError(f"{count} processes would all draw the same picture; they are for --prompts")
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {device!r} among several processes, each of which has its own; leave it out")
        import torch
        from accelerate import PartialState

        self._state = PartialState(cpu=device == "cpu")
        self.device = torch.device(self._state.device)

    @property
    def place(self) -> str:
        """This process among the others, in words for the end of a line; empty for one alone."""
        if self._state is None:
            return ""
        return f", process {self._state.process_index + 1} of {self._state.num_processes}"

    @property
    def is_main(self) -> bool:
        """True for the process that decides which items are missing."""
        return self._state is None or self._state.is_main_process

    def share(self, decide: Callable[[], list[BatchItem]]) -> list[BatchItem]:
        """This process's part of the items that the main one decides on; the processes exchange nothing else.

        Raises:
            ValueError: in all of them, for whatever ``decide`` raises in the main one.
        """
        if self._state is None:
            return decide()
        from accelerate.utils import broadcast_object_list

        decision: list[Any] = [None, None]  # the items, and the error
        if self.is_main:
            try:
                decision[0] = decide()
            except Exception as error:  # the others wait for an answer
                decision[1] = str(error)
        broadcast_object_list(decision)
        self._state.destroy_process_group()
        if decision[1] is not None:
            raise ValueError(decision[1])
        with self._state.split_between_processes(decision[0]) as part:
            return list(part)

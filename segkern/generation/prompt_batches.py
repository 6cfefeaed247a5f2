# SPDX-License-Identifier: Apache-2.0
"""Many pictures into one folder: split among processes, each drawn once, whatever happens in between.

A picture is one prompt with one seed. It becomes ``00012-seed-3.png`` (the prompt's line in the file, the seed), with
its settings as text inside, and ``00012-seed-3.json``, a record with the same settings, the seconds it took and what
guidance did. Both appear under their names only when they are complete. A run that was interrupted goes on where it
was: what is there already, with the same settings, is left alone.
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

import torch
import typer
from PIL import Image, UnidentifiedImageError

from segkern.generation import loading, pictures
from segkern.generation.drawing import Drawn, Job, Specs, draw_all

if TYPE_CHECKING:
    from accelerate import PartialState


_LINE_DIGITS = 5
_PART = re.compile(rf"\.\d{{{_LINE_DIGITS},}}-seed-\d+\.\d+\.(png|json)")
_VERSIONS = ("segkern", "torch", "diffusers")


@dataclass(frozen=True)
class Piece:
    """One picture to draw.

    Attributes:
        name: of its files, without a suffix.
        job: what to draw.
    """

    name: str
    job: Job


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
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise ValueError(f"--prompts {str(path)!r} has no prompts, one on each line")
    return found


def pieces(prompts: Sequence[tuple[int, str]], job: Job, images: int) -> list[Piece]:
    """Every prompt with ``images`` seeds, from the job's on."""
    return [
        Piece(f"{number:0{_LINE_DIGITS}d}-seed-{seed}", replace(job, prompt=prompt, seed=seed))
        for number, prompt in prompts
        for seed in range(job.seed, job.seed + images)
    ]


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


def missing(
    folder: Path, wanted: Sequence[Piece], describe: Callable[[Job], dict[str, object]], overwrite: bool
) -> list[Piece]:
    """Those that the folder lacks, which is made if only its last part is missing.

    A picture whose record is missing gets it, from its own text.

    Raises:
        ValueError: for a folder that cannot be one, and for a picture with other settings, unless it is to be
            replaced; the message says which.
    """
    _check_folder(folder)
    for part in folder.iterdir():  # what a run that was killed has left
        if _PART.fullmatch(part.name) and part.is_file():
            part.unlink()
    found = []
    for piece in wanted:
        settings = _settings(describe(piece.job))
        there = _settings_of(folder / f"{piece.name}.png")
        if there is None or (overwrite and there != settings):
            found.append(piece)
            continue
        if there != settings:
            name = next(key for key in {**there, **settings} if there.get(key) != settings.get(key))
            raise ValueError(
                f"{folder / piece.name}.png was drawn with {name} {there.get(name)!r}, not {settings.get(name)!r}; "
                f"give --overwrite or another --out"
            )
        if not (folder / f"{piece.name}.json").exists():
            _write_record(folder, piece.name, {**describe(piece.job), "seconds": None, "guidance_report": None})
    return found


def draw_missing(
    pipe: Any,
    mine: Sequence[Piece],
    specs: Specs,
    workers: Workers,
    folder: Path,
    describe: Callable[[Job], dict[str, object]],
) -> list[str]:
    """Draw one process's part and say so, a line each; returns what went wrong with guidance, each problem once."""
    problems: dict[str, None] = {}
    for number, piece in enumerate(mine, 1):
        (drawn,) = draw_all(pipe, piece.job, [specs], show=workers.first)
        write(folder, piece, drawn, describe(piece.job))
        typer.echo(f"wrote {folder / piece.name}.png ({number} of {len(mine)}{workers.place})")
        problems |= dict.fromkeys(() if drawn.report is None else drawn.report.problems)
    if workers.first and not mine:
        typer.echo(f"all pictures are in {folder} already")
    return list(problems)


def write(folder: Path, piece: Piece, drawn: Drawn, details: dict[str, object]) -> None:
    """Picture and record of one piece, each complete as soon as it has its name."""
    (folder / f"{piece.name}.json").unlink(missing_ok=True)  # it is of the picture that goes
    with _complete(folder / f"{piece.name}.png") as path:
        pictures.save(drawn.image, path, details)
    report = None if drawn.report is None else drawn.report.to_dict()
    _write_record(folder, piece.name, {**details, "seconds": round(drawn.seconds, 3), "guidance_report": report})


def _write_record(folder: Path, name: str, record: dict[str, object]) -> None:
    with _complete(folder / f"{name}.json") as path:
        path.write_text(json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    """As JSON has it: infinities and NaN as words."""
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
    part = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _settings_of(path: Path) -> dict[str, str] | None:
    """The text in a picture, None where there is no picture that can be read."""
    try:
        with Image.open(path) as image:
            image.load()
            return _settings(getattr(image, "text", {}))
    except (FileNotFoundError, UnidentifiedImageError, OSError, SyntaxError):
        return None


def _settings(details: Mapping[str, object]) -> dict[str, str]:
    """What makes a picture the same: all but versions."""
    return {key: str(value) for key, value in details.items() if key not in _VERSIONS}


class Workers:
    """The processes of ``accelerate launch``, or this one alone.

    Attributes:
        device: this process's.
    """

    def __init__(self, device: str, many: bool) -> None:
        self._state: PartialState | None = None
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes == 1:
            self.device = loading.find_device(device)
            return
        if not many:
            raise ValueError(f"{processes} processes would all draw the same picture; they are for --prompts")
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {device!r} among several processes, each of which has its own; leave it out")
        from accelerate import PartialState

        self._state = PartialState(cpu=device == "cpu")
        self.device = torch.device(self._state.device)

    @property
    def place(self) -> str:
        """Which one this is, in words for the end of a line; empty for one alone."""
        if self._state is None:
            return ""
        return f", process {self._state.process_index + 1} of {self._state.num_processes}"

    @property
    def first(self) -> bool:
        """Whether this is the one that decides what is missing."""
        return self._state is None or self._state.is_main_process

    def share(self, decide: Callable[[], list[Piece]]) -> list[Piece]:
        """This process's part of what the first one decides. It is all that they have to tell each other.

        Raises:
            ValueError: in all of them, what ``decide`` raises in the first, whatever it is.
        """
        if self._state is None:
            return decide()
        from accelerate.utils import broadcast_object_list

        told: list[Any] = [None, None]
        if self.first:
            try:
                told[0] = decide()
            except Exception as error:  # the others wait for an answer
                told[1] = str(error)
        broadcast_object_list(told)
        self._state.destroy_process_group()
        if told[1] is not None:
            raise ValueError(told[1])
        with self._state.split_between_processes(told[0]) as part:
            return list(part)

# SPDX-License-Identifier: Apache-2.0
"""Files with prompts: text with one prompt per line, or JSON Lines with settings.

Files are read line by line, so a file can be larger than memory.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

JSON_SUFFIXES = (".jsonl", ".ndjson")
_TYPES: dict[str, tuple[type, ...]] = {
    "prompt": (str,),
    "negative_prompt": (str,),
    "seed": (int,),
    "width": (int,),
    "height": (int,),
    "steps": (int,),
    "guidance_scale": (int, float),
    "scale": (int, float),
    "sigma": (int, float, str),
}


@dataclass(frozen=True)
class Row:
    """A line of a prompt file.

    Attributes:
        number: Line number, counted from 1.
        settings: Settings of the line by name. ``prompt`` is always present unless the line has an error.
        error: Why the line cannot be used; empty if it can.
    """

    number: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def count_rows(path: Path) -> int:
    """Return the number of lines that are not empty.

    Raises:
        ValueError: If the file does not exist, has no prompts, or if its first prompt cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"--prompts must be a text file with one prompt per line, but there is no file {str(path)!r}")
    first = next(read_rows(path), None)
    if first is None:
        raise ValueError(f"--prompts {str(path)!r} contains no prompts")
    if first.error:
        raise ValueError(f"--prompts {str(path)!r}, line {first.number}: {first.error}")
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the lines of a file. Empty lines are skipped, and invalid lines have an error."""
    is_json = path.suffix.lower() in JSON_SUFFIXES
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            content = line.removeprefix(codecs.BOM_UTF8).strip() if number == 1 else line.strip()
            if not content:
                continue
            try:
                text = content.decode("utf-8").strip()
                if text:
                    yield Row(number, _json_settings(text) if is_json else {"prompt": text})
            except UnicodeDecodeError as error:
                yield Row(number, error=f"not UTF-8 text: {error}")
            except ValueError as error:
                yield Row(number, error=str(error))


def _json_settings(text: str) -> dict[str, Any]:
    """Return the settings in a JSON object.

    Raises:
        ValueError: If the text is not an object with a prompt, or if a setting is unknown or of the wrong type.
    """
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(settings, dict) or "prompt" not in settings:
        raise ValueError(f'expected an object with a prompt, such as {{"prompt": "a fox"}}, got {text[:80]!r}')
    for name, value in settings.items():
        if name not in _TYPES:
            raise ValueError(f"unknown setting {name!r}; use {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise ValueError(f"{name} must be {' or '.join(kind.__name__ for kind in _TYPES[name])}, got {value!r}")
    return settings

# SPDX-License-Identifier: Apache-2.0
"""Files with prompts: text with one prompt per line, JSON Lines, or Parquet with settings.

Files are read as needed, so a file can be larger than memory. A Parquet file is read one batch of rows at a time.
"""

from __future__ import annotations

import codecs
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segkern.generation.storage import is_url, open_file, storage_errors

JSON_SUFFIXES = (".jsonl", ".ndjson")
PARQUET_SUFFIXES = (".parquet", ".pq")
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
_PARQUET_ROWS = 1024  # decoded at a time


@dataclass(frozen=True)
class Row:
    """A line of a prompt file, or a row of a Parquet file.

    Attributes:
        number: Number of the line or row, counted from 1.
        settings: Settings of the line by name. ``prompt`` is always present unless the line has an error.
        error: Why the line cannot be used; empty if it can.
    """

    number: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def count_rows(location: str | Path) -> int | None:
    """Return the number of lines that are not empty, or None for a text file at a URL, which is not read twice.

    Raises:
        ValueError: If the file does not exist, has no prompts, or if its first prompt cannot be read.
    """
    name = os.fspath(location)
    if not is_url(name) and not Path(name).expanduser().is_file():
        raise ValueError(f"--prompts must be a text file with one prompt per line, but there is no file {name!r}")
    try:
        first = next(read_rows(name), None)
    except OSError as error:
        raise ValueError(f"cannot read --prompts {name!r}: {error}") from None
    if first is None:
        raise ValueError(f"--prompts {name!r} contains no prompts")
    if first.error:
        raise ValueError(f"--prompts {name!r}, line {first.number}: {first.error}")
    if name.lower().endswith(PARQUET_SUFFIXES):
        with open_file(name) as file:
            return int(_parquet(name, file).metadata.num_rows)
    if is_url(name):
        return None
    with open_file(name) as file:
        return sum(1 for line in file if line.strip())


def read_rows(location: str | Path) -> Iterator[Row]:
    """Yield the lines or rows of a file. Empty lines are skipped, and invalid lines have an error.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a Parquet file is invalid.
    """
    name = os.fspath(location)
    if name.lower().endswith(PARQUET_SUFFIXES):
        yield from _parquet_rows(name)
        return
    is_json = name.lower().endswith(JSON_SUFFIXES)
    with open_file(name) as file:
        for number, line in enumerate(_lines(name, file), 1):
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


def _lines(name: str, file: Any) -> Iterator[bytes]:
    with storage_errors(name):
        yield from file


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
    return _checked(settings)


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name, value in settings.items():
        if name not in _TYPES:
            raise ValueError(f"unknown setting {name!r}; use {', '.join(_TYPES)}")
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            raise ValueError(f"{name} must be {' or '.join(kind.__name__ for kind in _TYPES[name])}, got {value!r}")
    return settings


def _parquet(name: str, file: Any) -> Any:
    """Return an open Parquet file.

    Raises:
        ValueError: If pyarrow is missing, if the file is not a Parquet file, or if its columns are not settings.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'reading {name!r} needs pyarrow; pip install "segkern[cluster]"') from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{name!r} is not a Parquet file: {error}") from None
    columns = table.schema_arrow.names
    if "prompt" not in columns:
        raise ValueError(f"{name!r} has no column prompt, but {', '.join(columns)}")
    unknown = [column for column in columns if column not in _TYPES]
    if unknown:
        raise ValueError(f"{name!r} has the unknown column {unknown[0]!r}; use {', '.join(_TYPES)}")
    return table


def _parquet_rows(name: str) -> Iterator[Row]:
    with open_file(name) as file:
        table, number = _parquet(name, file), 0
        with storage_errors(name):
            for batch in table.iter_batches(_PARQUET_ROWS):
                for settings in batch.to_pylist():
                    number += 1
                    try:
                        row = Row(number, _parquet_settings(settings))
                    except ValueError as error:
                        row = Row(number, error=str(error))
                    yield row


def _parquet_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a row of a Parquet file. Null and NaN mean the default.

    pandas turns integers into floats if a value of the column is missing.

    Raises:
        ValueError: If the prompt is missing or a setting is of the wrong type.
    """
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        is_integer = isinstance(value, float) and value.is_integer() and _TYPES[name] == (int,)
        settings[name] = int(value) if is_integer else value
    if "prompt" not in settings:
        raise ValueError("the prompt is missing")
    return _checked(settings)

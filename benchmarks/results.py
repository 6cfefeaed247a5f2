# SPDX-License-Identifier: Apache-2.0
"""Result files: ``benchmarks/results/<device>-<suite>.json``, one file per run of a suite.

A file is an object with these entries:

* ``schema``: 3.
* ``suite``: name of the suite. ``complete``: false while the run is in progress or if it was interrupted. ``quick``:
  true if the numbers only show that everything runs.
* ``environment``: device, device_type (``cpu`` or ``cuda``), threads, versions of python, torch, triton, numpy and
  segkern, the commit of the checkout (with ``-dirty`` if files differed), and on CUDA also cuda, hip, driver,
  multiprocessors, l2_mib.
* ``headline``: the clock used for ``ratio`` and ``tflops``, ``hot`` on CUDA, ``wall`` on a CPU
  (:mod:`benchmarks.timing` explains the clocks).
* ``rows``: one for each provider, case, dtype and sigma.

A row has these entries:

* ``case``, ``height``, ``width``, ``start``, ``tokens``, ``heads``, ``head_dim``, ``batch``, ``blurred`` (number of
  samples at the end of the batch), ``dtype``, ``sigma`` (text, may be ``"inf"``), ``provider``, ``kind`` (``plain``:
  unblurred, ``attention``, ``blur``, ``mass``) and ``exact`` (false for an approximation).
* ``error`` of the last sample, which is blurred, on the part that was checked: ``rms`` and ``relative`` (of norms)
  against the float64 reference, the plain computation's ``plain_rms``, and ``largest_value``; or null.
* ``reason``: why the row is not timed: its result is wrong, or it cannot run. Null if it is timed.
* ``wall_ms``, ``hot_ms``, ``cold_ms``, ``graph_ms``: ``median``, ``p20`` and ``p80`` over ``rounds`` rounds, or a text
  that explains why there is no such time.
* ``ratio``: median, p20 and p80 of the headline time divided by that of the fastest unblurred attention in the same
  round, named by ``ratio_to``. Both are null if no unblurred attention ran.
* ``tflops``: FLOPs of unblurred attention of the whole batch divided by the median headline time, so it ranks like time
  (null for ``blur`` and ``mass``).
* ``peak_mib``: maximum memory that a call allocates, including its result, or a text that explains why it is unknown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cases import Case

RESULTS = Path(__file__).parent / "results"
QUICK = Path("outputs") / "benchmarks"
SCHEMA = 3

Result = dict[str, Any]
Row = dict[str, Any]


def describe_case(case: Case) -> Row:
    """Return the fields of a row that describe its case."""
    return {
        "case": case.name,
        "height": case.grid.height,
        "width": case.grid.width,
        "start": case.grid.start,
        "tokens": case.tokens,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "batch": case.batch,
        "blurred": case.third,
        "dtype": case.dtype_name,
    }


def key(row: Row) -> tuple[str, ...]:
    """Return the key of a row, unique within its suite."""
    return row["case"], row["dtype"], row["sigma"], row["provider"]


def write_json(path: Path, content: object, dense: bool = False) -> None:
    """Write a whole file, or leave the previous one untouched. ``dense`` writes one line per list item."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps(content, indent=None if dense else 1, ensure_ascii=False)
    part.write_text((text.replace("}, {", "},\n{") if dense else text) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that contains one JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read(path: Path) -> Result:
    """Read a result file.

    Raises:
        ValueError: If it is not a result file. The message explains why.
        OSError: If it cannot be read.
    """
    try:
        result = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None
    if result.get("schema") != SCHEMA or "rows" not in result:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}: it has {', '.join(sorted(result))}")
    return result


def committed() -> dict[str, Result]:
    """Return every committed result file by its stem, sorted by name."""
    return {path.stem: read(path) for path in sorted(RESULTS.glob("*.json"))}

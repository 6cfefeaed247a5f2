# SPDX-License-Identifier: Apache-2.0
"""Result files: ``benchmarks/results/<device>-<suite>.json``, one run of one suite each.

A file is an object with

* ``schema``: 3;
* ``suite``: its name; ``complete``: false while the run goes on or where it was cut off; ``quick``: true where the
  numbers only show that everything runs;
* ``environment``: device, device_type (``cpu`` or ``cuda``), threads, versions of python, torch, triton, numpy and
  segkern, the commit of the checkout (``-dirty`` where files differed), and on CUDA cuda, hip, driver,
  multiprocessors, l2_mib;
* ``headline``: the clock that ``ratio`` and ``tflops`` are made of, ``hot`` on CUDA, ``wall`` on a CPU
  (:mod:`benchmarks.timing` says what the clocks are);
* ``rows``, one for each provider, case, dtype and sigma.

A row holds

* ``case``, ``height``, ``width``, ``start``, ``tokens``, ``heads``, ``head_dim``, ``batch``, ``blurred`` (samples at
  the batch's end), ``dtype``, ``sigma`` (text, ``"inf"`` included), ``provider``, ``kind`` (``plain``: nothing is
  blurred, ``attention``, ``blur``, ``mass``) and ``exact`` (false for an approximation);
* ``error`` of the last sample, which is a blurred one, on the part that was looked at: ``rms`` and ``relative`` (of
  norms) against the float64 reference, the plain computation's ``plain_rms``, and ``largest_value``; or null;
* ``reason``: why there is no time: wrong, or it cannot run; null where there is one;
* ``wall_ms``, ``hot_ms``, ``cold_ms``, ``graph_ms``: ``median``, ``p20`` and ``p80`` over ``rounds`` rounds, or a text
  that says why that clock has nothing;
* ``ratio``: the same three of the headline over that of the fastest unblurred attention in the same round, whose name
  is ``ratio_to``; both null where none ran;
* ``tflops``: FLOPs of unblurred attention of the whole batch over the median headline, so that it ranks as time does
  (null for ``blur`` and ``mass``);
* ``peak_mib``: memory that a call allocates at most, result included, or a text that says why it is not known.
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
    """What a row says about its case."""
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
    """What tells a row from the others of its suite."""
    return row["case"], row["dtype"], row["sigma"], row["provider"]


def write_json(path: Path, content: object, dense: bool = False) -> None:
    """Write a whole file, or leave the one before untouched; ``dense`` takes a line for each item of a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    text = json.dumps(content, indent=None if dense else 1, ensure_ascii=False)
    part.write_text((text.replace("}, {", "},\n{") if dense else text) + "\n", encoding="utf-8")
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def read(path: Path) -> Result:
    """A result file.

    Raises:
        ValueError: for what is no result file; the message says what is wrong with it.
        OSError: when it cannot be read.
    """
    try:
        result = read_json(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    if result.get("schema") != SCHEMA or "rows" not in result:
        raise ValueError(f"{path} is no result file of schema {SCHEMA}: it has {', '.join(sorted(result))}")
    return result


def committed() -> dict[str, Result]:
    """Every committed result file by its stem, in the order of names."""
    return {path.stem: read(path) for path in sorted(RESULTS.glob("*.json"))}

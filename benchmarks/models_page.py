# SPDX-License-Identifier: Apache-2.0
"""``docs/models.md``: which models, tasks and guidances are proved to work with which diffusers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from benchmarks.tables import markdown
from segkern.integrations.diffusers.models import architectures
from segkern.integrations.diffusers.runtime import support

Cell = tuple[str, str, str, str]  # group, model, task, guidance
_Files = Mapping[str, Mapping[str, Any]]  # by version, the oldest first

_INTRODUCTION = """\
# Which models are guided

`python -m benchmarks.readme` writes this page from `benchmarks/results/compatibility/`, which
`python -m benchmarks compatibility` writes from the outcomes of tests, and from the tables that `guide` itself goes by;
no word of a cell is typed by hand. `segkern layers MODEL` lists a model's layers.

Each cell is proved by tests. A test builds the stock pipeline of diffusers around a small model of the architecture
with random weights, runs it under `guide` in float32 on the CPU, and compares the latents at the end of the run with
those of another way to compute the same guidance, named below each table. They must agree to the tolerance of float32
after a whole run, and must differ from the run without guidance by far more. A cell has runs with the pipeline's own
classifier-free guidance, or without it, or both; some runs have two guidances at once. **yes** says that all tests of a
cell passed with that version of diffusers, *no* that one failed, with its error. What is not in a table is not tested;
it may work. SEG at infinity is `SEG(sigma=math.inf)`, the mean query; SEG alone has a finite sigma. A modular pipeline
is one of diffusers' with a guider.

The tests use no published weights and no GPU, and they say nothing about how pictures look."""

_REFUSED = """\
`guide` refuses what it would get wrong, before it touches anything. Beside the ones below it refuses pipelines without
a `UNet2DConditionModel`, a `UNetMotionModel` or a transformer that it knows, with two denoisers, or whose call does not
tell how its denoiser's batch is laid out."""

_DEFAULT = """\
Where `SEG` and `PAG` act when they are given no layers. A model with too few blocks for the advice takes the block in
the middle too."""


def page(files: _Files) -> str:
    """The whole page.

    Args:
        files: of ``benchmarks.compatibility``, by their versions of diffusers.
    """
    parts = [_INTRODUCTION, _ran(files)] if files else [_INTRODUCTION, "Nothing has run yet."]
    for group, rows in groupby(cells(files), key=lambda cell: cell[0]):
        here = list(rows)
        headings = ("model", "task", "guidance", *(f"diffusers {version}" for version in files))
        parts += [f"## {group}", markdown(headings, lines(here, files), "---"), _proofs(here, files)]
    parts += [
        "## Refused",
        _REFUSED,
        markdown(("pipeline, a class that it derives from, or its model", "why"), refused(), "---"),
    ]
    parts += ["## Default layers", _DEFAULT, markdown(("models", "layers", "whose advice"), defaults(), "---")]
    return "\n\n".join(parts) + "\n"


def cells(files: _Files) -> list[Cell]:
    """All that some file has tests of, in the order of the tables."""
    found = {cell for each in files.values() for test in each["tests"] for cell in _cells(test)}
    return sorted(found, key=lambda cell: (_place(_GROUPS, cell[0]), cell[1], _place(_TASKS, cell[2]),
                                           _place(_GUIDANCES, cell[3]), cell))  # fmt: skip


def outcome(cell: Cell, found: Mapping[str, Any]) -> str:
    """What a file says of a cell."""
    tests = [test for test in found["tests"] if cell in _cells(test)]
    failed = [test for test in tests if test["outcome"] == "failed"]
    if failed:
        return f"*no*: {_clean(failed[0]['reason'])}"
    if any(test["outcome"] == "passed" for test in tests):
        return "**yes**"
    return f"not tested: {_clean(tests[0]['reason'])}" if tests else "not tested"


def lines(cells: Sequence[Cell], files: _Files) -> list[list[str]]:
    """The rows of a table; guidances of which the same is known share one."""
    found: dict[tuple[str, ...], list[str]] = {}
    for cell in cells:
        _, model, task, guidance = cell
        found.setdefault((model, task, *(outcome(cell, each) for each in files.values())), []).append(guidance)
    return [[model, task, ", ".join(guidances), *known] for (model, task, *known), guidances in found.items()]


def refused() -> list[list[str]]:
    """What ``guide`` refuses by name."""
    found = {**support._OTHER_BATCHES, **architectures.LINEAR}
    return [[f"`{name}`", reason] for name, reason in found.items()]


def defaults() -> list[list[str]]:
    """Default layers of each kind of model."""
    rows = [["all UNets", *_written(architectures.UNET_DEFAULT)]]
    for each in architectures.ARCHITECTURES.values():
        rows.append([each.users, *(_written(each.default) if each.default else ("", architectures.NO_ADVICE))])
    return rows


_GROUPS = ("UNets", "Transformers", "Video")
_TASKS = (
    "text to image",
    "image to image",
    "inpainting",
    "editing",
    "depth to image",
    "upscaling",
    "text to video",
    "image to video",
    "video to video",
)
_GUIDANCES = ("SEG", "SEG at infinity", "PAG", "SAG", "CFG")


def _place(order: Sequence[str], name: str) -> int:
    return order.index(name) if name in order else len(order)


def _written(advice: tuple[str, str]) -> tuple[str, str]:
    return f"`{advice[0]}`", advice[1]


def _cells(test: Mapping[str, Any]) -> list[Cell]:
    """What a test proves: with several guidances at once a cell of each."""
    return [(test["group"], test["model"], test["task"], guidance) for guidance in test["guidance"]]


def _clean(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")


def _ran(files: _Files) -> str:
    parts = []
    for version, found in files.items():
        env = found["environment"]
        passed = sum(test["outcome"] == "passed" for test in found["tests"])
        parts.append(
            f"diffusers {version}: {passed} of {len(found['tests'])} tests passed; transformers {env['transformers']}, "
            f"torch {env['torch']}, Python {env['python']}, commit `{env['commit']}`."
        )
    return "\n\n".join(parts)


def _proofs(cells: Sequence[Cell], files: _Files) -> str:
    """What the tests of these cells compare with."""
    about: dict[str, str] = {}
    for found in files.values():
        for test in found["tests"]:
            if any(cell in cells for cell in _cells(test)):
                name = test["test"].partition("[")[0]
                about[name] = found["about"][name]
    return "Compared with:\n\n" + "\n".join(f"- {text} `{name}`" for name, text in sorted(about.items()))

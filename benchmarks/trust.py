# SPDX-License-Identifier: Apache-2.0
"""What the estimate of coarse queries' error is worth: beside the true error, on drawn inputs and on a real model.

``python -m benchmarks trust`` writes ``benchmarks/results/coarse/estimate.json``. Drawn inputs are float32 on a 64 x 64
grid, an equal number of every kind (``tests/core/drawn_inputs.py``), sigma from 4 to 16 tokens, spectra from white to
1/f^2, logits of standard deviation 1 to 6. The model is the bundled one: every self-attention that its sampling runs,
on grids of its own. True errors are of float64.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks import machine
from benchmarks.results import RESULTS
from segkern import Grid, coarse_error, reference
from segkern.generation.loading import find_model, load_pipeline
from tests.core.drawn_inputs import KINDS, inputs, uniform

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = RESULTS / "coarse" / "estimate.json"
PICTURE = RESULTS / "coarse" / "estimate.png"
STRIDES = (2, 3, 4, 6, 8)
MODEL = "the bundled model"
TOLERANCE = 2.0**-8  # of SEG(query_stride="auto"): bfloat16's rounding
_GRID = Grid(64, 64)
_SIGMAS_OF_MODEL = (3.0, 4.0, 6.0)
_STEPS = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class Layer:
    """Inputs of one attention, ``[1, heads, tokens, dim]``, and how its logits are scaled."""

    kind: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: Grid
    sigma: float
    scale: float


def drawn(count: int, grid: Grid = _GRID) -> Iterator[Layer]:
    """So many inputs of every kind, each from a seed of its own."""
    for number in range(count):
        for which, kind in enumerate(KINDS):
            torch.manual_seed(1000 * which + number)
            sigma, swing, steepness = 2 ** uniform(2, 4), uniform(1, 6), uniform(0, 2)
            qkv = (x.float() for x in inputs(kind, grid, steepness, swing))
            yield Layer(kind, *qkv, grid, sigma, 1 / math.sqrt(64))


def of_model(steps: int = _STEPS) -> Iterator[Layer]:
    """Every perturbed self-attention of the bundled model in one run for each sigma."""
    from segkern.integrations.diffusers import SEG, guide
    from segkern.integrations.diffusers.runtime import query_rows

    pipe = load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))
    pipe.set_progress_bar_config(disable=True)
    seen: list[Layer] = []
    real = query_rows.seg_attention

    def kept(*arguments: Any, **options: Any) -> Any:
        query, key, value, grid, sigmas = arguments
        for i, sigma in enumerate(sigmas):
            if sigma > 0:
                one = (x[i : i + 1].clone() for x in (query, key, value))
                seen.append(Layer(MODEL, *one, grid, sigma, options["scale"]))
        return real(*arguments, **options)

    for sigma in _SIGMAS_OF_MODEL:
        with (
            mock.patch.object(query_rows, "seg_attention", kept),
            guide(pipe, SEG(scale=3.0, sigma=sigma, layers=["down", "mid", "up"])),
        ):
            generator = torch.Generator().manual_seed(1)
            pipe("", num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type="latent")
    yield from seen


def compare(layers: Iterator[Layer]) -> Iterator[list[Row]]:
    """For each layer a row per stride: the true error and what is estimated."""
    for number, layer in enumerate(layers):
        given = (layer.query, layer.key, layer.value, layer.grid, layer.sigma)
        query, key, value, *rest = given
        exact = reference.seg_attention(query.double(), key.double(), value.double(), *rest, scale=layer.scale)
        rows = []
        for stride in STRIDES:
            doubled = query.double(), key.double(), value.double()
            found = reference.seg_attention(*doubled, *rest, scale=layer.scale, query_stride=stride)
            assert isinstance(found, torch.Tensor)
            assert isinstance(exact, torch.Tensor)
            estimated = coarse_error(*given, stride, scale=layer.scale).item()
            rows.append(
                {
                    "input": number,
                    "kind": layer.kind,
                    "grid": [layer.grid.height, layer.grid.width],
                    "sigma": round(layer.sigma, 4),
                    "stride": stride,
                    "true": ((found - exact).norm() / exact.norm()).item(),
                    "estimated": None if math.isinf(estimated) else estimated,  # None: every row is to be computed
                }
            )
        yield rows


def write(rows: Sequence[Row], path: Path = FILE) -> None:
    """The file: ``environment`` and ``rows``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = machine.described(torch.device("cpu"))
    path.write_text(json.dumps({"environment": environment, "rows": list(rows)}) + "\n", encoding="utf-8")


def committed() -> dict[str, Any] | None:
    """The committed file."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else None


def kinds(rows: Sequence[Row]) -> list[list[str]]:
    """A line per kind of input and stride that any estimate trusts."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        for stride in STRIDES:
            here = [row for row in rows if (row["kind"], row["stride"]) == (kind, stride)]
            told = [row for row in here if row["estimated"] is not None]
            if not told:
                lines.append([kind, str(stride), f"0 of {len(here)}", "-", "-", "-"])
                continue
            true, estimated = ([row[name] for row in told] for name in ("true", "estimated"))
            worst = max(t / e if e else 0.0 for t, e in zip(true, estimated, strict=True))
            ends = f"{min(true):.0e} to {max(true):.0e}"
            middle = f"{statistics.median(true):.1e} / {statistics.median(estimated):.1e}"
            lines.append([kind, str(stride), f"{len(told)} of {len(here)}", ends, middle, f"{worst:.2f}"])
    return lines


KIND_HEADINGS = ("input", "stride", "estimated", "true error", "median true / estimated", "largest true / estimated")


def choices(rows: Sequence[Row]) -> list[list[str]]:
    """What ``query_stride="auto"`` would take from one estimate: strides, and the true errors of those taken."""
    lines = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        taken: dict[int, int] = {}
        errors = []
        for number in dict.fromkeys(row["input"] for row in rows if row["kind"] == kind):
            best = None
            for row in (row for row in rows if row["kind"] == kind and row["input"] == number):
                wide = row["stride"] > 0.75 * row["sigma"]
                if wide or row["estimated"] is None or 4 * row["estimated"] > TOLERANCE:
                    break
                best = row
            stride = 1 if best is None else best["stride"]
            taken[stride] = taken.get(stride, 0) + 1
            errors += [] if best is None else [best["true"]]
        shown = ", ".join(f"{stride}: {count}" for stride, count in sorted(taken.items()))
        lines.append([kind, shown, f"{max(errors):.1e}" if errors else "-", f"{TOLERANCE:.1e}"])
    return lines


CHOICE_HEADINGS = ("input", "strides taken (1: every row)", "largest true error of those", "tolerance")


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Estimated against true error, a point per input and stride."""
    axes = figure.subplots()
    told = [row for row in rows if row["estimated"] and row["true"] > 0]
    for kind, marker in zip(dict.fromkeys(row["kind"] for row in rows), "osD^vP*X", strict=False):
        here = [row for row in told if row["kind"] == kind]
        axes.plot([r["true"] for r in here], [r["estimated"] for r in here], marker, ms=3.5, alpha=0.6, label=kind)
    ends = [min(row["true"] for row in told), max(row["true"] for row in told)]
    axes.plot(ends, ends, color="black", lw=1, label="estimated = true")
    axes.plot(ends, [end / 2 for end in ends], color="black", lw=1, ls="--", label="true is twice the estimate")
    axes.set(xscale="log", yscale="log", xlabel="true relative error", ylabel="estimated relative error")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def picture(rows: Sequence[Row], path: Path = PICTURE) -> None:
    """Write the picture."""
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(7, 5.5))
    draw(rows, figure)
    figure.suptitle("Coarse queries: estimated and true error, strides 2 to 8", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, metadata={"Software": None})

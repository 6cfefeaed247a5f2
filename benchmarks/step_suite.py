# SPDX-License-Identifier: Apache-2.0
"""The suite of guided steps: whole runs on one denoiser, the same runs in CUDA graphs, result file and table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.results import RESULTS, write_json
from benchmarks.sdxl import REDUCED, SDXL, TINY, Size
from benchmarks.step_graphs import add_graphs
from benchmarks.steps import Bench, Way, counted, measure
from segkern.core.private_apis import dynamo_settings

FOLDER = RESULTS / "step"


def run_steps(
    device: torch.device,
    chosen: Sequence[Way],
    steps: int,
    rounds: int,
    out: Path | None = None,
    size: Size | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Path, dict[str, Any]]:
    """Measure and write ``benchmarks/results/step/<device>.json``; a non-default size is added to the name."""
    usual, dtype = (SDXL, torch.bfloat16) if device.type == "cuda" else (REDUCED, torch.float32)
    operations = counted(SDXL) if size is None else {}
    size = size or usual
    bench = Bench(size, device, dtype)
    environment = machine.described(device)
    result: dict[str, Any] = {
        "environment": environment,
        "size": size.name,
        "latent": list(size.latent),
        "dtype": str(dtype).removeprefix("torch."),
        "steps": steps,
        "rounds": 0,
        "complete": False,
        "sdxl_flops": operations,
        "rows": [],
    }
    case = "" if size is usual else f"-{size.name}"
    path = out or FOLDER / f"{machine.slug(environment['device'])}{case}.json"
    # Every way compiles the same denoiser. Beyond a limit, it would run eagerly but be reported as compiled.
    limits = {"recompile_limit": 1000, "accumulated_recompile_limit": 1000, "fail_on_recompile_limit_hit": True}
    with dynamo_settings(**limits):
        for rows in measure(bench, chosen, steps, rounds, progress):
            result |= {"rows": rows, "rounds": result["rounds"] + 1}
            write_json(path, result)
    if device.type == "cuda" or size.name == TINY.name:  # other devices have no graphs, and the runs are checked above
        progress("CUDA graphs")
        add_graphs(bench, result["rows"], chosen, rounds)
    result["complete"] = True
    write_json(path, result)
    return path, result


HEADINGS = (
    *("run", "ms per step", "x plain", "p20 to p80", "CPU, x plain", "graph, ms", "graph, x plain", "x counted"),
    *("s per run", "peak MiB", "host ms", "error"),
)


def lines(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows as text."""
    shown = []
    for row in result["rows"]:
        if row["reason"] is not None:
            shown.append([row["way"], f"not timed: {row['reason']}", *[""] * (len(HEADINGS) - 2)])
            continue
        ratio = row["ratio"]
        shown.append(
            [
                row["way"],
                f"{row['ms']['median']:.4g}",
                _median(ratio),
                "" if ratio is None else f"{ratio['p20']:.3f} to {ratio['p80']:.3f}",
                _median(row["cpu_ratio"]),
                _median(row["graph_ms"]),
                _median(row["graph_ratio"]),
                "" if row["counted"] is None else f"{row['counted']:.3f}",
                f"{row['run_seconds']:.3g}",
                *(x if isinstance(x, str) else f"{x:.4g}" for x in (row["peak_mib"], row["host_ms"])),
                "" if row["error"] is None else f"{row['error']:.1e}",
            ]
        )
    return shown


def _median(spread: dict[str, float] | str | None) -> str:
    return f"{spread['median']:.3f}" if isinstance(spread, dict) else spread or ""

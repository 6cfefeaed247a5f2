# SPDX-License-Identifier: Apache-2.0
"""``docs/compiled.md``: what the compiled kernels use on each target, and the bound that follows for attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.estimate import RATES, estimate

_KERNELS = {
    "_tiled_attention_kernel": "Blur and attention in one pass",
    "_split_attention_kernel": "Few query rows, keys split over programs: infinite sigma and coarse queries",
    "_combine_splits_kernel": "The splits of a row combined",
    "_attention_energy_kernel": "Energies of rows, and the statistics that masses take",
    "_attention_mass_kernel": "Masses of keys",
    "_gaussian_blur_kernel": "Separable blur, one axis",
}


def page(found: Mapping[str, Any]) -> str:
    """The page as markdown.

    Args:
        found: what ``python -m benchmarks.compiled --save`` wrote.
    """
    made = found["environment"]
    parts = [
        "# What the compiled kernels use",
        f"Compiled ahead of time without a GPU: triton {made['triton']}, commit `{made['commit']}`, by `python -m "
        "benchmarks.compiled --save`. No kernel spills registers or uses local memory on any target, which "
        "`tests/kernels/test_compile.py` holds them to on every run.",
        "The bound counts one pass of the loop over keys in the compiled code (`benchmarks/estimate.py`): products at "
        "the matrix units' data-sheet rate, exponentials, issued instructions, bytes from L2. It ranks tiles; it is no "
        "measurement, and nothing here has been timed on a GPU. Latencies, barriers and the blur are not in it. "
        "*max* is the part of the device's peak that the bound leaves.",
    ]
    slowest = max(found["kernels"], key=lambda record: record["compile_seconds"])
    took = [record["compile_seconds"] for record in found["kernels"]]
    parts.append(
        f"A kernel's first call compiles it, once for each head dimension, dtype and kind of mask. Of one core of "
        f"{made['processor']} "
        f"that takes {median(took):.1f} s of its time as the median of {len(took)}, {max(took):.1f} s at most "
        f"(`{slowest['kernel']}`, D = {slowest['head_dim']}, {slowest['dtype']}, {slowest['target']})."
    )
    for kernel, title in _KERNELS.items():
        records = [record for record in found["kernels"] if record["kernel"] == kernel]
        if not records:
            continue
        looping = any(record["loop"] for record in records)
        parts += [f"## {title}", _looping_table(records) if looping else _table(records)]
    return "\n\n".join(parts) + "\n"


def _looping_table(records: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| target | D | dtype | tile | warps | registers | shared, KB | matrix | loop: issued, exp2 | programs | "
        "bound, TFLOP/s | max | limit |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for record in records:
        tile, loop = record["tile"], record["loop"]
        bound = estimate(record)
        cells = [
            f"{tile['BLOCK_M']}x{tile['BLOCK_N']}" + ", descriptors" * tile.get("descriptors", 0),
            str(tile["num_warps"]),
            *_resources(record),
            ", ".join(f"{count} {name}" for name, count in record["matrix_instructions"].items()) or "none",
            f"{loop['instructions']}, {loop['exponentials']}" if loop else "",
            *(
                (str(bound.programs), f"{bound.tflops:.0f}", f"{bound.tflops / RATES[record['target']].peak:.0%}")
                if bound
                else ("", "", "")
            ),
            bound.limit if bound else "",
        ]
        lines.append(f"{_name(record)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["| target | D | dtype | registers | shared, KB |", "| --- | ---: | --- | ---: | ---: |"]
    lines += [f"{_name(record)} | " + " | ".join(_resources(record)) + " |" for record in records]
    return "\n".join(dict.fromkeys(lines))  # masks do not reach these kernels: rows that differ in them alone are one


def _name(record: Mapping[str, Any]) -> str:
    blur = {"before": ", blurred before"}.get(record["blur"], "")
    notes = ", mask" * record["masked"] + blur
    return f"| {record['target']} | {record['head_dim']} | {record['dtype']}{notes}"


def _resources(record: Mapping[str, Any]) -> tuple[str, str]:
    return str(record["registers"]), f"{record['shared_bytes'] / 1024:.0f}"

# SPDX-License-Identifier: Apache-2.0
"""The summary of a recorded run: means over heads and samples, energy maps, and their JSON file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from segkern.analysis.energy import OverSigma
    from segkern.integrations.diffusers import EnergyRecorder, LayerEnergy

_DIGITS = 4  # decimal places of the maps, in nats


def summary(recorder: EnergyRecorder, details: dict[str, object], boundary: str) -> dict[str, Any]:
    """Return the data of one pipeline run that :func:`write` stores.

    Args:
        recorder: Recorder with the records of one run.
        details: Settings of the run, by name.
        boundary: Boundary of the blurs.

    Returns:
        ``details``, ``boundary``, ``sigmas`` and ``layers``. Each layer has its names, ``heads``, ``grid``, ``energy``
        (the mean over the queries at each step) and ``at``. ``at`` maps a step number to ``map_by_query`` and
        ``map_by_key``, which are unblurred, and to lists over the sigmas. Energies are in nats per query or key,
        determinants per logit.
    """
    layers = []
    for layer in recorder.layers:
        records = [record for record in recorder.records if record.layer.module == layer.module]
        if not records:
            continue
        grid = records[0].layer.grid
        assert grid is not None
        layers.append(
            {
                "name": layer.name,
                "module": layer.module,
                "part": layer.part,
                "heads": layer.heads,
                "grid": [grid.height, grid.width],
                "energy": [record.by_query.energies[0].mean().item() for record in records],
                "at": {str(record.step): _at(record) for record in records if record.by_key is not None},
            }
        )
    return {**details, "boundary": boundary, "sigmas": list(recorder.sigmas), "layers": layers}


def _at(record: LayerEnergy) -> dict[str, Any]:
    assert record.by_key is not None
    by_query = record.by_query
    return {
        "map_by_query": _map(record.map()),
        "map_by_key": _map(record.map(cut="by_key")),
        "mean": _means(by_query.mean),
        "variance": _means(by_query.variance),
        "query_variance": _means(by_query.query_variance),
        "by_query": _cut(by_query, record),
        "by_key": _cut(record.by_key, record),
    }


def _cut(cut: OverSigma, record: LayerEnergy) -> dict[str, Any]:
    assert record.layer.grid is not None
    tokens = record.layer.grid.tokens
    return {
        "energy": _means(cut.energies.mean(dim=-1)),
        "log_curvature": {name: _means(values / tokens**2) for name, values in cut.log_curvature.items()},
    }


def _means(values: torch.Tensor) -> list[float]:
    """Return the means over samples and heads of ``[sigmas, samples, heads]``."""
    return [float(value) for value in values.flatten(1).mean(dim=1)]


def _map(energies: torch.Tensor) -> list[list[float]]:
    """Return the rounded mean over samples and heads of ``[samples, heads, height, width]``."""
    return [[round(value, _DIGITS) for value in row] for row in energies.flatten(0, 1).mean(dim=0).tolist()]


def chosen_steps(run: dict[str, Any]) -> list[int]:
    """Return the steps at which all sigmas were recorded."""
    return sorted({int(step) for layer in run["layers"] for step in layer["at"]})


def write(path: Path, run: dict[str, Any]) -> None:
    """Write JSON with one line per entry and per layer. Infinite numbers become the strings "inf" and "-inf"."""
    lines = [f"{json.dumps(name)}: {_line(value)}" for name, value in run.items() if name != "layers"]
    layers = ",\n  ".join(map(_line, run["layers"]))
    path.write_text("{\n" + ",\n".join([*lines, f'"layers": [\n  {layers}\n]']) + "\n}\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """Read a summary that :func:`write` wrote."""
    run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return run | {name: from_json_values(run[name]) for name in ("sigmas", "layers") if name in run}


def _line(value: object) -> str:
    return json.dumps(json_values(value), ensure_ascii=False, allow_nan=False)


def json_values(value: object) -> object:
    """Return the value with numbers that JSON lacks replaced by strings, including inside dictionaries and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: json_values(entry) for name, entry in value.items()}
    return list(map(json_values, value)) if isinstance(value, (list, tuple)) else value


def from_json_values(value: object) -> object:
    """Undo :func:`json_values`."""
    if value in ("inf", "-inf", "nan"):
        return float(str(value))
    if isinstance(value, dict):
        return {name: from_json_values(entry) for name, entry in value.items()}
    return list(map(from_json_values, value)) if isinstance(value, list) else value


def table_rows(run: dict[str, Any], step: int) -> list[tuple[str, ...]]:
    """Return one table row per layer at one step: its energy, and the increase at each sigma."""
    rows = []
    for layer in run["layers"]:
        if str(step) in layer["at"]:
            energy = layer["at"][str(step)]["by_query"]["energy"]
            rise = [f"{value - energy[0]:+.3f}" for value in energy[1:]]
            rows.append((layer["name"], "x".join(map(str, layer["grid"])), f"{energy[0]:.3f}", *rise))
    return rows


def sigma_label(sigma: float) -> str:
    """Return a sigma as text, with infinity as its symbol.

    Example:
        >>> [sigma_label(value) for value in (0.0, 0.5, math.inf)]
        ['0', '0.5', '∞']
    """
    return "∞" if math.isinf(sigma) else f"{sigma:g}"

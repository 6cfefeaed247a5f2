# SPDX-License-Identifier: Apache-2.0
"""Tile shapes tried on a real device: what does not compile or computes something wrong is out, the rest is timed.

Nothing is predicted. The result is a table of its own that names device and versions. Only ``install`` changes what
segkern takes: the tile that was fastest over all cases of a head dimension and dtype, if it beats the present one,
PyTorch's attention after our blur, if that beats the tile, and the separable blur inside attention's launch, if that
beats launches before it.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import checks, machine, timing
from benchmarks.cases import Case, Inputs
from benchmarks.providers import BLURS, PROVIDERS, Call
from benchmarks.results import describe_case
from segkern.kernels import _configs
from segkern.kernels import tiled_attention as kernel
from segkern.kernels._configs import Tile

_WORTH = 0.02  # of the time: less is noise

_ROWS, _KEYS, _WARPS, _STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)


def candidates(case: Case, device: torch.device) -> tuple[Tile, ...]:
    """The present tile first, then those of every family's table for this dtype, then their neighbours.

    Neighbours have the present tile's column block, and its register limit or none; where the hardware copies blocks
    by descriptors, some have those.
    """
    now = _configs.attention_tile(device, case.head_dim, case.dtype, False)
    size = case.dtype.itemsize
    tables = [tile for family in _configs._ATTENTION.values() for _, tile in family[size]]
    limits = {None, now.max_registers}
    around = [
        Tile(rows, keys, now.block_c, warps, stages, limit)
        for rows, keys, warps, stages in itertools.product(_ROWS, _KEYS, _WARPS, _STAGES)
        for limit in limits
    ]
    described = [
        Tile(rows, keys, now.block_c, warps, stages, None, True)
        for rows, keys, warps, stages in itertools.product(_ROWS, _KEYS[1:], _WARPS, _STAGES[:2])
        if _configs.has_descriptors(_configs.architecture(device))
    ]
    return tuple(dict.fromkeys([now, *tables, *around, *described]))


def tune(case: Case, sigma: float, tiles: Sequence[Tile], device: torch.device, rounds: int) -> dict[str, Any]:
    """Every tile's time or the reason why it has none, the fastest first.

    The result has ``environment``, ``clocks``, the shape, ``sigma``, ``now`` (the present tile), ``sdpa_ms`` (our blur,
    then PyTorch's attention), ``tiles``: a list of ``tile``, ``error``, ``reason``, and ``ms`` with median, p20 and
    p80; and ``blurs``, by the name of its provider: ``reason`` and ``ms`` with the fastest tile.
    """
    inputs = case.inputs(device)
    provider = PROVIDERS["triton"]
    wanted = checks.expected(inputs, sigma, provider.kind)
    found: list[dict[str, Any]] = []
    calls: dict[str, Call] = {}
    for number, tile in enumerate(tiles):
        call = _with_tile(provider.make(inputs, sigma), tile)
        row: dict[str, Any] = {"tile": asdict(tile), "error": None, "reason": None, "ms": None}
        found.append(row)
        try:
            row["error"], wrong = checks.judge(provider, call(), inputs, wanted)
            row["reason"] = wrong or None
        except Exception as error:  # a compiler raises what it likes; it is this tile's answer
            row["reason"] = timing.first_line(error)
        if row["reason"] is None:
            calls[str(number)] = call
    other = PROVIDERS["blur + sdpa"].make(inputs, sigma)
    other()
    calls["sdpa"] = other
    samples, _ = timing.time_calls(calls, device, rounds, dict.fromkeys(calls, "tiles are timed call by call"))
    clock = timing.headline(device)
    sdpa_ms = timing.spread(samples.pop("sdpa")[clock])
    for name, clocks in samples.items():
        found[int(name)]["ms"] = timing.spread(clocks[clock])
    now = asdict(tiles[0])
    found.sort(key=lambda row: row["ms"]["median"] if row["ms"] else float("inf"))
    best = next((Tile(**row["tile"]) for row in found if row["ms"]), None)
    return {
        "environment": machine.described(device),
        "clocks": machine.clocks(device),
        "architecture": _configs.architecture(device),
        **describe_case(case),
        "sigma": f"{sigma:g}",
        "rounds": rounds,
        "clock": clock,
        "now": now,
        "sdpa_ms": sdpa_ms,
        "tiles": found,
        "blurs": {} if best is None else _blurs(inputs, sigma, best, wanted, device, rounds),
    }


def _blurs(
    inputs: Inputs, sigma: float, tile: Tile, wanted: torch.Tensor, device: torch.device, rounds: int
) -> dict[str, dict[str, Any]]:
    """The ways to blur queries, with one tile."""
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name in BLURS:
        provider = PROVIDERS[name]
        call = _with_tile(provider.make(inputs, sigma), tile)
        found[name] = {"reason": None, "ms": None}
        try:
            found[name]["reason"] = checks.judge(provider, call(), inputs, wanted)[1] or None
        except Exception as error:
            found[name]["reason"] = timing.first_line(error)
        if found[name]["reason"] is None:
            calls[name] = call
    samples, _ = timing.time_calls(calls, device, rounds, dict.fromkeys(calls, "tiles are timed call by call"))
    for name, clocks in samples.items():
        found[name]["ms"] = timing.spread(clocks[timing.headline(device)])
    return found


def _with_tile(call: Call, tile: Tile) -> Call:
    """The call with the attention kernel's tile put in place of the table's."""

    def run() -> torch.Tensor:
        with patch.object(kernel, "attention_tile", lambda *_: tile):
            return call()

    return run


def write(path: Path, tuned: Sequence[dict[str, Any]]) -> None:
    """All shapes as one JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(tuned), indent=1) + "\n", encoding="utf-8")


def install(tuned: Sequence[dict[str, Any]], path: Path = _configs.TUNED) -> list[str]:
    """Put what was faster into the table that segkern reads; says what it did, a line per head dimension and dtype.

    Where several cases share a head dimension and dtype, a tile must be right in all of them, and counts with the
    geometric mean of its times over the present tile's. It must be faster by ``_WORTH`` at least.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    said = []
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for one in tuned:
        groups.setdefault((one["architecture"], one["dtype"], one["head_dim"]), []).append(one)
    for (arch, dtype, head_dim), cases in groups.items():
        what = f"{arch}, {dtype}, head dimension {head_dim}"
        ratios = [_ratios(one) for one in cases]
        shared = set.intersection(*(set(found) for found in ratios))
        if not shared:
            said.append(f"{what}: nothing is known, the present tile has no time")
            continue
        gains = {tile: 1 - _mean(found[tile] for found in ratios) for tile in shared}
        now = Tile(**cases[0]["now"])
        best = max(gains, key=lambda tile: gains[tile])
        best = best if gains[best] >= _WORTH else now
        sdpa = 1 - _mean(one["sdpa_ms"]["median"] / _times(one)[best] for one in cases)
        together = 1 - _mean(_together(one) for one in cases)
        if best == now and max(sdpa, together) < _WORTH:
            said.append(f"{what}: all stays, nothing is faster by {_WORTH:.0%}")
            continue
        environment = cases[0]["environment"]
        entry = {"tile": asdict(best), "gain": round(gains[best], 4), "sdpa": sdpa >= _WORTH}
        entry |= {"sdpa_gain": round(sdpa, 4), "together": together >= _WORTH, "together_gain": round(together, 4)}
        entry |= {"cases": [one["case"] for one in cases]}
        entry |= {name: environment[name] for name in ("device", "torch", "triton", "commit")}
        table.setdefault(arch, {}).setdefault(dtype, {})[str(head_dim)] = entry
        said.append(f"{what}: {best} is {gains[best]:.1%} faster than the present tile")
        if entry["sdpa"]:
            said.append(f"{what}: blurring first and PyTorch's attention are {sdpa:.1%} faster than that")
        if entry["together"]:
            said.append(f"{what}: the blur is {together:.1%} faster inside attention's launch than before it")
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return said


def _mean(ratios: Iterable[float]) -> float:
    """Geometric mean."""
    return statistics.geometric_mean(ratios)


def _together(one: dict[str, Any]) -> float:
    """Time with the blur inside attention's launch over that with launches before; 1 where either is not known."""
    together, before = (one["blurs"].get(f"triton {how}", {}).get("ms") for how in ("together", "before"))
    return float(together["median"] / before["median"]) if together and before else 1.0


def _times(one: dict[str, Any]) -> dict[Tile, float]:
    """Milliseconds of every right tile."""
    return {Tile(**row["tile"]): row["ms"]["median"] for row in one["tiles"] if row["ms"]}


def _ratios(one: dict[str, Any]) -> dict[Tile, float]:
    """Every right tile's time over the present one's; nothing where the present one has no time."""
    times = _times(one)
    now = times.get(Tile(**one["now"]))
    return {} if now is None else {tile: ms / now for tile, ms in times.items()}


def why_not(inputs_device: torch.device, case: Case, sigma: float) -> str | None:
    """Why the kernel cannot run for a case there."""
    empty = torch.empty(0, device=inputs_device, dtype=case.dtype)
    return PROVIDERS["triton"].why_not(Inputs(case, empty, empty, empty), sigma)

# SPDX-License-Identifier: Apache-2.0
"""Tuning of attention on a real device: time tile shapes and blurs, except those that fail to compile or are wrong.

Nothing is predicted. ``screen`` times every tile shape in one case. ``confirm`` takes the tile that was fastest over
all cases of a head dimension and dtype, and times it again together with the current one, with every way to blur, and
PyTorch's attention, because the fastest of a hundred is partly luck. Only ``install`` changes the tiles that segkern
uses, based on the results of ``confirm``.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks import checks, machine, timing
from benchmarks.cases import Case, Inputs
from benchmarks.providers import BLURS, PROVIDERS, Call
from benchmarks.results import describe_case
from segkern.kernels import _configs, _routes
from segkern.kernels import unmasked_attention as kernel
from segkern.kernels._configs import Tile

TABLE = _configs.TUNED  # the table that segkern reads
_WORTH = 0.02  # minimum relative gain; less is noise

_ROWS, _KEYS, _WARPS, _STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
_SDPA = {"default": "blur + sdpa", "flash": "blur + sdpa flash", "cudnn": "blur + sdpa cudnn"}
_PROLOGUE, _BEFORE = BLURS

Record = dict[str, Any]


def candidates(case: Case, device: torch.device) -> tuple[Tile, ...]:
    """Return the current tile, then those of every family's table for this dtype, then their neighbours.

    Neighbours have the current tile's column block, and its register limit or none. On hardware that copies blocks by
    descriptors, some use descriptors.
    """
    now = _configs.attention_tile(_configs.architecture(device), case.head_dim, case.dtype)
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
        if _configs.has_descriptors(_configs.architecture(device)) and case.head_dim * size % 16 == 0
    ]
    return tuple(dict.fromkeys([now, *tables, *around, *described]))


def screen(case: Case, sigma: float, tiles: Sequence[Tile], device: torch.device, rounds: int) -> Record:
    """Return every tile's time, or the reason why it was not timed, fastest first.

    The result has ``environment``, the shape, ``sigma``, ``now`` (the current tile) and ``tiles``: a list of ``tile``,
    ``blur`` (the place that segkern would choose), ``error``, ``reason``, and ``ms`` with median, p20 and p80.
    """
    inputs = case.inputs(device)
    times = _time(tile_calls(inputs, sigma, tiles, device), inputs, sigma, device, rounds)
    rows = [
        {"tile": asdict(tile), "blur": _cheaper_blur(case, sigma, tile, device), **times[str(tile)]} for tile in tiles
    ]
    rows.sort(key=lambda row: row["ms"]["median"] if row["ms"] else float("inf"))
    return _described(case, sigma, device, rounds) | {"now": asdict(tiles[0]), "tiles": rows}


def tile_calls(inputs: Inputs, sigma: float, tiles: Sequence[Tile], device: torch.device) -> dict[str, Call]:
    """Return a call for each tile, keyed by its description, with the blur that segkern would choose for it."""
    case = inputs.case
    return {
        str(tile): _with_tile(_cheaper_blur(case, sigma, tile, device), inputs, sigma, tile)
        for tile in dict.fromkeys(tiles)
    }


def confirm(case: Case, sigma: float, best: Tile, device: torch.device, rounds: int) -> Record:
    """Time the current tile and the best one with every way to blur, and our blur before PyTorch's attention.

    The result has the entries of :func:`screen` except ``tiles``, and in addition ``best``, ``blur`` (the place that
    segkern would choose for each of the two) and ``calls``. ``calls`` has ``error``, ``reason`` and ``ms`` by ``now``
    or ``best`` and the name of the blur's provider, or by ``sdpa`` and a backend.
    """
    inputs = case.inputs(device)
    now = _configs.attention_tile(_configs.architecture(device), case.head_dim, case.dtype)
    tiles = {"now": now, "best": best}
    calls = {
        f"{which}, {blur}": _with_tile(blur, inputs, sigma, tile) for which, tile in tiles.items() for blur in BLURS
    }
    calls |= {f"sdpa {backend}": PROVIDERS[name].make(inputs, sigma) for backend, name in _SDPA.items()}
    return _described(case, sigma, device, rounds) | {
        "now": asdict(now),
        "best": asdict(best),
        "blur": {which: _cheaper_blur(case, sigma, tile, device) for which, tile in tiles.items()},
        "calls": _time(calls, inputs, sigma, device, rounds),
    }


def _described(case: Case, sigma: float, device: torch.device, rounds: int) -> Record:
    return {
        "environment": machine.described(device),
        "architecture": _configs.architecture(device),
        **describe_case(case),
        "sigma": f"{sigma:g}",
        "rounds": rounds,
        "clock": timing.headline(device),
    }


def _cheaper_blur(case: Case, sigma: float, tile: Tile, device: torch.device) -> str:
    """Return the provider name of the place to blur, prologue or before, with the lower estimated cost for a tile."""
    arch, sigmas = _configs.architecture(device), (sigma,) * case.third
    sizes = case.heads, case.head_dim, case.dtype.itemsize, tile.block_m
    place = _routes.estimate_blur(arch, case.grid, sigmas, "reflect", *sizes).place
    return _BEFORE if place == _routes.BlurPlace.BEFORE else _PROLOGUE


def _with_tile(blur: str, inputs: Inputs, sigma: float, tile: Tile) -> Call:
    """Return the provider's call with this tile for the attention kernel instead of the table's."""
    call = PROVIDERS[blur].make(inputs, sigma)

    def run() -> torch.Tensor:
        with patch.object(kernel, "attention_tile", lambda *_: tile):
            return call()

    return run


def _time(
    calls: Mapping[str, Call], inputs: Inputs, sigma: float, device: torch.device, rounds: int
) -> dict[str, Record]:
    """Return ``error``, ``reason`` and ``ms`` of each call. Only correct results are timed."""
    wanted = checks.expected(inputs, sigma, "attention")
    rows: dict[str, Record] = {}
    right: dict[str, Call] = {}
    for name, call in calls.items():
        row: Record = {"error": None, "reason": None, "ms": None}
        rows[name] = row
        try:
            row["error"], wrong = checks.judge(PROVIDERS[_BEFORE], call(), inputs, wanted)
            row["reason"] = wrong or None
        except Exception as error:  # a compiler can raise anything; the error goes into the row
            row["reason"] = timing.first_line(error)
        if row["reason"] is None:
            right[name] = call
    no_graph = dict.fromkeys(right, "tiles are timed call by call")
    samples, _ = timing.time_calls(right, device, rounds, no_graph) if right else ({}, {})
    for name, clocks in samples.items():
        rows[name]["ms"] = timing.spread(clocks[timing.headline(device)])
    return rows


def groups(records: Iterable[Record]) -> dict[tuple[str, str, int], list[Record]]:
    """Group records that share a table entry: by architecture, dtype and head dimension."""
    grouped: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        grouped.setdefault((record["architecture"], record["dtype"], record["head_dim"]), []).append(record)
    return grouped


def fastest(screened: Sequence[Record]) -> Tile | None:
    """Return the tile that is correct in all cases and has the lowest geometric mean of its ratios to the current."""
    ratios = [_ratios(record) for record in screened]
    shared = set.intersection(*map(set, ratios))
    return min(shared, key=lambda tile: _mean(case[tile] for case in ratios)) if shared else None


def _ratios(record: Record) -> dict[Tile, float]:
    """Return every correct tile's time divided by the current one's, or nothing if the current one was not timed."""
    times = {Tile(**row["tile"]): row["ms"]["median"] for row in record["tiles"] if row["ms"]}
    now = times.get(Tile(**record["now"]))
    return {} if now is None else {tile: ms / now for tile, ms in times.items()}


def install(confirmed: Sequence[Record], path: Path = _configs.TUNED) -> list[str]:
    """Write faster configurations to the table that segkern reads. Return a line per head dimension and dtype.

    A tile wins if it has the lowest geometric mean of its times over the current tile's, with a gain of at least
    ``_WORTH``. A tile that is inaccurate with either way to blur is excluded, regardless of which way was timed.
    PyTorch's attention after our blur is compared with the winning tile in the same way, separately for each size class
    and backend.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    said = []
    for (arch, dtype, head_dim), cases in groups(confirmed).items():
        what = f"{arch}, {dtype}, head dimension {head_dim}"
        times = _tile_times(cases)
        if "now" not in times:
            said.append(f"{what}: unchanged, the current tile is inaccurate or does not run")
            continue
        gain = _gain(times.get("best", times["now"]), times["now"])
        winner = "best" if gain >= _WORTH else "now"
        tile = Tile(**cases[0][winner])
        sdpa, gains = _faster_sdpa(cases, times[winner])
        entry = {"tile": asdict(tile), "sdpa": sdpa, "gain": round(gain if winner == "best" else 0.0, 4)}
        entry |= {"sdpa_gain": gains, "cases": [case["case"] for case in cases]}
        entry |= {name: cases[0]["environment"][name] for name in ("device", "torch", "triton", "commit")}
        default = _configs.default_tile(arch, head_dim, getattr(torch, dtype))
        entries = table.setdefault(arch, {}).setdefault(dtype, {})
        if not sdpa and winner == "now" and tile == default:
            entries.pop(str(head_dim), None)
        else:
            entries[str(head_dim)] = entry
        said.append(f"{what}: {_words(winner, tile, gain, sdpa, gains)}")
    table = {arch: {dtype: by_dim for dtype, by_dim in dtypes.items() if by_dim} for arch, dtypes in table.items()}
    table = {arch: dtypes for arch, dtypes in table.items() if dtypes}
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    return said


def _tile_times(cases: Sequence[Record]) -> dict[str, list[float]]:
    """Return the times of all cases by tile, ``now`` or ``best``, only for tiles that are correct in every case."""
    times: dict[str, list[float]] = {}
    for which in ("now", "best"):
        if all(case["calls"][f"{which}, {blur}"]["reason"] is None for case in cases for blur in BLURS):
            chosen = [case["calls"][f"{which}, {case['blur'][which]}"] for case in cases]
            times[which] = [call["ms"]["median"] for call in chosen]
    return times


def _faster_sdpa(cases: Sequence[Record], ours: Sequence[float]) -> tuple[dict[str, str], dict[str, float]]:
    """Return, by size class, the backend that is faster than our times, if any, and its gain."""
    faster, gains = {}, {}
    for size in dict.fromkeys(_configs.size_class(case["tokens"]) for case in cases):
        some = [(case["calls"], ms) for case, ms in zip(cases, ours, strict=True) if _in_class(case, size)]
        by_backend = {
            backend: _gain([calls[f"sdpa {backend}"]["ms"]["median"] for calls, _ in some], [ms for _, ms in some])
            for backend in _SDPA
            if all(calls[f"sdpa {backend}"]["reason"] is None for calls, _ in some)
        }
        best = max(by_backend, key=lambda backend: by_backend[backend], default=None)
        if best is not None and by_backend[best] >= _WORTH:
            faster[size], gains[size] = best, round(by_backend[best], 4)
    return faster, gains


def _in_class(case: Record, size: str) -> bool:
    return _configs.size_class(case["tokens"]) == size


def _gain(times: Sequence[float], over: Sequence[float]) -> float:
    return 1 - _mean(a / b for a, b in zip(times, over, strict=True))


def _words(winner: str, tile: Tile, gain: float, sdpa: Mapping[str, str], gains: Mapping[str, float]) -> str:
    if winner == "now":
        said = f"{tile} stays, no tile is faster by {_WORTH:.0%}"
    else:
        said = f"{tile} is {gain:.1%} faster than the current tile"
    for size, backend in sdpa.items():
        said += f"; {size}: blurring first and PyTorch's attention ({backend}) are {gains[size]:.1%} faster than that"
    return said


def _mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean."""
    return statistics.geometric_mean(ratios)


def why_not(inputs_device: torch.device, case: Case, sigma: float) -> str | None:
    """Return why the kernel cannot run a case on a device, or None."""
    empty = torch.empty(0, device=inputs_device, dtype=case.dtype)
    return PROVIDERS["triton"].why_not(Inputs(case, empty, empty, empty), sigma)

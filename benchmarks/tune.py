# SPDX-License-Identifier: Apache-2.0
"""Ways to compute attention tried on a real device: what does not compile or errs is out, the rest is timed.

Nothing is predicted. ``screen`` times every tile shape in one case. ``confirm`` takes the one that was fastest over all
cases of a head dimension and dtype, and times it once more beside the present one, with every way to blur and beside
PyTorch's attention: the fastest of a hundred is partly luck. Only ``install`` changes what segkern takes, by what
``confirm`` found.
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

TABLE = _configs.TUNED  # what segkern reads
_WORTH = 0.02  # of the time: less is noise

_ROWS, _KEYS, _WARPS, _STAGES = (64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
_SDPA = {"default": "blur + sdpa", "flash": "blur + sdpa flash", "cudnn": "blur + sdpa cudnn"}
_PROLOGUE, _BEFORE = BLURS

Record = dict[str, Any]


def candidates(case: Case, device: torch.device) -> tuple[Tile, ...]:
    """The present tile first, then those of every family's table for this dtype, then their neighbours.

    Neighbours have the present tile's column block, and its register limit or none; where the hardware copies blocks
    by descriptors, some have those.
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
    """Every tile's time or the reason why it has none, the fastest first.

    The result has ``environment``, the shape, ``sigma``, ``now`` (the present tile) and ``tiles``: a list
    of ``tile``, ``blur`` (which the tile would get), ``error``, ``reason``, and ``ms`` with median, p20 and p80.
    """
    inputs = case.inputs(device)
    times = _time(tile_calls(inputs, sigma, tiles, device), inputs, sigma, device, rounds)
    rows = [
        {"tile": asdict(tile), "blur": _cheaper_blur(case, sigma, tile, device), **times[str(tile)]} for tile in tiles
    ]
    rows.sort(key=lambda row: row["ms"]["median"] if row["ms"] else float("inf"))
    return _described(case, sigma, device, rounds) | {"now": asdict(tiles[0]), "tiles": rows}


def tile_calls(inputs: Inputs, sigma: float, tiles: Sequence[Tile], device: torch.device) -> dict[str, Call]:
    """A call with each tile, by the tile in words, with the blur that it would get."""
    case = inputs.case
    return {
        str(tile): _with_tile(_cheaper_blur(case, sigma, tile, device), inputs, sigma, tile)
        for tile in dict.fromkeys(tiles)
    }


def confirm(case: Case, sigma: float, best: Tile, device: torch.device, rounds: int) -> Record:
    """The present tile and the best one with every way to blur, and our blur before PyTorch's attention.

    The result has what ``screen``'s has but for ``tiles``: ``best``, ``blur`` (which each of the two would get) and
    ``calls``: by ``now`` or ``best`` and the name of the blur's provider, or ``sdpa`` and a backend, ``error``,
    ``reason`` and ``ms``.
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
    """Prologue or before, whichever is estimated to cost less with a tile, by its provider's name."""
    arch, sigmas = _configs.architecture(device), (sigma,) * case.third
    sizes = case.heads, case.head_dim, case.dtype.itemsize, tile.block_m
    place = _routes.estimate_blur(arch, case.grid, sigmas, "reflect", *sizes).place
    return _BEFORE if place == _routes.BlurPlace.BEFORE else _PROLOGUE


def _with_tile(blur: str, inputs: Inputs, sigma: float, tile: Tile) -> Call:
    """The provider's call with the attention kernel's tile put in place of the table's."""
    call = PROVIDERS[blur].make(inputs, sigma)

    def run() -> torch.Tensor:
        with patch.object(kernel, "attention_tile", lambda *_: tile):
            return call()

    return run


def _time(
    calls: Mapping[str, Call], inputs: Inputs, sigma: float, device: torch.device, rounds: int
) -> dict[str, Record]:
    """``error``, ``reason`` and ``ms`` of each call: only those that are right are timed."""
    wanted = checks.expected(inputs, sigma, "attention")
    rows: dict[str, Record] = {}
    right: dict[str, Call] = {}
    for name, call in calls.items():
        row: Record = {"error": None, "reason": None, "ms": None}
        rows[name] = row
        try:
            row["error"], wrong = checks.judge(PROVIDERS[_BEFORE], call(), inputs, wanted)
            row["reason"] = wrong or None
        except Exception as error:  # a compiler raises what it likes; it is this call's answer
            row["reason"] = timing.first_line(error)
        if row["reason"] is None:
            right[name] = call
    no_graph = dict.fromkeys(right, "tiles are timed call by call")
    samples, _ = timing.time_calls(right, device, rounds, no_graph) if right else ({}, {})
    for name, clocks in samples.items():
        rows[name]["ms"] = timing.spread(clocks[timing.headline(device)])
    return rows


def groups(records: Iterable[Record]) -> dict[tuple[str, str, int], list[Record]]:
    """Records that share a table entry: by architecture, dtype and head dimension."""
    grouped: dict[tuple[str, str, int], list[Record]] = {}
    for record in records:
        grouped.setdefault((record["architecture"], record["dtype"], record["head_dim"]), []).append(record)
    return grouped


def fastest(screened: Sequence[Record]) -> Tile | None:
    """The tile that is right in all cases and has the lowest geometric mean of its times over the present tile's."""
    ratios = [_ratios(record) for record in screened]
    shared = set.intersection(*map(set, ratios))
    return min(shared, key=lambda tile: _mean(case[tile] for case in ratios)) if shared else None


def _ratios(record: Record) -> dict[Tile, float]:
    """Every right tile's time over the present one's; nothing where the present one has no time."""
    times = {Tile(**row["tile"]): row["ms"]["median"] for row in record["tiles"] if row["ms"]}
    now = times.get(Tile(**record["now"]))
    return {} if now is None else {tile: ms / now for tile, ms in times.items()}


def install(confirmed: Sequence[Record], path: Path = _configs.TUNED) -> list[str]:
    """Put what was faster into the table that segkern reads; says what it did, a line per head dimension and dtype.

    A tile wins by the lowest geometric mean of its times over the present tile's, by ``_WORTH`` at least; one that errs
    with either way to blur is out, whichever way was timed. PyTorch's attention after our blur wins over that tile in
    the same way, but for each size class and backend by itself.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    said = []
    for (arch, dtype, head_dim), cases in groups(confirmed).items():
        what = f"{arch}, {dtype}, head dimension {head_dim}"
        times = _tile_times(cases)
        if "now" not in times:
            said.append(f"{what}: nothing is changed, the present tile errs or does not run")
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
    """Times of all cases by tile, ``now`` or ``best``; only of those that are right in every case."""
    times: dict[str, list[float]] = {}
    for which in ("now", "best"):
        if all(case["calls"][f"{which}, {blur}"]["reason"] is None for case in cases for blur in BLURS):
            chosen = [case["calls"][f"{which}, {case['blur'][which]}"] for case in cases]
            times[which] = [call["ms"]["median"] for call in chosen]
    return times


def _faster_sdpa(cases: Sequence[Record], ours: Sequence[float]) -> tuple[dict[str, str], dict[str, float]]:
    """By size class the backend that is faster than our times, if one is, and its gain."""
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
        said = f"{tile} is {gain:.1%} faster than the present tile"
    for size, backend in sdpa.items():
        said += f"; {size}: blurring first and PyTorch's attention ({backend}) are {gains[size]:.1%} faster than that"
    return said


def _mean(ratios: Iterable[float]) -> float:
    """Geometric mean."""
    return statistics.geometric_mean(ratios)


def why_not(inputs_device: torch.device, case: Case, sigma: float) -> str | None:
    """Why the kernel cannot run for a case there."""
    empty = torch.empty(0, device=inputs_device, dtype=case.dtype)
    return PROVIDERS["triton"].why_not(Inputs(case, empty, empty, empty), sigma)

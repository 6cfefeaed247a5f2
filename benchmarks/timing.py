# SPDX-License-Identifier: Apache-2.0
"""Timing of calls: every round times all calls under the same conditions, in a different order each round.

There are four clocks. A CPU has only the first:

* ``wall``: from the call to the end of its work, including host time.
* ``hot``: on the device, right after the same call, so L2 contains those inputs and outputs that fit, as after the
  projections of a real layer.
* ``cold``: on the device, after L2 was overwritten.
* ``graph``: on the device, for one call in a CUDA graph of several, which excludes host time.

Before ``hot`` and ``cold``, the device is kept busy while the host prepares the call. Clock rates are never changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from benchmarks.providers import Call

CLOCKS = ("wall", "hot", "cold", "graph")
_NOT_HERE = "not measured"
_FLUSH_MIB = 256  # or four times L2, if that is more
_CALLS_IN_A_GRAPH = 10  # maximum; fewer if together they take over a millisecond

_SLOW_MS = 1000.0  # a call on a CPU that takes at least this long
_ROUNDS_OF_SLOW = 2  # is timed only in the first rounds

Samples = dict[str, list[float]]  # clock -> milliseconds, one per round


def headline(device: torch.device) -> str:
    """Return the clock used for ratios and throughput."""
    return "hot" if device.type == "cuda" else "wall"


def time_calls(
    calls: Mapping[str, Call], device: torch.device, rounds: int, no_graph: Mapping[str, str] | None = None
) -> tuple[dict[str, Samples], dict[str, dict[str, str]]]:
    """Return the milliseconds of every call on every clock, and the reason for each missing clock.

    Args:
        calls: Calls that have run before.
        device: Device that they run on.
        rounds: Number of rounds. Each round times every call once per clock. On a CPU, calls that take seconds are
            timed only in the first two.
        no_graph: Names of calls that cannot be captured in a CUDA graph, with the reason.
    """
    names = list(calls)
    samples: dict[str, Samples] = {name: {} for name in names}
    missing: dict[str, dict[str, str]] = {name: {} for name in names}
    if device.type != "cuda":
        for turn in range(rounds):
            for name in shuffled(names, turn):
                if turn < _ROUNDS_OF_SLOW or samples[name]["wall"][0] < _SLOW_MS:
                    samples[name].setdefault("wall", []).append(wall(calls[name], device))
        for name in names:
            missing[name] = dict.fromkeys(CLOCKS[1:], _NOT_HERE)
        return samples, missing
    with torch.cuda.device(device):
        graphs = _captured(calls, no_graph or {}, missing)
        flush = _flush_buffer(device)
        for turn in range(rounds):
            for name in shuffled(names, turn):
                samples[name].setdefault("wall", []).append(wall(calls[name], device))
                for clock, before in (("cold", None), ("hot", calls[name])):
                    samples[name].setdefault(clock, []).append(_on_device(calls[name], flush, before))
                if name in graphs:
                    graph, held = graphs[name]
                    replayed = _on_device(graph.replay, flush, graph.replay)
                    samples[name].setdefault("graph", []).append(replayed / held)
    return samples, missing


def shuffled(names: Sequence[str], turn: int) -> list[str]:
    """Return the names in another order for every round, so a call does not always follow the same neighbour."""
    return [names[i] for i in np.random.default_rng(turn).permutation(len(names))]


def wall(call: Call, device: torch.device) -> float:
    """Return the milliseconds from the call to the end of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _flush_buffer(device: torch.device) -> torch.Tensor:
    """Return a buffer that does not fit L2."""
    size = max(_FLUSH_MIB * 2**20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.int8, device=device)


def _on_device(call: Callable[[], object], flush: torch.Tensor, before: Callable[[], object] | None) -> float:
    """Return milliseconds between two events around the call. L2 is overwritten, then ``before`` is called if given."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    flush.zero_()
    if before is not None:
        before()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def _captured(
    calls: Mapping[str, Call], no_graph: Mapping[str, str], missing: dict[str, dict[str, str]]
) -> dict[str, tuple[torch.cuda.CUDAGraph, int]]:
    """Return a graph for each call, and how many calls it contains. Calls that cannot be captured go to ``missing``."""
    graphs = {}
    for name, call in calls.items():
        if name in no_graph:
            missing[name]["graph"] = f"not measured: {no_graph[name]}"
            continue
        try:
            held = max(1, min(_CALLS_IN_A_GRAPH, round(1.0 / wall(call, torch.device("cuda")))))
            graphs[name] = capture(call, held)[0], held
        except RuntimeError as error:
            missing[name]["graph"] = f"not measured: {first_line(error)}"
    return graphs


def capture(call: Call, held: int = 1) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """Return a graph that contains a call ``held`` times, and the tensor that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate workspaces for the stream of the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(held):
            result = call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, result


def first_line(error: BaseException) -> str:
    """Return type and first line of an error, for a row."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def peak_mib(call: Call, device: torch.device) -> float | str:
    """Return the maximum memory that a call allocates, including its result."""
    if device.type != "cuda":
        return _NOT_HERE
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return median, 20th and 80th percentile.

    Example:
        >>> spread([1.0, 2.0, 3.0, 4.0, 6.0])
        {'median': 3.0, 'p20': 1.8, 'p80': 4.4}
    """
    p20, median, p80 = np.percentile(list(values), [20, 50, 80]).tolist()
    return {"median": median, "p20": round(p20, 12), "p80": round(p80, 12)}

# SPDX-License-Identifier: Apache-2.0
"""Time of one denoiser call as a CUDA graph, which excludes the host time, for each way to compute a guided step.

A graph contains the denoiser call and the sum of its predictions, without the scheduler. Its result is compared with
the official algorithm's, and a replay is compared with the call outside a graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0, PAGIdentitySelfAttnProcessor2_0

from benchmarks import timing
from benchmarks.official import OfficialProcessor, guided, processors
from benchmarks.providers import HOST_COPY
from benchmarks.sdxl import BRANCHES, conditions
from benchmarks.steps import SEG_SCALE, Bench, Row, Way, distance, limit_of, official_of, plain
from segkern.integrations.diffusers import guide

_TIMESTEP = 500.0
Call = Callable[[], torch.Tensor]


def add_graphs(bench: Bench, rows: Sequence[Row], chosen: Sequence[Way], rounds: int) -> None:
    """Add ``graph_ms`` and ``graph_ratio`` to the rows of ways that are not compiled, or a text that explains why."""
    by_name = {way.name: way for way in chosen if not way.compiled}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, Call]] = {}
    expected: dict[Way, torch.Tensor] = {}
    for row in rows:
        way = by_name.get(row["way"])
        if way is None or row["reason"] is not None:
            continue
        if way.kind == "official" and math.isfinite(way.sigma):
            row["graph_ms"] = f"not measured: {HOST_COPY}"
            continue
        try:
            row["graph_ms"] = _wrong(bench, way, expected) or "not measured"
            if row["graph_ms"] == "not measured" and bench.device.type == "cuda":
                graphs[way.name] = _captured(bench, way)
        except RuntimeError as error:  # the capture is not allowed
            row["graph_ms"] = f"not measured: {timing.first_line(error)}"
    if not graphs:
        return
    calls: dict[str, Any] = {name: graph.replay for name, (graph, _) in graphs.items()}
    samples, _ = timing.time_calls(calls, bench.device, rounds, dict.fromkeys(calls, "it is a graph"))
    for row in rows:
        if row["way"] in graphs:
            mine, its = samples[row["way"]]["hot"], samples.get(plain(by_name[row["way"]]))
            row["graph_ms"] = timing.spread(mine)
            if its is not None:
                row["graph_ratio"] = timing.spread(a / b for a, b in zip(mine, its["hot"], strict=True))


@contextmanager
def prediction_of(bench: Bench, way: Way) -> Iterator[Call]:
    """Return a denoiser call in some way, followed by the sum to the guided prediction."""
    pipe, given = bench.pipe, bench.given
    order = BRANCHES[way.cfg, way.kind in ("official", "pag")]
    text, added = conditions(bench.size, given, order)
    sample = torch.cat([given["latents"]] * len(order))
    timesteps = torch.tensor([_TIMESTEP], device=bench.device)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if way.kind == "segkern":
            guidance = guide(pipe, way.spec, share=way.share, cfg="batch" if way.cfg else "none")
            stack.enter_context(guidance)
            stack.enter_context(guidance.run(timesteps))
        elif way.kind == "official":
            blurring = partial(OfficialProcessor, sigma=way.sigma, branches=len(order))
            stack.enter_context(processors(pipe, bench.size, way.layers, blurring))
        elif way.kind == "pag":
            identity = PAGCFGIdentitySelfAttnProcessor2_0 if way.cfg else PAGIdentitySelfAttnProcessor2_0
            stack.enter_context(processors(pipe, bench.size, way.layers, lambda grid: identity()))

        def call() -> torch.Tensor:
            predictions: torch.Tensor = pipe.unet(
                sample, timesteps[0], encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
            )[0]
            if way.kind in ("official", "pag"):
                return guided(predictions, way.guidance_scale, SEG_SCALE)
            *unconditional, c = predictions.chunk(len(order))
            return unconditional[0] + way.guidance_scale * (c - unconditional[0]) if unconditional else c

        yield call


def _wrong(bench: Bench, way: Way, expected: dict[Way, torch.Tensor]) -> str | None:
    """Return why a way's prediction differs from the official algorithm's, or None; None also for non-segkern ways."""
    if way.kind != "segkern":
        return None
    official = official_of(way)
    if official not in expected:
        with prediction_of(bench, official) as call:
            expected[official] = call()
    with prediction_of(bench, way) as call:
        error = distance(call(), expected[official])
    limit = limit_of(bench.dtype)
    return None if error <= limit else f"not measured: {error:.1e} off the official prediction, above {limit:g}"


def _captured(bench: Bench, way: Way) -> tuple[torch.cuda.CUDAGraph, Call]:
    """Return a graph whose replay equals the call, and the call, which owns the tensors that the graph reads.

    Raises:
        RuntimeError: If the call cannot be captured, or a replay has another result.
    """
    with prediction_of(bench, way) as call:
        eager = call()
        graph, captured = timing.capture(call)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize(bench.device)
    error, limit = distance(captured, eager), limit_of(bench.dtype)
    if not error <= limit:
        raise RuntimeError(f"a replay is {error:.1e} off the call without a graph, above {limit:g}")
    return graph, call

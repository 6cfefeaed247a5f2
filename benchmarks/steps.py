# SPDX-License-Identifier: Apache-2.0
"""Cost of a guided step, measured in whole runs of stock pipelines. Every round runs all ways one after the other.

A step is the time between two calls of a pipeline's callback, so it includes the work of the pipeline and the
scheduler. The first step of a run, which makes tables, is excluded. Ratios are computed within the same round. The
ratio of floating-point operations, counted without data, is recorded too. A guided run is timed only if its latents
equal those of the official algorithm.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from diffusers import StableDiffusionXLPAGPipeline
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sdxl
from benchmarks.cases import select
from benchmarks.official import official_run
from benchmarks.sdxl import Size
from benchmarks.timing import shuffled, spread
from segkern.integrations.diffusers import PAG, SEG, guide
from segkern.ops import flops  # noqa: F401  registers our operators with the counter

GUIDANCE_SCALE = 5.0
SEG_SCALE = 3.0
COMPILED = ", compiled"
FULL = ", all branches in full"
SIGMAS = (3.0, 10.0, math.inf)
LAYERS = (("mid",), ("mid", "up"), ("up",))
# Maximum relative distance of latents from those of the official algorithm. Half precision rounds at every layer.
_SAME = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}

Row = dict[str, Any]


class Steps(NamedTuple):
    """Milliseconds of every step of a run except the first: wall time, and CPU time of all threads."""

    wall: list[float]
    cpu: list[float]


@dataclass(frozen=True)
class Way:
    """A way to run a pipeline: ``plain``, ``official`` SEG, ``pag`` of diffusers, or ``segkern`` with its ``family``.

    ``share`` is False if ``segkern`` computes every branch in full.
    """

    name: str
    kind: str
    cfg: bool
    sigma: float = 0.0
    layers: tuple[str, ...] = ()
    compiled: bool = False
    family: str = "SEG"
    share: bool = True

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the pipeline call."""
        return GUIDANCE_SCALE if self.cfg else 1.0

    @property
    def spec(self) -> SEG | PAG:
        """The guidance spec of ``segkern``."""
        if self.family == "PAG":
            return PAG(scale=SEG_SCALE, layers=self.layers)
        return SEG(scale=SEG_SCALE, sigma=self.sigma, layers=self.layers)


def official_of(way: Way) -> Way:
    """Return the way without segkern that has the same latents. It has no name."""
    kind = ("pag" if way.family == "PAG" else "official") if way.kind == "segkern" else way.kind
    return Way("", kind, way.cfg, way.sigma, way.layers)


def distance(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative distance in norm from the expected tensor, in float64."""
    return float((result.double() - expected.double()).norm() / expected.double().norm())


def limit_of(dtype: torch.dtype) -> float:
    """Return the maximum distance at which a result counts as equal to the official algorithm's."""
    return _SAME[dtype]


def ways(compiled: bool = False) -> tuple[Way, ...]:
    """Return all ways, starting with the two baselines. ``compiled`` adds each with a compiled denoiser."""
    chosen = [Way("no guidance", "plain", False), Way("CFG", "plain", True)]
    for cfg in (False, True):
        prefix = "CFG + " if cfg else ""
        chosen += [Way(f"{prefix}official SEG sigma {s:g}", "official", cfg, s, ("mid",)) for s in SIGMAS]
        chosen.append(Way(f"{prefix}PAG of diffusers", "pag", cfg, layers=("mid",)))
        chosen.append(Way(f"{prefix}segkern PAG mid", "segkern", cfg, layers=("mid",), family="PAG"))
        for layers in LAYERS:
            where = "+".join(layers)
            chosen += [Way(f"{prefix}segkern {where} sigma {s:g}", "segkern", cfg, s, layers) for s in SIGMAS]
        chosen.append(Way(f"{prefix}segkern mid sigma 10{FULL}", "segkern", cfg, 10.0, ("mid",), share=False))
    if compiled:
        chosen += [replace(way, name=f"{way.name}{COMPILED}", compiled=True) for way in chosen]
    return tuple(chosen)


def find_ways(patterns: Sequence[str], compiled: bool) -> tuple[Way, ...]:
    """Return the ways whose names match a glob, or all without globs; ``compiled`` adds compiled ones.

    Raises:
        ValueError: If a glob matches nothing. The message lists the names.
    """
    chosen = select("--providers", patterns, [way.name for way in ways()])
    return tuple(way for way in ways(compiled) if way.name.removesuffix(COMPILED) in chosen)


class Bench:
    """Pipelines on one denoiser, eager and compiled, and the inputs of their runs."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype, backend: str = "inductor") -> None:
        self.size = size
        self.device = device
        self.dtype = dtype
        unet = sdxl.denoiser(size, device, dtype)
        compiled = torch.compile(unet, dynamic=False, backend=backend)
        self.pipes = {False: sdxl.pipeline(unet), True: sdxl.pipeline(compiled)}
        options: dict[str, Any] = {"kind": StableDiffusionXLPAGPipeline, "pag_applied_layers": ["mid"]}
        self.pags = {False: sdxl.pipeline(unet, **options), True: sdxl.pipeline(compiled, **options)}
        self.pipe = self.pipes[False]
        self.given = sdxl.inputs(size, device, dtype)
        self._expected: dict[tuple[Way, int], torch.Tensor] = {}

    def run(self, way: Way, steps: int) -> tuple[torch.Tensor, Steps]:
        """Return the latents, and the milliseconds of every step except the first."""
        ends: list[tuple[float, float]] = []

        def after_step() -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            ends.append((time.perf_counter(), time.process_time()))

        latents = self.runner(way, steps, after_step)()
        passed = [[1e3 * (b - a) for a, b in itertools.pairwise(clock)] for clock in zip(*ends, strict=True)]
        return latents, Steps(*passed)

    def runner(self, way: Way, steps: int, after_step: Callable[[], None]) -> Callable[[], torch.Tensor]:
        """Return a function for a whole run, denoising only."""
        if way.kind == "official":
            options: dict[str, Any] = {"sigma": way.sigma, "layers": way.layers, "scale": SEG_SCALE, "steps": steps}
            options |= {"guidance_scale": way.guidance_scale, "after_step": after_step}
            return lambda: official_run(self.pipes[way.compiled], self.size, self.given, **options)

        def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            after_step()
            return values

        height, width = (8 * pixels for pixels in self.size.latent)
        call = {"height": height, "width": width, "num_inference_steps": steps, "output_type": "latent"}
        call |= {"guidance_scale": way.guidance_scale, "callback_on_step_end": callback, **self.given}
        if way.kind == "pag":
            return lambda: self.pags[way.compiled](pag_scale=SEG_SCALE, **call).images

        def run() -> torch.Tensor:
            pipe = self.pipes[way.compiled]
            with guide(pipe, way.spec, share=way.share) if way.kind == "segkern" else nullcontext():
                latents: torch.Tensor = pipe(**call).images
            return latents

        return run

    def check(self, way: Way, latents: torch.Tensor, steps: int) -> tuple[float | None, str | None]:
        """Return the distance of guided latents from the official algorithm's, and a message if it is too large."""
        if not latents.isfinite().all():
            return None, "its latents are not finite"
        official = official_of(way)
        key = official, steps
        if way.kind != "segkern":
            if not way.compiled:
                self._expected[key] = latents.double()
            return None, None
        if key not in self._expected:
            self._expected[key] = self.runner(official, steps, lambda: None)().double()
        error, limit = distance(latents, self._expected[key]), limit_of(self.dtype)
        of = "diffusers' PAG" if way.family == "PAG" else "the official algorithm"
        return error, None if error <= limit else f"{error:.1e} off the latents of {of}, above {limit:g}"


def counted(size: Size, names: Collection[str] | None = None) -> dict[str, float]:
    """Return the floating-point operations of one step, guided by segkern and plain, by name, optionally filtered."""
    pipe = sdxl.pipeline(sdxl.denoiser(size, "meta"))
    countable = [way for way in ways() if way.kind in ("plain", "segkern")]
    return {way.name: count(pipe, size, way) for way in countable if names is None or way.name in names}


def count(pipe: Any, size: Size, way: Way) -> float:
    """Return the floating-point operations of one step on a denoiser without data."""
    with ExitStack() as stack:
        if way.kind == "segkern":
            guidance = guide(pipe, way.spec, share=way.share, cfg="batch" if way.cfg else "none")
            stack.enter_context(guidance)
            stack.enter_context(guidance.run([1.0]))
        counter = stack.enter_context(FlopCounterMode(display=False))
        sdxl.forward(pipe, size, way.guidance_scale)
    return float(counter.get_total_flops())


def measure(
    bench: Bench, chosen: Sequence[Way], steps: int, rounds: int, progress: Callable[[str], None] = lambda name: None
) -> Iterator[list[Row]]:
    """Yield a row for each way after every round: ``ms`` per step, ``ratio`` to the plain way, and more.

    The plain way has the same CFG setting. ``cpu_ms`` and ``cpu_ratio`` are measured in CPU time, which on a CPU is
    less disturbed by other programs.
    """
    eager = [replace(way, name=way.name.removesuffix(COMPILED), compiled=False) for way in chosen]
    operations = counted(bench.size, {way.name for way in eager} | {plain(way) for way in eager})
    rows: dict[str, Row] = {}
    runs: dict[str, list[tuple[float, Steps]]] = {}
    for way in chosen:
        progress(way.name)
        row: Row = {"way": way.name, "kind": way.kind, "cfg": way.cfg, "compiled": way.compiled, "ratio_to": plain(way)}
        row |= {"sigma": f"{way.sigma:g}", "layers": list(way.layers), "error": None, "reason": None}
        row |= dict.fromkeys(("ms", "ratio", "cpu_ms", "cpu_ratio", "graph_ratio", "counted", "run_seconds"))
        row |= dict.fromkeys(("peak_mib", "host_ms", "graph_ms"), "not measured")
        name = way.name.removesuffix(COMPILED)
        if name in operations:
            row["counted"] = operations[name] / operations[plain(replace(way, compiled=False))]
        rows[way.name] = row
        latents, _ = bench.run(way, steps)  # warms up
        row["error"], row["reason"] = bench.check(way, latents, steps)
        if row["reason"] is None and bench.device.type == "cuda":
            row |= _on_a_gpu(bench, way, steps)
    right = {way.name: way for way in chosen if rows[way.name]["reason"] is None}
    for turn in range(rounds):
        for name in shuffled(list(right), turn):
            progress(f"{name}, round {turn + 1} of {rounds}")
            start = time.perf_counter()
            _, passed = bench.run(right[name], steps)
            runs.setdefault(name, []).append((time.perf_counter() - start, passed))
        for name in right:
            _summarise(rows[name], runs[name], runs.get(rows[name]["ratio_to"]))
        yield list(rows.values())


def _summarise(row: Row, runs: list[tuple[float, Steps]], plain_runs: list[tuple[float, Steps]] | None) -> None:
    """Add the times of a way's runs, and their ratios to the plain way's, to its row."""
    row["run_seconds"] = spread(seconds for seconds, _ in runs)["median"]
    for clock, prefix in (("wall", ""), ("cpu", "cpu_")):
        mine, its = ([spread(getattr(steps, clock))["median"] for _, steps in of] for of in (runs, plain_runs or []))
        row[f"{prefix}ms"] = spread(mine)
        if its:
            row[f"{prefix}ratio"] = spread(a / b for a, b in zip(mine, its, strict=True))


def plain(way: Way) -> str:
    """Return the name of the baseline of a way."""
    return ("CFG" if way.cfg else "no guidance") + COMPILED * way.compiled


def _on_a_gpu(bench: Bench, way: Way, steps: int) -> Row:
    """Return the maximum memory allocated during a run, and the host time per step without waiting for the device."""
    torch.cuda.synchronize(bench.device)
    torch.cuda.reset_peak_memory_stats(bench.device)
    run = bench.runner(way, steps, lambda: None)
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    torch.cuda.synchronize(bench.device)
    peak = torch.cuda.max_memory_allocated(bench.device) / 2**20
    return {"peak_mib": peak, "host_ms": 1e3 * host / steps}

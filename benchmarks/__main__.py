# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks run|plot|compare|tune|host|compatibility``, from a checkout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compare as comparing
from benchmarks import host as hosting
from benchmarks import machine, plots, results, tables
from benchmarks.cases import CASES, TINY, Case, find_cases
from benchmarks.measure import measure, usual_rounds
from benchmarks.proving import compatibility
from benchmarks.refusals import fail, refusing
from benchmarks.suites import STEP, SUITES, find_providers, find_suite, usual_cases, usual_dtypes
from segkern.generation.loading import DTYPES, find_device
from segkern.generation.options import listed
from segkern.generation.tables import wide

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Speed of segkern against everything a user could pick instead.",
)

app.command()(compatibility)

_QUICK_ROUNDS = 2

Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Dtypes = Annotated[
    str, typer.Option("--dtype", help=f"{', '.join(DTYPES)}; several with commas. The device's usual ones.")
]
Cases = Annotated[
    str, typer.Option(help=f"Names or globs with commas. The device's usual ones of: {', '.join(CASES)}.")
]


def chosen_dtypes(text: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes a user names, or the usual ones.

    Raises:
        ValueError: for an unknown one.
    """
    if not text:
        return usual_dtypes(device)
    names = listed("--dtype", text, str, ", ".join(DTYPES))
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype takes {', '.join(DTYPES)}, got {name!r}")
    return tuple(DTYPES[name] for name in names)


def chosen_cases(text: str, usual: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """The cases a user names, or the usual ones, in every dtype.

    Raises:
        ValueError: for a name that fits none.
    """
    found = find_cases(listed("--cases", text, str, "names") if text else usual)
    return [case.of(dtype) for dtype in dtypes for case in found]


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"{', '.join(SUITES)}, {STEP}.")] = "attention",
    device: Device = "auto",
    dtype: Dtypes = "",
    cases: Cases = "",
    providers: Annotated[str, typer.Option(help="Names or globs, with commas. Not given: all of the suite.")] = "",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Of every case; usually 50, fewer for large cases and on a CPU.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny cases, two rounds: whether everything runs.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="With --suite step: each way compiled too, as a GPU has it anyway.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The JSON file; benchmarks/results/<device>-<suite>.json.")] = None,
) -> None:
    """Measure a suite. Rows are written as they come; a wrong result has no time but the reason."""
    if suite == STEP:
        if dtype or cases:
            fail("--suite step has a denoiser of its own for each device; it takes no --dtype and no --cases")
        return run_step_suite(device, providers, rounds, quick, compiled, out)
    if compiled:
        fail("--compiled is for --suite step")
    with refusing():
        wanted = find_suite(suite)
        where = find_device(device)
        chosen = chosen_cases(cases, TINY if quick else usual_cases(where), chosen_dtypes(dtype, where))
        ways = find_providers(wanted, listed("--providers", providers, str, "names", empty=True))
    torch.backends.cudnn.allow_tf32 = False  # the official convolution must pass the float32 check too
    environment = machine.described(where)
    folder = results.QUICK if quick else results.RESULTS
    path = out or folder / f"{machine.slug(environment['device'])}-{suite}.json"
    found: results.Result = {"schema": results.SCHEMA, "suite": suite, "complete": False, "quick": quick}
    found |= {"environment": environment, "headline": "hot" if where.type == "cuda" else "wall", "rows": []}
    count = usual_rounds(where)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(suite, total=len(chosen) * len(wanted.sigmas))
        for case in chosen:
            progress.update(task, description=f"{suite}: {case.name} {case.dtype_name}")
            repeats = rounds or (_QUICK_ROUNDS if quick else count(case))
            for rows in measure(case, wanted.sigmas, ways, where, repeats):
                found["rows"] += rows
                results.write(path, found)
                progress.advance(task)
    found["complete"] = True
    results.write(path, found)
    shown = tables.of_rows(found)
    wide(shown).print(shown)
    for line in tables.without_time(found["rows"]):
        typer.echo(line)
    typer.echo(f"wrote {path}")


def run_step_suite(
    device: str, providers: str, rounds: int | None, quick: bool, compiled: bool, out: Path | None
) -> None:
    """Whole runs of guided pipelines."""
    from benchmarks import sdxl, steps

    with refusing():
        where = find_device(device)
        patterns = listed("--providers", providers, str, "names", empty=True)
        chosen = steps.find_ways(patterns, compiled or where.type == "cuda")
    found: dict[str, Any] = {}
    path = out or (results.QUICK / "step.json" if quick else None)
    with Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(STEP, total=None)

        def tell(name: str) -> None:
            progress.update(task, description=f"{STEP}: {name}")

        size = sdxl.TINY if quick else None
        path, found = steps.run_steps(where, chosen, 3 if quick else 5, rounds or (1 if quick else 5), path, size, tell)
    shown = tables.of_lines(steps.HEADINGS, steps.lines(found))
    wide(shown).print(shown)
    typer.echo(f"wrote {path}")


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="Result files.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; beside each file if not given.")] = None,
) -> None:
    """Draw a result file: ratio over sigma, throughput over tokens, a roofline where peak rates are known."""
    with refusing():
        read = {path: results.read(path) for path in files}
    for path, result in read.items():
        written, left_out = plots.write(path.stem, result, out or path.parent)
        for picture in written:
            typer.echo(f"wrote {picture}")
        for reason in left_out:
            typer.echo(reason)


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="A result file.")],
    after: Annotated[Path, typer.Argument(help="A later one of the same suite.")],
    by: Annotated[str, typer.Option(help="time, or ratio to unblurred attention for other devices.")] = "time",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Change that never counts, as a share.")] = 0.03,
) -> None:
    """Compare two runs; exit code 1 when a row became slower beyond its noise or lost its time."""
    with refusing():
        lines = comparing.compare(results.read(before), results.read(after), by, tolerance)
    shown = comparing.table(lines, by)
    wide(shown).print(shown)
    typer.echo(comparing.counted(lines))
    if comparing.regressed(lines):
        raise typer.Exit(1)


@app.command()
def tune(
    device: Device = "auto",
    dtype: Dtypes = "",
    cases: Cases = "sdxl-32x32,sdxl-64x64",
    sigma: Annotated[float, typer.Option(min=0.0, help="Of the blurred third, finite.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of every shape.")] = 20,
    install: Annotated[
        bool, typer.Option("--install", help="Take the fastest, in segkern/kernels/tuned.json.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The JSON file; benchmarks/results/tuned/<device>.json.")] = None,
) -> None:
    """Try tile shapes of the attention kernel on a real GPU and write what each one takes."""
    with refusing():
        where = find_device(device)
        if where.type != "cuda":
            raise ValueError(f"tune needs a CUDA or ROCm device, and --device {device} is {where.type!r} here")
        if not math.isfinite(sigma):
            raise ValueError(f"tune needs a finite sigma, infinity has a kernel of its own; got {sigma:g}")
        chosen = chosen_cases(cases, (), chosen_dtypes(dtype, where))
    from benchmarks import tune as tuning

    screened, confirmed = [], []
    for case in chosen:
        reason = tuning.why_not(where, case, sigma)
        if reason is not None:
            fail(reason)
        screened.append(tuning.screen(case, sigma, tuning.candidates(case, where), where, rounds))
        shown = tables.of_tiles(screened[-1])
        wide(shown).print(shown)
    for group in tuning.groups(screened).values():
        best = tuning.fastest(group)
        if best is None:
            typer.echo(f"{group[0]['dtype']}, head dimension {group[0]['head_dim']}: the present tile has no time")
            continue
        names = {one["case"] for one in group}
        alike = [case for case in chosen if case.name in names and case.dtype_name == group[0]["dtype"]]
        confirmed += [tuning.confirm(case, sigma, best, where, rounds) for case in alike]
    name = machine.slug(screened[0]["environment"]["device"])
    path = out or results.RESULTS / "tuned" / f"{name}.json"
    tuning.write(path, screened, confirmed)
    typer.echo(f"wrote {path}")
    for line in tuning.install(confirmed) if install else ():
        typer.echo(line)


@app.command()
def host(
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option(help="The JSON file; benchmarks/results/host/<device>.json.")] = None,
) -> None:
    """Measure what a call costs the host, with tiny tensors."""
    with refusing():
        where = find_device(device)
    path, rows = hosting.run_host(where, out)
    shown = tables.of_lines(hosting.HEADINGS, hosting.lines(rows))
    wide(shown).print(shown)
    typer.echo(f"wrote {path}")


@app.command()
def approximations(
    folder: Annotated[Path, typer.Option(help="Where what is measured on the way is kept.")] = Path(
        "outputs/approximations"
    ),
) -> None:
    """What a branch that serves several steps, or guidance in part of a run, costs in quality. Takes a while."""
    from benchmarks import approximations as measuring

    typer.echo(measuring.table(_measured(measuring, folder)))
    typer.echo(f"wrote {measuring.RESULT}")


@app.command()
def family(
    folder: Annotated[Path, typer.Option(help="Where what is measured on the way is kept.")] = Path("outputs/family"),
) -> None:
    """What PAG, SAG, SEG, CFG and some of them together do to samples of the bundled model. Takes a while."""
    from benchmarks import family as measuring

    typer.echo(measuring.section(_measured(measuring, folder)))
    typer.echo(f"wrote {measuring.RESULT}")


def _measured(measuring: Any, folder: Path) -> dict[str, Any]:
    """What a module measures of pictures, with progress."""
    count = len(measuring.settings()) * len(measuring.SEEDS) * measuring.IMAGES
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("images", total=count)
        found: dict[str, Any] = measuring.measure(
            folder, lambda name, n: progress.update(task, advance=n, description=name)
        )
    return found


@app.command()
def energy() -> None:
    """Count where the statements about attention's energy hold in the bundled model; see docs/energy.md."""
    from benchmarks import energy as counting

    columns = TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("energy", total=None)
        counting.measure(lambda name: progress.update(task, description=f"energy: {name}"))
    typer.echo(f"wrote {counting.FOLDER}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")

# SPDX-License-Identifier: Apache-2.0
"""The commands of ``python -m benchmarks``, from a checkout."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compare as comparison
from benchmarks import device as first_minutes
from benchmarks import host as host_costs
from benchmarks import machine, plots, results, tables
from benchmarks.cases import CASES, TINY, Case, select
from benchmarks.measure import measure, usual_cases, usual_dtypes, usual_rounds
from benchmarks.providers import SUITES, find_providers
from segkern.cli import terminal
from segkern.core.dispatch import interpreting, triton_is_installed
from segkern.generation.loading import DTYPES, find_device, quiet_libraries
from segkern.generation.options import parse_list

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compare the speed of segkern with the alternatives.",
)
fail = partial(terminal.fail, program="benchmarks")
refusing = partial(terminal.refusing, program="benchmarks")

STEP = "step"  # measures pipeline runs, not attention calls
_QUICK_ROUNDS = 2

Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")]
Dtypes = Annotated[
    str, typer.Option("--dtype", help=f"Dtypes, comma-separated: {', '.join(DTYPES)}. Default: depends on the device.")
]
Cases = Annotated[
    str, typer.Option(help=f"Names or globs, comma-separated: {', '.join(CASES)}. Default: depends on the device.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Run as little as possible; the numbers are meaningless.")]
Out = Annotated[Path | None, typer.Option(help="JSON file to write. Default: a file in benchmarks/results.")]


def chosen_dtypes(text: str, device: torch.device) -> tuple[torch.dtype, ...]:
    """Return the dtypes that an option names, or the default ones of the device.

    Raises:
        ValueError: If a dtype is unknown.
    """
    if not text:
        return usual_dtypes(device)
    names = parse_list("--dtype", text, str, ", ".join(DTYPES))
    for name in names:
        if name not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return tuple(getattr(torch, DTYPES[name]) for name in names)


def chosen_cases(text: str, usual: Sequence[str], dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Return the cases that an option names, or the default ones, in every dtype.

    Raises:
        ValueError: If a name matches no case.
    """
    names = select("--cases", parse_list("--cases", text, str, "names") if text else usual, list(CASES))
    return [CASES[name].of(dtype) for dtype in dtypes for name in names]


def progress_bar() -> Progress:
    """Return a progress display on standard error, with a count if the number of steps is known."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))


def show(table: Any) -> None:
    """Print a table in full width if standard output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=Console(width=10_000).measure(table).maximum)
    console.print(table)


@app.command()
def run(
    suite: Annotated[str, typer.Option(help=f"Suite to measure: {', '.join(SUITES)} or {STEP}.")] = "attention",
    device: Device = "auto",
    dtype: Dtypes = "",
    cases: Annotated[
        str,
        typer.Option(
            help=f"Names or globs, comma-separated: {', '.join(CASES)}. Default: depends on the device. "
            "With --suite step: one size of benchmarks/sdxl.py."
        ),
    ] = "",
    providers: Annotated[str, typer.Option(help="Names or globs, comma-separated. Default: all of the suite.")] = "",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds per case. Default: 50, fewer for large cases and on a CPU.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=2, help="With --suite step: steps per run. The first step is not timed.")
    ] = None,
    quick: Quick = False,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compiled/--eager", help="With --suite step: also measure with torch.compile. Default: only on a GPU."
        ),
    ] = None,
    out: Out = None,
) -> None:
    """Measure a suite. Rows are written as they are measured; incorrect results are not timed."""
    if suite == STEP:
        if dtype:
            fail("--suite step uses a fixed dtype for each device; --dtype cannot be used")
        return _run_steps(device, cases, providers, rounds, steps, quick, compiled, out)
    if compiled is not None or steps is not None:
        fail("--compiled, --eager and --steps can only be used with --suite step")
    with refusing():
        ways = find_providers(suite, parse_list("--providers", providers, str, "names", empty=True))
        where = find_device(device)
        chosen = chosen_cases(cases, TINY if quick else usual_cases(where), chosen_dtypes(dtype, where))
    torch.backends.cudnn.allow_tf32 = False  # so the official convolution passes the float32 check
    environment = machine.described(where)
    folder = results.QUICK if quick else results.RESULTS
    path = out or folder / f"{machine.slug(environment['device'])}-{suite}.json"
    result: results.Result = {"schema": results.SCHEMA, "suite": suite, "complete": False, "quick": quick}
    result |= {"environment": environment, "headline": "hot" if where.type == "cuda" else "wall", "rows": []}
    count = usual_rounds(where)
    with progress_bar() as progress:
        task = progress.add_task(suite, total=len(chosen) * len(SUITES[suite]))
        for case in chosen:
            progress.update(task, description=f"{suite}: {case.name} {case.dtype_name}")
            repeats = rounds or (_QUICK_ROUNDS if quick else count(case))
            for rows in measure(case, SUITES[suite], ways, where, repeats):
                result["rows"] += rows
                results.write_json(path, result)
                progress.advance(task)
    result["complete"] = True
    results.write_json(path, result)
    show(tables.of_rows(result))
    for line in tables.without_time(result["rows"]):
        typer.echo(line)
    typer.echo(f"wrote {path}")


def _run_steps(
    device: str,
    case: str,
    providers: str,
    rounds: int | None,
    count: int | None,
    quick: bool,
    compiled: bool | None,
    out: Path | None,
) -> None:
    """Measure whole runs of guided pipelines with this number of steps."""
    quiet_libraries()
    from benchmarks import sdxl, step_suite
    from benchmarks.steps import find_ways

    with refusing():
        where = find_device(device)
        if case and case not in sdxl.SIZES:
            raise ValueError(f"with --suite step, --cases must be one of {', '.join(sdxl.SIZES)}, got {case!r}")
        patterns = parse_list("--providers", providers, str, "names", empty=True)
        chosen = find_ways(patterns, where.type == "cuda" if compiled is None else compiled)
    path = out or (results.QUICK / "step.json" if quick else None)
    with progress_bar() as progress:
        task = progress.add_task(STEP, total=None)

        def tell(name: str) -> None:
            progress.update(task, description=f"{STEP}: {name}")

        size = sdxl.SIZES[case] if case else sdxl.TINY if quick else None
        count, repeats = count or (3 if quick else 5), rounds or (1 if quick else 5)
        path, result = step_suite.run_steps(where, chosen, count, repeats, path, size, tell)
    show(tables.of_lines(step_suite.HEADINGS, step_suite.lines(result)))
    typer.echo(f"wrote {path}")


@app.command()
def plot(
    files: Annotated[list[Path], typer.Argument(help="Result files to plot.")],
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: the folder of each result file.")] = None,
) -> None:
    """Plot result files: time relative to unblurred attention over sigma, or time of guided steps."""
    with refusing():
        read = {path: plots.read(path) for path in files}
    for path, result in read.items():
        pictures = plots.write(path.stem, result, out or path.parent)
        for picture in pictures:
            typer.echo(f"wrote {picture}")
        if not pictures:
            typer.echo(f"{path} has only one sigma; nothing to plot")


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="Earlier result file.")],
    after: Annotated[Path, typer.Argument(help="Later result file of the same suite.")],
    by: Annotated[str, typer.Option(help="Compare time, or ratio to unblurred attention (across devices).")] = "time",
    tolerance: Annotated[float, typer.Option(min=0.0, help="Relative change that is ignored.")] = 0.03,
) -> None:
    """Compare two runs. The exit code is 1 if a row is slower beyond its noise or is no longer timed."""
    with refusing():
        lines = comparison.compare(results.read(before), results.read(after), by, tolerance)
    show(comparison.table(lines, by))
    typer.echo(comparison.counted(lines))
    if comparison.regressed(lines):
        raise typer.Exit(1)


@app.command()
def tune(
    device: Device = "auto",
    dtype: Dtypes = "",
    cases: Cases = "sdxl-32x32,sdxl-64x64",
    sigma: Annotated[float, typer.Option(min=0.0, help="Finite sigma of the blurred third of the batch.")] = 10.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per shape.")] = 20,
    install: Annotated[
        bool, typer.Option("--install", help="Write the fastest tiles to segkern/kernels/tuned.json.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny case and two tiles; without a GPU, in Triton's interpreter.")
    ] = False,
    out: Out = None,
) -> None:
    """Time tile shapes of the attention kernel on a GPU."""
    with refusing():
        where = find_device(device)
        if where.type != "cuda" and not quick:
            raise ValueError(f"tune needs a CUDA or ROCm device, but --device {device} is {where.type!r} here")
        if not math.isfinite(sigma):
            raise ValueError(f"tune needs a finite sigma (infinity uses a separate kernel), got {sigma:g}")
        dtypes = chosen_dtypes("fp16" if quick else dtype, where)
        chosen = chosen_cases(TINY[0] if quick else cases, (), dtypes)
    from benchmarks import tune as tuning

    screened: list[tuning.Record] = []
    confirmed: list[tuning.Record] = []
    name = machine.slug(machine.described(where)["device"])
    path = out or (results.QUICK if quick else results.RESULTS) / "tuned" / f"{name}.json"
    for case in chosen:
        reason = None if quick else tuning.why_not(where, case, sigma)
        if reason is not None:
            fail(reason)
        tiles = tuning.candidates(case, where)[: 2 if quick else None]
        screened.append(tuning.screen(case, sigma, tiles, where, 1 if quick else rounds))
        results.write_json(path, {"screened": screened, "confirmed": confirmed})
        show(tables.of_tiles(screened[-1]))
    for group in tuning.groups(screened).values():
        best = tuning.fastest(group)
        if best is None:
            typer.echo(f"{group[0]['dtype']}, head dimension {group[0]['head_dim']}: the current tile was not timed")
            continue
        names = {record["case"] for record in group}
        alike = [case for case in chosen if case.name in names and case.dtype_name == group[0]["dtype"]]
        confirmed += [tuning.confirm(case, sigma, best, where, 1 if quick else rounds) for case in alike]
    installed = tuning.install(confirmed) if install and not quick else []
    table = results.read_json(tuning.TABLE) if installed else {}
    results.write_json(path, {"screened": screened, "confirmed": confirmed, "installed": installed, "table": table})
    typer.echo(f"wrote {path}")
    for line in installed:
        typer.echo(line)


@app.command()
def device(
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("outputs/device"),
    budget: Annotated[float, typer.Option(min=1.0, help="Seconds for all stages.")] = first_minutes.BUDGET,
    wheels: Annotated[
        Path | None, typer.Option(help="Folder with wheels of packages that may be missing, such as diffusers.")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry", help="Run every stage without a GPU as a rehearsal; the numbers are meaningless.")
    ] = False,
    only: Annotated[str, typer.Option(help="Stages to run, comma-separated. Default: all.")] = "",
) -> None:
    """Run the most informative checks on a new device, in stages with time limits, and write JSON files."""
    with refusing():
        names = parse_list("--only", only, str, "names", empty=True)
        passed = first_minutes.run(out, budget, wheels, dry, names, typer.echo)
    raise typer.Exit(not passed)


@app.command()
def host(device: Device = "auto", quick: Quick = False, out: Out = None) -> None:
    """Measure the host time of a call, with tiny tensors. Host time of GPU launches is measured on any CPU."""
    with refusing():
        where = find_device(device)
    environment = machine.described(where)
    rows = host_costs.measure_host(where, rounds=1, calls=2) if quick else host_costs.measure_host(where)
    launches = []
    if where.type == "cpu" and triton_is_installed() and not interpreting():
        launches = host_costs.measure_launches(rounds=1, calls=2) if quick else host_costs.measure_launches()
    folder = results.QUICK if quick else results.RESULTS
    path = out or folder / "host" / f"{machine.slug(environment['device'])}.json"
    results.write_json(path, {"environment": environment, "rows": rows, "launches": launches})
    show(tables.of_lines(host_costs.HEADINGS, host_costs.lines(rows)))
    for row in launches:
        typer.echo(f"{row['call']}: launches {row['launches']}, {row['us']:.1f} us on the host")
    typer.echo(f"wrote {path}")


@app.command()
def energy(
    quick: Quick = False,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: benchmarks/results/energy.")] = None,
) -> None:
    """Count how often the statements about attention's energy hold in the bundled model; see docs/energy.md."""
    from benchmarks import energy as statements

    folder = out or (results.QUICK / "energy" if quick else statements.FOLDER)
    with progress_bar() as progress:
        task = progress.add_task("energy", total=None)
        statements.measure(folder, quick, lambda name: progress.update(task, description=f"energy: {name}"))
    typer.echo(f"wrote {folder}")


@app.command()
def compatibility(
    diffusers: Annotated[
        Path | None, typer.Option(help="Folder with another diffusers, from pip install --no-deps --target.")
    ] = None,
    jobs: Annotated[str, typer.Option(help="Number of processes, or auto.")] = "0",
    out: Out = None,
) -> None:
    """Run the tests behind docs/models.md and write their outcomes. The exit code is 1 if a test fails."""
    from benchmarks import compatibility as models

    with refusing():
        path, outcomes, code = models.run(diffusers, out, jobs)
    passed = sum(test["outcome"] == "passed" for test in outcomes["tests"])
    typer.echo(f"diffusers {outcomes['environment']['diffusers']}: {passed} of {len(outcomes['tests'])} tests passed")
    typer.echo(f"wrote {path}")
    if code:
        raise typer.Exit(1)


@app.command("compile")
def compile_command(
    targets: Annotated[
        list[str] | None, typer.Argument(help="Architectures, such as sm_90 or gfx942. Default: all.")
    ] = None,
    few: Annotated[bool, typer.Option("--few", help="Compile two head dimensions instead of all.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Save the records of all kernels for all targets.")] = False,
    triton: Annotated[
        Path | None, typer.Option(help="Folder with another triton, from pip install --no-deps --target.")
    ] = None,
) -> None:
    """Compile the kernels for real targets and print the resources they use. The exit code is 1 for a faulty kernel."""
    from benchmarks import compile_kernels, compiled_code

    if save and (few or targets or triton):
        fail("--save records everything with the installed triton; omit targets, --few and --triton")
    if triton is not None:
        with refusing():
            raise typer.Exit(compile_kernels.compile_with(triton, [*(targets or ()), *["--few"] * few]))
    with refusing():
        result = compile_kernels.compile_targets(targets or list(compiled_code.TARGETS), few)
    if save:
        results.write_json(compile_kernels.RESULT, result, dense=True)
    else:
        typer.echo(json.dumps(result, indent=1))
    wrong = compiled_code.faults([compiled_code.Compiled(**record) for record in result["kernels"]])
    for line in wrong:
        typer.echo(line, err=True)
    raise typer.Exit(bool(wrong))


@app.command("tables")
def write_tables() -> None:
    """Write the tables of the README and the documentation from the committed results."""
    from benchmarks import doc_tables

    for path in doc_tables.write():
        typer.echo(f"wrote {path}")


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")

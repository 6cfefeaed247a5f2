# SPDX-License-Identifier: Apache-2.0
"""A short benchmark session on a new device: stages in order of importance, each in a process with a time limit.

All stages share one time budget. The output folder gets a JSON file for each stage with results, written while the
stage runs, and ``stages.json``: how every stage ended, why, and the end of its output. If a stage fails, hangs or is
killed, the other stages still run. Nothing is downloaded; missing packages are installed from a folder of wheels.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.cases import SDXL, TINY
from benchmarks.providers import BLURS
from benchmarks.results import write_json

BUDGET = 540.0  # seconds
SUMMARY = "stages.json"
PASSED, FAILED, CUT, SKIPPED, RUNNING = "passed", "failed", "cut", "not started", "running"
_ROOT = Path(__file__).parents[1]
_LEAST = 10.0  # minimum seconds left to start a stage
_TO_END = 10.0  # seconds to wait for a killed process
_SHOWN = 4000  # characters kept of the end of a stage's output

_STAGES, _BENCHMARKS = ("-m", "benchmarks.device_stages"), ("-m", "benchmarks")
_WAYS = (*BLURS, "blur + sdpa", "auto")
_STEPS = (
    *("CFG", "CFG + PAG of diffusers", "CFG + segkern PAG mid", "CFG + official SEG sigma 10"),
    *("CFG + official SEG sigma inf", "CFG + segkern mid sigma 10*", "CFG + segkern mid sigma inf"),
)


@dataclass(frozen=True)
class Stage:
    """One stage of the run.

    Attributes:
        name: Name of the stage.
        limit: Time limit in seconds.
        arguments: Arguments of Python.
        needs: Modules that the stage requires.
    """

    name: str
    limit: float
    arguments: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclass
class Outcome:
    """Outcome of a stage (``passed``, ``failed``, ``cut`` or ``not started``) and the reason."""

    name: str
    status: str
    seconds: float = 0.0
    why: str = ""
    printed: str = ""


def stages(folder: Path, dry: bool) -> tuple[Stage, ...]:
    """Return all stages in order. With ``dry``, each does as little as possible, without a GPU."""
    quick: tuple[str, ...] = ("--quick",) if dry else ()
    cases = ("--cases", TINY[0] if dry else ",".join(SDXL))
    suite = ("run", *(("--quick", "--device", "cpu") if dry else ()))
    dtype = () if dry else ("--dtype", "bf16")
    more = 2.0 if dry else 1.0  # a machine without a GPU may be slow
    few = ("--providers", "sdpa,official,auto,stride 2", "--rounds", "1") if dry else ("--rounds", "20")

    def out(name: str) -> tuple[str, str]:
        return "--out", str(folder / f"{name}.json")

    return (
        Stage("environment", 60 * more, (*_STAGES, "environment", *out("environment"), *quick)),
        Stage("compilation", 120 * more, (*_STAGES, "compilation", *cases, *quick)),
        *(
            Stage(f"blur: {way}", 60 * more, (*_STAGES, "blur", "--way", way, *out("blur"), *cases, *quick))
            for way in _WAYS
        ),
        Stage("attention", 150 * more, (*_BENCHMARKS, *suite, *cases, *dtype, *few, *out("attention"))),
        Stage("tuning", 150 * more, (*_BENCHMARKS, "tune", *_tuning(dry), *out("tune"))),
        Stage("tests", 150 * more, (*_STAGES, "tests", *out("tests"), *quick)),
        Stage("step", 150 * more, (*_BENCHMARKS, *suite, *_step(dry), *out("step")), ("diffusers",)),
    )


def _tuning(dry: bool) -> tuple[str, ...]:
    if dry:
        return "--quick", "--device", "cpu"
    return "--cases", ",".join(SDXL), "--dtype", "bf16", "--rounds", "10", "--install"


def _step(dry: bool) -> tuple[str, ...]:
    ways = "--suite", "step", "--eager", "--providers", ",".join(_STEPS)
    return ways if dry else (*ways, "--cases", "sdxl", "--steps", "4", "--rounds", "4")


def run_stages(
    chosen: Sequence[Stage],
    folder: Path,
    budget: float,
    environment: Mapping[str, str] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    least: float = _LEAST,
) -> list[Outcome]:
    """Run stages one after the other, each until its end, its limit or the budget's end, and update ``stages.json``.

    Args:
        chosen: Stages to run, in this order.
        folder: Folder of ``stages.json``.
        budget: Seconds for all stages.
        environment: Environment variables of the stages' processes. Default: those of this process.
        tell: Called with one line at the end of every stage.
        least: Minimum seconds left to start a stage.
    """
    start = time.monotonic()
    done: list[Outcome] = []

    def write(complete: bool, *running: Outcome) -> None:
        rows = [asdict(outcome) for outcome in (*done, *running)]
        content = {"complete": complete, "budget": budget, "seconds": time.monotonic() - start, "stages": rows}
        write_json(folder / SUMMARY, content)

    for stage in chosen:
        left = budget - (time.monotonic() - start)
        missing = [name for name in stage.needs if not _is_there(name, environment)]
        if missing:
            why = f"{', '.join(missing)} is not installed; pass --wheels FOLDER with its wheel"
            outcome = Outcome(stage.name, SKIPPED, why=why)
        elif left < least:
            outcome = Outcome(stage.name, SKIPPED, why=f"{max(left, 0):.0f} s of the budget of {budget:g} s are left")
        else:
            write(False, Outcome(stage.name, RUNNING))
            outcome = _run(stage, left, budget, environment)
        done.append(outcome)
        write(False)
        tell(line_of(outcome))
    write(True)
    return done


def line_of(outcome: Outcome) -> str:
    """Return an outcome as one line."""
    return f"{outcome.status:<12} {outcome.seconds:6.1f} s  {outcome.name}" + (f": {outcome.why}" * bool(outcome.why))


def _run(stage: Stage, left: float, budget: float, environment: Mapping[str, str] | None) -> Outcome:
    """Run one stage, and kill all its processes at its time limit."""
    limit = min(stage.limit, left)
    start = time.monotonic()
    with tempfile.TemporaryFile() as printed:
        command = [sys.executable, *stage.arguments]
        process = subprocess.Popen(
            command, cwd=_ROOT, env=environment, stdout=printed, stderr=printed, start_new_session=True
        )
        outcome = Outcome(stage.name, PASSED)
        try:
            code = process.wait(limit)
            if code:
                outcome.status = FAILED
                outcome.why = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            of_whom = "its limit" if stage.limit <= left else f"the rest of the budget of {budget:g} s"
            outcome.status, outcome.why = CUT, f"it took longer than {limit:.0f} s, {of_whom}"
        finally:
            _end(process)
        outcome.seconds = time.monotonic() - start
        outcome.printed = _last(printed)
    if outcome.status == FAILED and outcome.printed:
        outcome.why += f", {outcome.printed.splitlines()[-1][:300]}"
    return outcome


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a stage. A process that is stuck in a driver is left behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(_TO_END)
    except (ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        return


def _last(printed: IO[bytes]) -> str:
    """Return the end of the printed output."""
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - 4 * _SHOWN))
    return printed.read().decode(errors="replace").strip()[-_SHOWN:]


def _is_there(module: str, environment: Mapping[str, str] | None) -> bool:
    """Return True if the processes of stages can import a module."""
    paths = (environment or {}).get("PYTHONPATH", "").split(os.pathsep)
    return importlib.util.find_spec(module) is not None or any((Path(path) / module).is_dir() for path in paths if path)


def run(
    folder: Path, budget: float, wheels: Path | None, dry: bool, only: Sequence[str], tell: Callable[[str], None]
) -> bool:
    """Run all stages, or the named ones, with results in a folder. Return True if all passed.

    Raises:
        ValueError: If a stage is unknown, there is no device, or pip refuses the folder of wheels.
    """
    import torch

    folder = folder.resolve()
    known = stages(folder, dry)
    unknown = set(only) - {stage.name.partition(":")[0] for stage in known}
    if unknown:
        names = dict.fromkeys(stage.name.partition(":")[0] for stage in known)
        raise ValueError(f"--only must name stages of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if not dry and not torch.cuda.is_available():
        raise ValueError("no CUDA or ROCm device found; pass --dry for a rehearsal without a device")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [stage for stage in known if not only or stage.name.partition(":")[0] in only]
    for stage in chosen:
        if "--out" in stage.arguments:  # a file of an earlier run could be mistaken for this run's
            Path(stage.arguments[stage.arguments.index("--out") + 1]).unlink(missing_ok=True)
    with _terminated_as_by_an_exception(), tempfile.TemporaryDirectory() as site, integrations_as_installed():
        if wheels is not None:
            for name in install_missing(wheels, Path(site)):
                tell(f"installed {name} from {wheels}")
        outcomes = run_stages(chosen, folder, budget, _environment(Path(site), dry), tell)
    wrong = [outcome for outcome in outcomes if outcome.status != PASSED]
    for outcome in wrong:
        tell(f"\n{outcome.name}, {outcome.status}: {outcome.why}\n{outcome.printed[-1000:]}".rstrip())
    tell(f"\n{len(outcomes) - len(wrong)} of {len(outcomes)} stages passed; wrote {folder}")
    for outcome in wrong:
        tell(line_of(outcome))
    return not wrong


def _environment(site: Path, dry: bool) -> dict[str, str]:
    """Return the environment variables of the stages' processes."""
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if dry:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return variables


def install_missing(wheels: Path, site: Path) -> list[str]:
    """Install the wheels of missing packages into another folder, without network access.

    Raises:
        ValueError: If the folder has no wheels, or pip refuses one.
    """
    packages = {path: path.name.partition("-")[0] for path in sorted(wheels.glob("*.whl"))}
    if not packages:
        raise ValueError(f"--wheels {str(wheels)!r} holds no *.whl")
    missing = {path: name for path, name in packages.items() if not _is_installed(name)}
    if missing:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", str(site), *map(str, missing)]
        asked = subprocess.run(command, capture_output=True, text=True, check=False)
        if asked.returncode:
            raise ValueError(f"pip cannot install the wheels of {str(wheels)!r}: {asked.stderr.strip()}")
    return list(missing.values())


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


@contextmanager
def integrations_as_installed() -> Iterator[None]:
    """Make ``segkern.integrations`` importable through a link, also in a checkout that is not installed."""
    link = _ROOT / "segkern" / "integrations"
    if importlib.util.find_spec("segkern.integrations") is not None:
        yield
        return
    link.symlink_to(Path("..") / "integrations")
    try:
        yield
    finally:
        link.unlink()


@contextmanager
def _terminated_as_by_an_exception() -> Iterator[None]:
    """Convert SIGTERM to an exception inside the context, so the running stage is ended too."""

    def end(number: int, frame: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

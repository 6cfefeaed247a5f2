# SPDX-License-Identifier: Apache-2.0
"""The wheel with each extra in an environment of its own, outside the checkout: ``make extras``.

Environments hold nothing but what pip put there. One that starts as another is a copy of it by hard links, so torch is
unpacked once; pip replaces files and never writes into them. ``uses.py`` says what must work in each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uses import STAGES, Stage, Use

ROOT = Path(__file__).parents[3]
SCHEMA = 1


class Environments:
    """Environments below a folder, and what was found in them.

    Args:
        folder: for environments and for what runs in them.
        python: that they are made with.
        wheel: of the package.
        archive: the source archive.
    """

    def __init__(self, folder: Path, python: Path, wheel: Path, archive: Path) -> None:
        self.folder, self.python, self.wheel, self.archive = folder, python, wheel, archive
        self.surroundings = {
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON"))
        }
        self.surroundings |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def make(self, stage: Stage) -> None:
        """The environment of a stage, as its base is now, with the extra or without the package."""
        here = self.folder / stage.name
        if stage.base:
            shutil.copytree(self.folder / stage.base, here, symlinks=True, copy_function=os.link)
        else:
            self._run([self.python, "-m", "venv", here])
        if stage.without:
            self.pip(stage, "uninstall", "--quiet", "--yes", stage.without)
        else:
            extra = f"[{stage.extra}]" if stage.extra else ""
            wanted = f"segkern{extra} @ {self.wheel.as_uri()}"
            # What is used is compiled when it is imported; all that lies there would take longer than the rest.
            self.pip(stage, "install", "--quiet", "--no-compile", "-c", ROOT / "constraints.txt", wanted)
            self.pip(stage, "check")

    def pip(self, stage: Stage, *arguments: object) -> str:
        """What pip prints in the environment of a stage."""
        python = self.folder / stage.name / "bin" / "python"
        return self._run([python, "-m", "pip", *arguments]).stdout

    def versions(self, stage: Stage) -> dict[str, str]:
        """Every package there and its version."""
        listed = json.loads(self.pip(stage, "list", "--format", "json"))
        return {each["name"]: each["version"] for each in listed}

    def use(self, stage: Stage, use: Use) -> str:
        """Why a use does not work; empty when it does."""
        bin_ = self.folder / stage.name / "bin"
        work = self.folder / "work" / stage.name
        work.mkdir(parents=True, exist_ok=True)
        for name in use.files:
            self._lay_out(name, work)
        if use.program:
            command = [bin_ / "python", "-c", use.program]
        else:  # scripts of a copied environment name the original's interpreter, so they are run by this one
            script = bin_ / use.command[0]
            is_script = script.exists() and script.read_bytes()[:2] == b"#!"
            command = [*([bin_ / "python"] if is_script else []), script, *use.command[1:]]
        ran = self._run(command, work, check=False, **use.environment)
        output = ran.stdout + ran.stderr
        words = " ".join(output.split())
        if ran.returncode != use.code:
            return f"exit code {ran.returncode}, not {use.code}: {output.strip()[-1500:]}"
        missing = [said for said in use.says if said not in words]
        return f"does not say {missing[0]!r}: {output.strip()[-1500:]}" if missing else ""

    def _lay_out(self, name: str, work: Path) -> None:
        if name == "sdist":
            with tarfile.open(self.archive) as archive:
                archive.extractall(work, filter="data")
        elif not (work / name).exists():
            source = ROOT / name
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, work / name)

    def _run(
        self, command: Sequence[object], cwd: Path | None = None, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        ran = subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=self.surroundings | environment,
            capture_output=True,
            text=True,
        )
        if check and ran.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))}: {(ran.stdout + ran.stderr).strip()[-2000:]}")
        return ran


def check(environments: Environments, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """Make each environment and use it, and say on standard output how it went."""
    found = []
    for stage in stages:
        start = time.monotonic()
        failures: dict[str, str] = {}
        packages: dict[str, str] = {}
        try:
            environments.make(stage)
            packages = environments.versions(stage)
        except RuntimeError as error:
            failures["installation"] = str(error)
        else:
            outcomes = {use.what: environments.use(stage, use) for use in stage.uses}
            failures |= {what: reason for what, reason in outcomes.items() if reason}
        seconds = round(time.monotonic() - start)
        print(f"{stage.name}: {len(packages)} packages, {seconds} s, {'failed' if failures else 'works'}", flush=True)
        for what, reason in failures.items():
            print(f"  {what}: {reason}", flush=True)
        uses = [use.what for use in stage.uses]
        found.append({"name": stage.name, "uses": uses, "packages": packages, "failures": failures})
    return found


def chosen(names: Sequence[str]) -> list[Stage]:
    """The stages of these names and the ones they start as; all for no name.

    Raises:
        ValueError: for an unknown name.
    """
    known = {stage.name: stage for stage in STAGES}
    needed: set[str] = set()
    for name in names or known:
        while name:
            if name not in known:
                raise ValueError(f"there is no environment {name!r}; there are {', '.join(known)}")
            needed.add(name)
            name = known[name].base
    return [stage for stage in STAGES if stage.name in needed]


def main() -> int:
    """Build nothing, install what is in ``dist/`` and write what was found; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="environments of uses.py; all if not given")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of the wheel and the source archive")
    parser.add_argument("--python", type=Path, default=Path(getattr(sys, "_base_executable", sys.executable)))
    parser.add_argument("--out", type=Path, help="the JSON file to write; none if not given")
    arguments = parser.parse_args()
    try:
        stages = chosen(arguments.names)
        (wheel,), (archive,) = arguments.dist.glob("*.whl"), arguments.dist.glob("*.tar.gz")
    except ValueError as error:
        parser.error(f"{error}; make wheel builds one wheel and one source archive into {arguments.dist}")
    with tempfile.TemporaryDirectory() as folder:
        environments = Environments(Path(folder), arguments.python, wheel.resolve(), archive.resolve())
        found = check(environments, stages)
    asked = subprocess.run([arguments.python, "-c", "import platform; print(platform.python_version())"],
                           capture_output=True, text=True, check=True)  # fmt: skip
    if arguments.out is not None:
        sys.path.insert(0, str(ROOT))
        from segkern.core.environment import commit

        environment = {"python": asked.stdout.strip(), "platform": f"{platform.system()} {platform.machine()}"}
        environment |= {"segkern": importlib.metadata.version("segkern"), "commit": commit()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"schema": SCHEMA, "environment": environment, "extras": found}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
        print(f"wrote {arguments.out}")
    return int(any(each["failures"] for each in found))


if __name__ == "__main__":
    sys.exit(main())

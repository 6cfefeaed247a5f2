# SPDX-License-Identifier: Apache-2.0
"""Tools that run the ``segkern`` commands of the documentation, and check that other commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import typer

from segkern.cli.app import app
from segkern.generation.demo import PROMPTED
from tests.cli.cli_tools import done, refusal

ROOT = Path(__file__).parents[2]

from benchmarks.__main__ import app as benchmarks  # noqa: E402

PROMPTS = "".join(f"{subject.prompt}\n" for subject in PROMPTED[:2])

# Replaces or adds options to save time. The page's own options are parsed first and must exist.
_LESS = {
    "generate": {"--steps": "1", "--width": "64", "--height": "96", "--images": "1"},
    "energy": {"--steps": "1"},
    "demo": {"--steps": "1"},
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_STAY = ("ui",)  # these run until they are stopped
_OPTIONAL = ("--width", "--height", "--images")  # replaced only if a page passes them


def refused(source: str) -> str:
    """Return the one-line error of a ``segkern`` command."""
    return refusal(*shlex.split(source)[1:])


def run_shell(source: str, folder: Path, run: bool = True) -> str:
    """Check every line, run the ``segkern`` commands if ``run`` is set, and return their output."""
    printed = []
    for line in re.sub(r"\\\n\s*", " ", source).splitlines():
        words = shlex.split(line, comments=True)
        if words:
            printed.append(_command(words, folder, run))
    return "".join(printed)


def _command(words: list[str], folder: Path, run: bool) -> str:
    if words[0] in ("accelerate", "torchrun"):
        _parse(words[words.index("segkern.cli") + 1 :])
        return ""
    if words[0] == "segkern":
        _parse(words[1:])
        elsewhere = words[1] in _STAY or "--ray" in words or any("://" in word for word in words)
        return _segkern(words[1:], folder) if run and not elsewhere else ""
    if words[:2] == ["ray", "start"]:
        return ""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets, words
    elif words[:2] == ["pip", "install"]:
        _installs(words[2:])
    elif words[:2] == ["python", "-m"]:
        _module(words[2], words[3:])
    else:
        raise AssertionError(f"unknown command {words}")
    return ""


def _segkern(words: list[str], folder: Path) -> str:
    """Run a command on the bundled model, with its files in ``folder``."""
    (folder / "prompts.txt").write_text(PROMPTS, encoding="utf-8")
    named = {"MODEL": "demo", "FILE": str(folder / "prompts.txt"), "prompts.txt": str(folder / "prompts.txt")}
    words = [named.get(word, word) for word in words]
    if len(words) > 1 and _HUB_NAME.fullmatch(words[1]):
        words[1] = "demo"
    for option, value in _LESS.get(words[0], {}).items():
        if option in words:
            words[words.index(option) + 1] = value
        elif option not in _OPTIONAL:
            words += [option, value]
    if "--out" in words:
        at = words.index("--out") + 1
        words[at] = str(folder / words[at])
        words.append("--overwrite")
    elif words[0] in ("generate", "demo", "energy"):
        words += ["--out", str(folder / f"out-{len(list(folder.iterdir()))}.png")]
    return done(*words)


def _parse(words: list[str], app: typer.Typer = app) -> None:
    """Parse a command without running it; an unknown option is an error."""
    group: Any = typer.main.get_command(app)
    with click.Context(group) as context:
        command = group.get_command(context, words[0])
        assert command is not None, words
        command.make_context(words[0], list(words[1:]))


def _installs(words: list[str]) -> None:
    """Check that a command installs segkern with existing extras: by name, checkout, wheel or Git address."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras = re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.M)
    for word in words:
        wanted = re.fullmatch(r"(?:segkern|\.|WHEEL)(?:\[([\w,]+)\])?(?: @ git\+ADDRESS)?", word)
        assert wanted or word == "-e", f"pip install {word!r}"
        for extra in (wanted[1] or "").split(",") if wanted and wanted[1] else []:
            assert extra in extras, extra


def _module(name: str, words: list[str]) -> None:
    """Check that a module exists and, for ``benchmarks``, that the command parses."""
    path = ROOT / Path(*name.split("."))
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists() or name in ("pytest", "mkdocs"), name
    if name == "benchmarks":
        _parse(words, benchmarks)

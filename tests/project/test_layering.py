# SPDX-License-Identifier: Apache-2.0
"""Imports between the folders of the package point one way, without cycles and over few levels."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import segkern
from segkern.core.moved_modules import MOVED

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "segkern"
MOST_LEVELS = 9

# A folder or module of segkern/ -> those it may import, anywhere in its files. All may import the modules in BASE.
BASE = {"core", "grid", "version"}
ALLOWED = {
    "core": set(),
    "grid": set(),
    "version": set(),
    "reference": set(),
    "kernels": set(),
    "ops": {"kernels"},
    "api": {"ops"},
    "analysis": {"api", "ops"},
    "__init__": {"api", "analysis", "reference"},
    "generation": {"integrations"},
    "cli": {"analysis", "generation", "integrations", "kernels", "playground"},
    "playground": {"analysis", "generation", "integrations"},
    "integrations": {"api", "ops", "analysis", "__init__"},
}
BESIDE = {"integrations", "studies", "benchmarks"}
ALLOWED["studies"] = {*ALLOWED, "studies"}
ALLOWED["benchmarks"] = {*ALLOWED, "benchmarks"}


FOLDERS = {
    "segkern": "segkern",
    "integrations": "segkern.integrations",
    "studies": "studies",
    "benchmarks": "benchmarks",
}


@cache
def modules() -> dict[str, Path]:
    """Return every module by its dotted name. The integrations have the name they are installed with."""
    paths = {}
    for name in FOLDERS:
        folder, prefix = ROOT / name, "segkern.integrations" if name == "integrations" else name
        for path in folder.rglob("*.py"):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


def is_for_types(node: ast.AST) -> bool:
    """Return True for an ``if TYPE_CHECKING:``."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@cache
def imports(name: str, *, lazy: bool) -> frozenset[str]:
    """Return the modules of the package that a module imports; with ``lazy``, including imports in functions."""
    targets: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if is_for_types(child) or (not lazy and isinstance(child, (ast.FunctionDef, ast.Lambda))):
                continue
            if isinstance(child, ast.Import):
                targets.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                submodules = {f"{child.module}.{alias.name}" for alias in child.names} & modules().keys()
                targets.update(submodules or {child.module})
            visit(child)

    visit(ast.parse(modules()[name].read_text(encoding="utf-8")))
    return frozenset(targets & modules().keys() - {name})


def room(name: str) -> str:
    """Return the folder or module of ``segkern/`` that contains a module, or the folder next to ``segkern/``."""
    first, *rest = name.split(".")
    return first if first != "segkern" else rest[0] if rest else "__init__"


@pytest.mark.parametrize("name", sorted(modules()))
def test_dependencies_point_one_way(name: str) -> None:
    allowed = ALLOWED[room(name)] | BASE | {room(name)}
    assert {target for target in imports(name, lazy=True) if room(target) not in allowed} == set()


def test_there_is_no_import_circle_and_few_levels() -> None:
    levels: dict[str, int] = {}

    def level(name: str, path: tuple[str, ...] = ()) -> int:
        assert name not in path, f"import circle: {' -> '.join((*path, name))}"
        if name not in levels:
            levels[name] = 1 + max((level(target, (*path, name)) for target in imports(name, lazy=False)), default=0)
        return levels[name]

    for name in modules():
        level(name)
    deep = {name: depth for name, depth in levels.items() if depth > MOST_LEVELS and room(name) not in BESIDE}
    assert deep == {}


def test_few_files_stand_at_the_top() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 8


@pytest.mark.parametrize("name", sorted(name for name in modules() if room(name) == "ops"))
def test_kernels_are_imported_only_when_an_operator_launches_one(name: str) -> None:
    assert not [target for target in imports(name, lazy=False) if room(target) == "kernels"]


def test_import_is_light() -> None:
    code = "import sys, segkern; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {name.split(".")[0] for name in loaded} & {"torch", "numpy", "triton", "diffusers", "transformers"}
    # PyTorch may import triton, so compare with what PyTorch loads.
    code = "import sys, torch; before = set(sys.modules); import segkern; segkern.seg_attention; segkern.energy; "
    code += "print(*set(sys.modules) - before)"
    added = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "segkern.api" in added
    assert not {name.split(".")[0] for name in added} & {"triton", "diffusers", "transformers"}


def test_public_names_are_complete() -> None:

    assert set(segkern.__all__) <= set(dir(segkern))
    assert all(getattr(segkern, name) is not None for name in segkern.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        segkern.no_such_name  # noqa: B018


@pytest.mark.parametrize("old", MOVED)
def test_old_import_paths_name_the_new_ones(old: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=f"{old} has moved; import {MOVED[old]} instead"):
        importlib.import_module(old)
    importlib.import_module(MOVED[old])


def test_every_file_is_licensed() -> None:
    folders = ("segkern", "integrations", "studies", "benchmarks", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    for path in files:
        assert path.read_text(encoding="utf-8").startswith("# SPDX-License-Identifier: Apache-2.0\n"), path

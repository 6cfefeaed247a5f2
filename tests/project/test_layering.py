# SPDX-License-Identifier: Apache-2.0
"""Dependencies point one way; importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "segkern"

# module -> what it may import from the package; everything may use these
BASE = {"blur", "coarse", "grid", "keeping", "version"}
ALLOWED = {
    "version": set(),
    "grid": set(),
    "keeping": set(),
    "blur": set(),
    "coarse": set(),
    "reference": set(),
    "sdpa": set(),
    "failures": set(),
    "dispatch": {"failures"},
    "estimate": {"sdpa"},
    "ops": {"sdpa", "dispatch", "failures", "kernels"},
    "coarse_ops": {"ops", "sdpa", "estimate"},
    "scores": {"sdpa"},
    "mass_ops": {"ops", "sdpa", "scores", "dispatch", "failures", "kernels"},
    "arguments": set(),
    "heads": set(),
    "frames": set(),
    "tracing": set(),
    "flops": {"ops", "coarse_ops", "mass_ops"},
    "plans": {"arguments", "dispatch"},
    "api": {"arguments", "failures", "frames", "heads", "plans", "ops", "coarse_ops", "sdpa", "dispatch", "tracing"},
    "masses": {"arguments", "mass_ops", "scores", "dispatch", "failures", "tracing"},
    "logits": {"api", "arguments", "masses", "sdpa"},
    "curvature": {"logits"},
    "energy": {"logits", "curvature"},
    "__init__": {"api", "energy", "masses", "reference"},
    "kernels": {"kernels", "dispatch", "failures"},
    "cli": {"commands", "diagnosis"},
    "commands": {
        "batches",
        "diagnosis",
        "loading",
        "drawing",
        "guidance_options",
        "options",
        "pictures",
        "tables",
        "environment",
        "dispatch",
        "explain",
        "integrations",
        "demo",
        "evaluation",
        "terminal",
        "energy_command",
        "layers_command",
        "ui_command",
    },
    "ui_command": {"loading", "terminal", "playground"},
    "playground": {
        "playground",
        "loading",
        "drawing",
        "demo",
        "guidance_options",
        "pictures",
        "energy_report",
        "energy_plots",
        "integrations",
    },
    "layers_command": {"loading", "outlines", "tables", "terminal", "integrations"},
    "outlines": {"loading", "integrations"},
    "terminal": {"loading"},
    "energy_command": {
        "loading",
        "drawing",
        "options",
        "pictures",
        "tables",
        "terminal",
        "energy_report",
        "energy_plots",
        "integrations",
    },
    "energy_report": {"energy", "integrations"},
    "energy_plots": {"energy_report"},
    "demo": {"loading", "drawing", "pictures", "tables", "evaluation", "integrations"},
    "batches": {"loading", "drawing", "pictures", "integrations"},
    "drawing": {"loading", "dispatch", "environment", "tables", "integrations"},
    "environment": set(),
    "diagnosis": {"dispatch", "environment", "loading"},
    "explain": {"dispatch", "kernels"},
    "evaluation": {"evaluation", "loading", "environment", "options", "integrations"},
    "options": set(),
    "guidance_options": {"drawing", "options", "integrations"},
    "tables": set(),
    "loading": set(),
    "pictures": set(),
}


def imports(path: Path) -> set[str]:
    """Names of the package's modules that a file imports, ``kernels`` for any of its modules."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "segkern":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("segkern.")}
    return found


@pytest.mark.parametrize("module", ALLOWED)
def test_dependencies_point_one_way(module: str) -> None:
    folder = PACKAGE / module
    files = sorted(folder.glob("*.py")) if folder.is_dir() else [PACKAGE / f"{module}.py"]
    assert files
    for path in files:
        assert imports(path) <= ALLOWED[module] | BASE, path.name


@pytest.mark.parametrize("operators", ["ops.py", "mass_ops.py"])
def test_kernels_are_imported_only_when_an_operator_launches_one(operators: str) -> None:
    tree = ast.parse((PACKAGE / operators).read_text())
    at_top = [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module]
    assert not [name for name in at_top if "kernels" in name]


@pytest.mark.parametrize("heavy", ["triton", "diffusers", "transformers"])
def test_import_is_light(heavy: str) -> None:
    # torch itself may import triton where it finds one, so what counts is what segkern adds to torch.
    code = f"import sys, torch; before = set(sys.modules); import segkern; added = set(sys.modules) - before; \
sys.exit(any(name.split('.')[0] == {heavy!r} for name in added))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_file_is_short_and_licensed() -> None:
    root = PACKAGE.parent
    files = [
        p for d in ("segkern", "integrations", "training", "benchmarks", "tests") for p in (root / d).rglob("*.py")
    ]
    assert files
    for path in files:
        text = path.read_text()
        assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n"), path
        assert text.count("\n") <= 360, f"{path} has {text.count(chr(10))} lines: it answers more than one question"

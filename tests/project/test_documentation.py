# SPDX-License-Identifier: Apache-2.0
"""Every code block of the README and the documentation runs, and prints what the page shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.project.documentation_models import Modular, replace_models, small
from tests.project.documentation_tools import PAGES, ROOT, blocks, pairs, run_page, run_python

MOVING = ROOT / "docs" / "moving.md"


def pages_with(language: str) -> list[str]:
    """Return the names of the pages with a block of a language."""
    return [str(page.relative_to(ROOT)) for page in PAGES if language in {block.language for block in blocks(page)}]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Return the names that blocks may use: small pipelines, and a temporary folder, which is the current one."""
    import diffusers

    replace_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return {"pipe": small(diffusers.StableDiffusionXLPipeline), "modular": Modular(), "folder": tmp_path}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", [name for name in pages_with("python") if ROOT / name != MOVING])
def test_python_runs(name: str, names: dict[str, Any]) -> None:
    run_page(ROOT / name, names, "python")


@pytest.mark.parametrize("name", pages_with("sh"))
def test_commands_exist(name: str, names: dict[str, Any]) -> None:
    run_page(ROOT / name, names | {"run": False}, "sh")


@pytest.mark.slow
@pytest.mark.parametrize("name", pages_with("sh"))
def test_commands_run(name: str, names: dict[str, Any]) -> None:
    run_page(ROOT / name, names, "sh")


@pytest.mark.parametrize("index", range(len(pairs(MOVING))))
def test_old_and_new_lines_draw_the_same(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the official script's pipeline is segkern's with the same arguments; see ``replace_models``."""
    replace_models(monkeypatch, output_type="np")
    python = [block for block in blocks(MOVING) if block.language == "python"]
    names: dict[str, Any] = {}
    for block in python:
        exec("\n".join(line for line in block.source.splitlines() if line.startswith(("from ", "import "))), names)
    pictures = []
    for block in pairs(MOVING)[index]:
        torch.manual_seed(5)
        run_python(block, MOVING, names)
        pictures.append(names["image"])
    assert len(pictures) >= 2
    torch.manual_seed(5)
    prompt, scale = ([""], 1.0) if index == 0 else ("a red fox", 5.0)
    plain = names["pipe"](prompt, guidance_scale=scale).images[0]
    for picture in pictures[1:]:
        assert np.abs(picture - pictures[0]).max() < 1e-4
    assert np.abs(plain - pictures[0]).max() > 1e-2, "guidance would not be noticed"


def test_the_other_blocks_on_moving_run() -> None:
    in_pairs = [block for group in pairs(MOVING) for block in group]
    others = [block for block in blocks(MOVING) if block.language == "python" and block not in in_pairs]
    assert len(others) == 2
    for block in others:
        run_python(block, MOVING, {})

# SPDX-License-Identifier: Apache-2.0
"""Every block of the README and of the documentation runs, and what a page says it prints is what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.project.documentation_models import Modular, replace_models, small
from tests.project.documentation_tools import PAGES, ROOT, parsed, run_page, strange

ELSEWHERE = "docs/moving.md"  # its Python runs in test_documentation_moving.py
NOT_RUN: set[tuple[str, str]] = set()


def pages_with(language: str) -> list[str]:
    """Names of the pages that have a block of a language."""
    having = [page for page in PAGES if any(one.parsed.language == language for one in parsed(page).examples())]
    return [str(page.relative_to(ROOT)) for page in having]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What a page's blocks find: a small pipeline as ``pipe``, and a folder of their own as the current one."""
    import diffusers

    replace_models(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return {"pipe": small(diffusers.StableDiffusionXLPipeline), "folder": tmp_path}


@pytest.mark.parametrize("name", [name for name in pages_with("python") if name != ELSEWHERE])
def test_python_runs(name: str, names: dict[str, Any]) -> None:
    if name == "docs/guiders.md":
        names["pipe"] = Modular()
    run_page(ROOT / name, names, "python")


@pytest.mark.parametrize("name", pages_with("sh"))
def test_commands_exist(name: str, names: dict[str, Any]) -> None:
    run_page(ROOT / name, names | {"run": False}, "sh")


@pytest.mark.slow
@pytest.mark.parametrize("name", pages_with("sh"))
def test_commands_run(name: str, names: dict[str, Any]) -> None:
    run_page(ROOT / name, names, "sh")


def test_few_blocks_do_not_run() -> None:
    found = {(each.name, one.parsed.reason) for each in PAGES for one in parsed(each) if one.parsed.above == "not run"}
    assert found == NOT_RUN


def test_every_block_is_run_or_compared_or_a_formula() -> None:
    assert [(each.name, block) for each in PAGES for block in strange(each)] == []

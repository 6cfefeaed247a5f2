# SPDX-License-Identifier: Apache-2.0
"""The README and the pages: tables match result files, Python parses, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.project import benchmark_tools  # noqa: F401  makes benchmarks/ importable, which is not installed

from benchmarks import doc_tables, plots, results  # isort: skip

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", doc_tables.PAGES)
def test_tables_are_what_the_result_files_give(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert "<!-- /" in text
    assert doc_tables.fill(text) == text, "run python -m benchmarks tables"


def test_every_table_is_shown_and_unknown_ones_are_refused() -> None:
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in doc_tables.PAGES)
    assert {name for name in doc_tables.TABLES if f"<!-- /{name} -->" in text} == set(doc_tables.TABLES)
    with pytest.raises(ValueError, match="unknown table 'magic'"):
        doc_tables.fill("<!-- magic -->\n<!-- /magic -->")


def test_every_suite_has_its_pictures() -> None:
    for stem, result in results.committed().items():
        for name in plots.rows_by_picture(stem, result):
            assert (results.RESULTS / name).exists(), "run python -m benchmarks plot"


def test_it_is_short_and_opens_with_the_two_commands() -> None:
    assert README.count("\n") <= 100
    assert max(README.index("make demo"), README.index("make test")) < 1000
    makefile = (ROOT / "Makefile").read_text()
    for command in set(re.findall(r"make ([a-z]+)", README)):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_python_examples_parse_and_import_what_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, "README.md", "exec")
        imports = [line for line in block.splitlines() if re.match(r"(from|import) segkern", line)]
        exec("\n".join(imports), {})

# SPDX-License-Identifier: Apache-2.0
"""What the README says is so: its numbers come from result files, its Python parses, its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()

from benchmarks import (  # noqa: E402
    energy,
    energy_page,
    host,
    performance,
    plots,
    releases,
    releases_page,
    results,
)
from benchmarks.readme import readme_with_tables, rendered  # noqa: E402


def test_measurements_are_those_of_the_result_files() -> None:
    assert rendered(), "no result file is committed"
    assert readme_with_tables(README) == README, "run python -m benchmarks.readme"


def test_the_performance_page_is_what_the_result_files_give() -> None:
    files = results.committed()
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert page == performance.page(files, host.committed()), "run python -m benchmarks.readme"
    for stem, result in files.items():
        for picture in plots.pictures(stem, result)[0]:
            assert (results.RESULTS / picture.name).exists(), "run python -m benchmarks.readme"


def test_it_opens_with_the_two_commands() -> None:
    first = README.index("make demo"), README.index("make test")
    assert max(first) < 900
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


def test_the_energy_page_is_what_the_result_files_give() -> None:
    page = (ROOT / "docs" / "energy.md").read_text(encoding="utf-8")
    assert page == energy_page.page(energy.committed()), "run python -m benchmarks.readme"
    for picture in energy_page.PICTURES:
        assert f"({picture})" in page
        assert (ROOT / "docs" / picture).exists(), "run python -m benchmarks.readme"
    assert (energy.FOLDER / "picture.png").exists()
    assert energy.committed_run()["model"] == energy.committed()["model"]


def test_the_page_of_releases_is_what_the_result_files_give() -> None:
    page = (ROOT / "docs" / "releases.md").read_text(encoding="utf-8")
    wanted = releases_page.page(releases.committed(), releases.committed_extras())
    assert page == wanted, "run python -m benchmarks.readme"

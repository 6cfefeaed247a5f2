# SPDX-License-Identifier: Apache-2.0
"""Tools that run the code blocks of the documentation, on small models in place of published ones.

A hidden comment above a block describes it:

- ``<!-- output -->``: the ``text`` block shows the output of the previous block; ``...`` matches anything.
- ``<!-- raises -->``: the ``text`` block shows the error or warning of the previous block; ``...`` as above.
- ``<!-- pair -->``: this block and the following ones, up to the next heading, generate the same images.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkern.generation.prompt_files import read_rows
from tests.project.documentation_commands import refused, run_shell

ROOT = Path(__file__).parents[2]
CARD = ROOT / "segkern" / "checkpoints" / "demo" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|(?<=\n\n)((?:    [^\n]*\n|\n+(?=    ))+)", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!-- (output|raises|pair) -->\n+\Z")
_COMMANDS = ("segkern", "make", "pip", "python", "accelerate", "bash")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A code block of a page.

    Attributes:
        language: ``python``, ``sh``, ``json`` for lines of a prompt file, ``text``, ``bibtex``, or ``formula`` for
            other indented blocks.
        source: text of the block.
        comment: ``output``, ``raises``, ``pair`` or an empty string: the comment above the block.
        line: line at which the text begins.
        section: number of level-two headings before the block.
        raises: True if the next block contains the error that this block raises.
    """

    language: str
    source: str
    comment: str
    line: int
    section: int
    raises: bool


def blocks(page: Path) -> list[Block]:
    """Return all fenced and indented blocks of a page."""
    text = page.read_text(encoding="utf-8")
    parsed = []
    for match in _BLOCK.finditer(text):
        language, source, indented = match.groups()
        if indented is not None:
            source = re.sub(r"^    ", "", indented, flags=re.MULTILINE)
            language = _guessed(source)
        before, after = text[: match.start()], text[match.end() :]
        comment = _COMMENT.search(before)
        line, section = before.count("\n") + (indented is None), before.count("\n## ")
        raises = after.lstrip().startswith("<!-- raises -->")
        parsed.append(Block(language, source, comment[1] if comment else "", line, section, raises))
    return parsed


def _guessed(source: str) -> str:
    lines = [line for line in source.split("\n") if line]
    if all(line.startswith(_COMMANDS) for line in lines):
        return "sh"
    return "python" if lines[0].startswith(("import ", "from ")) else "formula"


def run_page(page: Path, names: dict[str, Any], language: str) -> None:
    """Run all blocks of one language on a page in order, and compare their output and errors with the page."""
    names = dict(names)
    printed = raised = before = ""
    for block in blocks(page):
        place = f"{page.name}, line {block.line}"
        if block.language == "text":
            assert block.comment in ("output", "raises"), f"{place}: no comment above this block"
            if before != language or not names.get("run", True):
                continue
            if block.comment == "raises":
                _compare(f"...{block.source.strip()}...\n", f"{raised}\n", place)
            else:
                _compare(block.source, printed, place)
            continue
        if block.language == "json":
            (Path(names["folder"]) / "rows.jsonl").write_text(block.source, encoding="utf-8")
            assert not any(row.error for row in read_rows(names["folder"] / "rows.jsonl")), place
            continue
        assert block.language in ("python", "sh", "formula", "bibtex"), f"{place}: {block.language}"
        before = block.language
        if before != language:
            continue
        if language == "python":
            printed, raised = run_python(block, page, names)
        elif block.raises:
            raised = refused(block.source)
        else:
            printed = run_shell(block.source, names["folder"], names.get("run", True))


def run_python(block: Block, page: Path, names: dict[str, Any]) -> tuple[str, str]:
    """Run a block and return its output, and its error or warnings if the page shows one."""
    printed, raised = io.StringIO(), ""
    code = compile("\n" * block.line + block.source, str(page), "exec")
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=block.raises) as caught:
        try:
            exec(code, names)
        except Exception as error:
            if not block.raises:
                raise
            raised = f"{type(error).__name__}: {error}"
    if block.raises and not raised:
        raised = "\n".join(f"{warning.category.__name__}: {warning.message}" for warning in caught or [])
    return printed.getvalue(), raised


def _compare(expected: str, actual: str, place: str) -> None:
    checker, example = doctest.OutputChecker(), doctest.Example("", expected)
    same = checker.check_output(expected, actual, _FLAGS)
    assert same, f"{place}: {checker.output_difference(example, actual, _FLAGS)}"


def pairs(page: Path) -> list[list[Block]]:
    """Return the groups of Python blocks that generate the same images according to the page."""
    groups: list[list[Block]] = []
    section = None
    for block in blocks(page):
        if block.comment == "pair":
            groups.append([])
            section = block.section
        if block.language == "python" and block.section == section:
            groups[-1].append(block)
    return groups

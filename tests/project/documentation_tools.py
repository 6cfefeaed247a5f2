# SPDX-License-Identifier: Apache-2.0
"""Blocks of the documentation run as they are shown, on small models in place of published ones.

A page says what is special about a block in a comment above it, which readers do not see:

- ``<!-- output -->``: a ``text`` block with what the block before it prints; ``...`` stands for anything.
- ``<!-- raises -->``: a ``text`` block with the error or warning of the block before it; ``...`` as above.
- ``<!-- pair -->``: the first of several blocks, up to the next heading, whose pictures are the same.
- ``<!-- not run: REASON -->``: a block that is only read.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import FencedCodeBlockLexer

from tests.project.documentation_commands import refused, run_shell

ROOT = Path(__file__).parents[2]
CARD = ROOT / "segkern" / "checkpoints" / "demo" / "README.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", CARD, *sorted((ROOT / "docs").glob("*.md"))]

_COMMENT = re.compile(r"<!-- (output|raises|pair|not run)(?:: ([^>]*))? -->\n+\Z")
_INDENTED = re.compile(r"(?<=\n\n)(?:    .*\n|\n+(?=    ))+")
_COMMANDS = ("segkern", "make", "pip", "python", "accelerate", "bash")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One block of a page.

    Attributes:
        language: that it names, or what an indented one is.
        source: its text.
        above: what the comment above it says it is; empty for an ordinary one.
        reason: why it is not run.
        line: where its text begins.
        raises: whether the next block tells what this one raises.
    """

    language: str
    source: str
    above: str
    reason: str
    line: int
    raises: bool


def blocks(document: Document) -> Iterator[Region]:
    """A parser for Sybil: every fenced and every indented block."""
    fences = list(FencedCodeBlockLexer(r"\w*", {"language": "language", "source": "source"})(document))
    for region in fences:
        found = region.lexemes or {}
        yield _region(document, region.start, region.end, str(found["language"]), str(found["source"]))
    for match in _INDENTED.finditer(document.text):
        inside = any(fence.start <= match.start() < fence.end for fence in fences)
        if not inside:
            source = re.sub(r"^    ", "", match[0], flags=re.MULTILINE)
            yield _region(document, match.start(), match.end(), _guessed(source), source)


def _guessed(source: str) -> str:
    """What an indented block is."""
    lines = [line for line in source.split("\n") if line]
    if all(line.startswith(_COMMANDS) for line in lines):
        return "sh"
    return "python" if lines[0].startswith(("import ", "from ")) else "formula"


def _region(document: Document, start: int, end: int, language: str, source: str) -> Region:
    comment = _COMMENT.search(document.text, max(0, start - 400), start)
    line = document.text.count("\n", 0, start) + (document.text[start] == "`")
    raises = document.text[end:].lstrip().startswith("<!-- raises -->")
    above, reason = (comment[1], comment[2] or "") if comment else ("", "")
    return Region(start, end, Block(language, source, above, reason, line, raises), evaluate)


def evaluate(example: Example) -> None:
    """Run one block, or compare it with what the one before it did."""
    block: Block = example.parsed
    place = f"{Path(example.path).name}, line {block.line}"
    names = example.namespace
    if block.above == "not run" or block.language == "formula":
        return
    if block.language == "python":
        names["__printed__"], names["__raised__"] = _run(block, str(example.path), names)
    elif block.language == "sh" and block.raises:
        names["__raised__"] = refused(block.source)
    elif block.language == "sh":
        names["__printed__"] = run_shell(block.source, names["folder"], names.get("run", True))
    elif block.language == "text" and block.above == "raises":
        _compare(f"...{block.source.strip()}...\n", f"{names['__raised__']}\n", place)
    elif block.language == "text" and block.above == "output" and names.get("run", True):
        _compare(block.source, names["__printed__"], place)


def _run(block: Block, path: str, names: dict[str, Any]) -> tuple[str, str]:
    """What Python prints, and what it raises where the page says that it does."""
    printed, raised = io.StringIO(), ""
    code = compile("\n" * block.line + block.source, path, "exec")
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=block.raises) as told:
        try:
            exec(code, names)
        except Exception as error:
            if not block.raises:
                raise
            raised = f"{type(error).__name__}: {error}"
    if block.raises and not raised:
        raised = "\n".join(f"{each.category.__name__}: {each.message}" for each in told or [])
    return printed.getvalue(), raised


def _compare(expected: str, actual: str, place: str) -> None:
    checker = doctest.OutputChecker()
    shown = doctest.Example("", expected)
    same = checker.check_output(expected, actual, _FLAGS)
    assert same, f"{place}: {checker.output_difference(shown, actual, _FLAGS)}"


def parsed(page: Path) -> Document:
    """A page and its blocks."""
    return Sybil([blocks], path=str(ROOT), pattern="*.md").parse(page)


def run_page(page: Path, names: dict[str, Any], language: str) -> None:
    """Run a page's blocks of a language one after the other, each with what it prints."""
    document = parsed(page)
    document.namespace.update(names)
    before = ""
    for example in document.examples():
        block: Block = example.parsed
        before = before if block.language == "text" else block.language
        if before == language:
            example.evaluate()


def pairs(page: Path) -> list[list[Example]]:
    """Blocks of which a page says that they draw the same."""
    found: list[list[Example]] = []
    document, end, open_ = parsed(page), 0, False
    for example in document.examples():
        block: Block = example.parsed
        if block.above == "pair":
            found.append([])
            open_ = True
        elif "\n## " in document.text[end : example.start]:
            open_ = False
        end = example.end
        if open_ and block.language == "python":
            found[-1].append(example)
    return found


def strange(page: Path) -> list[Block]:
    """Blocks that no rule says anything about."""
    known = ("python", "sh", "formula")
    found = [example.parsed for example in parsed(page).examples()]
    return [each for each in found if each.language not in known and not (each.language == "text" and each.above)]

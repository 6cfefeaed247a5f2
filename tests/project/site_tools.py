# SPDX-License-Identifier: Apache-2.0
"""The documentation site, built as ``make docs`` builds it, and what its pages link to and load."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LOADS = {"script": "src", "img": "src", "link": "href", "source": "src", "iframe": "src"}


def build(folder: Path) -> str:
    """Build the site into a folder; returns what that prints, which is nothing if all is well."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr + ("" if done.returncode == 0 else f"exit code {done.returncode}")


@dataclass
class Page(HTMLParser):
    """One built page.

    Attributes:
        ids: anchors.
        links: targets of links.
        loads: what a browser loads to show it.
    """

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag == "a" and found.get("href"):
            self.links.append(found["href"] or "")
        if found.get(_LOADS.get(tag, "")) and found.get("rel") != "canonical":
            self.loads.append(found[_LOADS[tag]] or "")


def pages(folder: Path) -> dict[Path, Page]:
    """Every page of a built site."""
    found = {}
    for path in sorted(folder.rglob("*.html")):
        page = Page()
        page.feed(path.read_text(encoding="utf-8"))
        found[path] = page
    return found

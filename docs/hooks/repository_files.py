# SPDX-License-Identifier: Apache-2.0
"""A hook of MkDocs: bring what lies outside of ``docs/`` into the site, files that pages link to and docstrings.

A page links to ``../X`` for a file ``X`` of the repository, which is right where the repository is browsed. In the site
the file lies at ``repository/X``; texts get the ending ``.txt`` there, so that every server shows them as such.

Docstrings are read from sources, which lie in two folders and are one package only where it is installed.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
OUTSIDE = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")

_PICTURES = (".png", ".svg")
_PACKAGES = tempfile.TemporaryDirectory(prefix="segkern-sources-")


@event_priority(100)
def on_config(config: Any) -> Any:
    """Show mkdocstrings, before it looks, the package with ``integrations/`` in its place."""
    package = Path(_PACKAGES.name) / "segkern"
    if not package.exists():
        package.mkdir()
        for entry in (*(ROOT / "segkern").iterdir(), ROOT / "integrations"):
            if entry.name not in {"__pycache__", *(known.name for known in package.iterdir())}:
                (package / entry.name).symlink_to(entry.resolve())
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_PACKAGES.name]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add every file outside of ``docs/`` that a page links to."""
    for page in list(files.documentation_pages()):
        for name in OUTSIDE.findall(page.content_string):
            place = _place(name)
            if not (ROOT / name).is_file():
                raise PluginError(f"{page.src_uri} links to ../{name}, which is no file of the repository")
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to those files as they are in the site."""
    return OUTSIDE.sub(lambda link: _place(link[1]), markdown)


def _place(name: str) -> str:
    """Where a file of the repository lies in the site.

    Example:
        >>> _place("benchmarks/results/step/cpu.png"), _place("CONTRIBUTING.md")
        ('repository/benchmarks/results/step/cpu.png', 'repository/CONTRIBUTING.md.txt')
    """
    return f"repository/{name}" + ("" if name.endswith(_PICTURES) else ".txt")

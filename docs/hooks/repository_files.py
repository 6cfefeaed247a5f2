# SPDX-License-Identifier: Apache-2.0
"""An MkDocs hook that adds files outside ``docs/`` to the site: files that pages link to, and sources of docstrings.

A page links to ``../X`` for a file ``X`` of the repository, which works on a code host. In the site, the file is
``repository/X``. Text files get the suffix ``.txt`` there, so every server shows them as text.

Docstrings are read from two source folders that form one package only after installation.
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
    """Point mkdocstrings to a folder in which ``integrations/`` is a subpackage of segkern."""
    package = Path(_PACKAGES.name) / "segkern"
    if not package.exists():
        package.mkdir()
        for entry in (*(ROOT / "segkern").iterdir(), ROOT / "integrations"):
            if entry.name not in {"__pycache__", *(known.name for known in package.iterdir())}:
                (package / entry.name).symlink_to(entry.resolve())
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_PACKAGES.name]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Add every file outside ``docs/`` that a page links to."""
    for page in list(files.documentation_pages()):
        for name in OUTSIDE.findall(page.content_string):
            place = _place(name)
            if not (ROOT / name).is_file():
                raise PluginError(f"{page.src_uri} links to ../{name}, which is not a file of the repository")
            if files.get_file_from_path(place) is None:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite links to these files for the site."""
    return OUTSIDE.sub(lambda link: _place(link[1]), markdown)


def _place(name: str) -> str:
    """Return the path of a repository file in the site.

    Example:
        >>> _place("benchmarks/results/step/cpu.png"), _place("CONTRIBUTING.md")
        ('repository/benchmarks/results/step/cpu.png', 'repository/CONTRIBUTING.md.txt')
    """
    return f"repository/{name}" + ("" if name.endswith(_PICTURES) else ".txt")

# SPDX-License-Identifier: Apache-2.0
"""Write a version and a date to every file that contains them: ``python -m tests.project.set_version 0.2.0``."""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
VERSION = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)((a|b|rc)\d+)?")
# A pattern for each file, whose first match is replaced with the version and the date.
PLACES = {
    "segkern/version.py": (r'^__version__ = ".*"$', '__version__ = "{version}"'),
    "integrations/comfyui/pyproject.toml": (r'^version = ".*"$', 'version = "{version}"'),
    "CITATION.cff": (r"^version: .*\n(date-released: .*\n)?", "version: {version}\ndate-released: {day}\n"),
    "CHANGELOG.md": (r"^## \S+ - unreleased$", "## {version} - {day}"),
}


def release(root: Path, version: str, day: datetime.date) -> None:
    """Make the checkout in ``root`` the release of that version and day. If any file does not match, write nothing.

    Raises:
        ValueError: If the version is invalid, or a file does not contain one where it should.
    """
    if not VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is not a version; use the form 0.2.0 or 0.2.0rc1")
    texts = {}
    for name, (pattern, replacement) in PLACES.items():
        text = (root / name).read_text(encoding="utf-8")
        text, count = re.subn(pattern, replacement.format(version=version, day=day), text, count=1, flags=re.MULTILINE)
        if count == 0:
            raise ValueError(f"{name} has no line that matches {pattern!r}; was this version released already?")
        texts[name] = text
    for name, text in texts.items():
        (root / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("set_version.py needs one version, such as 0.2.0")
    try:
        release(ROOT, sys.argv[1], datetime.date.today())
    except ValueError as error:
        sys.exit(f"set_version.py: {error}")

# SPDX-License-Identifier: Apache-2.0
"""Packaging that pyproject.toml cannot express: ``integrations/`` is installed as ``segkern.integrations``, and the
package index shows the README with links to repository files replaced by plain text.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

_ROOT = Path(__file__).parent
_PICTURE = re.compile(r"^!\[[^\]]*\]\((?!https?:)[^)]*\)\n+", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https?:|#)[^)]*\)")

integrations = ["segkern.integrations", *(f"segkern.integrations.{name}" for name in find_packages("integrations"))]


def description() -> str:
    """Return the README without links and images that refer to files of the repository."""
    return _LINK.sub(r"\1", _PICTURE.sub("", (_ROOT / "README.md").read_text(encoding="utf-8")))


setup(
    packages=[*find_packages(include=["segkern", "segkern.*"]), *integrations],
    package_dir={"segkern.integrations": "integrations"},
    long_description=description(),
    long_description_content_type="text/markdown",
)

# SPDX-License-Identifier: Apache-2.0
"""An extension of Griffe: the package's docstrings as Markdown, for the reference pages of the site."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Extension

_GIVEN = re.compile(r"^Default\((.*)\)$")

DOCS = Path(__file__).parents[1]
_ROLE = re.compile(r":(?:func|class|mod|meth|attr):`(~?)([\w.]+)`")
_SEVERAL = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n        .*)*)", re.MULTILINE)
_SOURCE = re.compile(r"^Source: (.*(?:\n    .*)*)", re.MULTILINE)


class PackageStyle(Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
        if obj.is_attribute and obj.value is not None:
            obj.value = _shown(obj.value)
        for parameter in obj.parameters if obj.is_function else ():
            if parameter.default is not None:
                parameter.default = _shown(parameter.default)


def _shown(default: Any) -> str:
    """A default value without what remembers that nobody gave it."""
    return _GIVEN.sub(r"\1", str(default)).replace("_DEFAULT_LAYERS", "'mid'")


def as_markdown(text: str) -> str:
    """A docstring with Sphinx's roles, literal blocks, lists of arguments and sections of one line in other words.

    Example:
        >>> as_markdown("See :func:`~segkern.gaussian_blur`::")
        'See [`gaussian_blur`][segkern.gaussian_blur]:'
    """
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
    text = _SEVERAL.sub(lambda names: "\n".join(f"    {name}: {names[2]}" for name in names[1].split(", ")), text)
    text = _SOURCE.sub(lambda source: "**Source:** " + re.sub(r"\n +", " ", source[1]), text)
    return _ROLE.sub(_reference, text)


def _reference(role: re.Match[str]) -> str:
    """A role as a link where a page documents the object, its last part alone where it begins with a tilde."""
    name = role[2]
    shown = name.rpartition(".")[2] if role[1] else name
    target = next((full for full in documented() if full == name or full.endswith(f".{name}")), None)
    return f"`{shown}`" if target is None else f"[`{shown}`][{target}]"


@cache
def documented() -> tuple[str, ...]:
    """Full names of all objects that the reference pages document, in their order."""
    pages = sorted(DOCS.glob("api*.md"), key=lambda page: len(page.name))
    return tuple(re.findall(r"^::: (\S+)", "\n".join(page.read_text(encoding="utf-8") for page in pages), re.MULTILINE))

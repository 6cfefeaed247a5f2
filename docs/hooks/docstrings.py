# SPDX-License-Identifier: Apache-2.0
"""A Griffe extension that converts the package's docstrings to Markdown for the API reference."""

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
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Handle a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
        if obj.is_attribute and obj.value is not None:
            obj.value = _shown(obj.value)
        for parameter in obj.parameters if obj.is_function else ():
            if parameter.default is not None:
                parameter.default = _shown(parameter.default)


def _shown(default: Any) -> str:
    """Return a default value without the wrapper that marks it as a default."""
    return _GIVEN.sub(r"\1", str(default)).replace("_DEFAULT_LAYERS", "'mid'")


def as_markdown(text: str) -> str:
    """Convert Sphinx roles, literal blocks, lists of arguments and one-line sections of a docstring.

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
    """Return a link to a documented object, or its name as code; a tilde shortens the name to its last part."""
    name = role[2]
    shown = name.rpartition(".")[2] if role[1] else name
    target = next((full for full in documented() if full == name or full.endswith(f".{name}")), None)
    return f"`{shown}`" if target is None else f"[`{shown}`][{target}]"


@cache
def documented() -> tuple[str, ...]:
    """Return the full names of all objects in the API reference, in order."""
    return tuple(re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))

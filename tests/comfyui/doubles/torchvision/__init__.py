# SPDX-License-Identifier: Apache-2.0
"""Test double of torchvision: the names that ComfyUI imports, none of which can be called.

torchvision fits one build of PyTorch only, and the package index has none for the CPU build.
"""

from __future__ import annotations

from typing import Any, NoReturn


def absent(*arguments: Any, **keywords: Any) -> NoReturn:
    """Any function of torchvision."""
    raise RuntimeError("torchvision is a test double here, which computes nothing")


class Absent:
    """Any class of torchvision."""

    __init__ = absent

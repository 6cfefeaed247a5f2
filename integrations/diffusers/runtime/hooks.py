# SPDX-License-Identifier: Apache-2.0
"""Forward hooks that belong to one module in one process: a copy of the module is plain, and holds nothing of ours."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch


class Hook:
    """What is registered on modules.

    A copy of the module (``copy.deepcopy``, ``pickle``, ``torch.save``) gets in its place a function of the standard
    library that takes anything and does nothing, so that it can be loaded where segkern is not installed and keeps no
    pipeline alive.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class Outer(Hook):
    """A hook of a denoiser: what it calls stays outside of what is compiled.

    Args:
        function: what it calls.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @torch.compiler.disable
    def __call__(self, *given: Any) -> Any:
        return self._function(*given)

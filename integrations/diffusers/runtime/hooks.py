# SPDX-License-Identifier: Apache-2.0
"""Forward hooks that belong to one module in one process: a copy of the module is plain, and holds nothing of ours."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.grid import Grid

_THREAD = threading.local()


def act_here(acts: bool) -> None:
    """Let plans act in this thread, or not: while one thread is in a guided forward, another may be in a plain one."""
    _THREAD.acts = acts


def acts_here() -> bool:
    """True in a thread that is in a guided forward, and in graphs that are being compiled, which take turns."""
    return torch.compiler.is_compiling() or getattr(_THREAD, "acts", False)


class Hook:
    """A hook that is registered on modules.

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


class _ReadGrid(Hook):
    """Forward pre-hook of a transformer: the height and width of its image are the grid of its layers."""

    def __init__(self, transformer: nn.Module, modules: list[str], tell: Callable[[str, Grid], None]) -> None:
        self._transformer = transformer
        self._modules = modules
        self._tell = tell

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if module is self._transformer and hidden_states.ndim == 4:  # a copy is not guided
            for name in self._modules:
                self._tell(name, Grid(*hidden_states.shape[2:]))


def hook_grids(model: nn.Module, modules: Iterable[str], tell: Callable[[str, Grid], None]) -> list[RemovableHandle]:
    """Tell the grid of each attention module of a UNet, by its name, when the transformer around it gets its image."""
    handles = []
    for name, transformer in model.named_modules():
        inside = [module for module in modules if module.startswith(f"{name}.")]
        if isinstance(transformer, Transformer2DModel) and inside:
            hook = _ReadGrid(transformer, inside, tell)
            handles.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))
    return handles

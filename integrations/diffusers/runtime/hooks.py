# SPDX-License-Identifier: Apache-2.0
"""Forward hooks that act on one module in one process. Copies of the module do not contain them."""

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
    """Set whether plans act in this thread. One thread may be in a guided call while another is in an unguided one."""
    _THREAD.acts = acts


def acts_here() -> bool:
    """Return True in a thread with a guided call, and while compiling, which only one thread does at a time."""
    return torch.compiler.is_compiling() or getattr(_THREAD, "acts", False)


class Hook:
    """A hook that is registered on modules.

    In a copy of the module (``copy.deepcopy``, ``pickle``, ``torch.save``), the hook is replaced by a function of the
    standard library that accepts anything and does nothing. The copy can therefore be loaded without segkern and keeps
    no pipeline alive.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class Outer(Hook):
    """A hook of a denoiser whose function is never compiled.

    Args:
        function: The function to call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @torch.compiler.disable
    def __call__(self, *given: Any) -> Any:
        return self._function(*given)


class _ReadGrid(Hook):
    """Forward pre-hook of a transformer that reads the height and width of its image as the grid of its layers."""

    def __init__(self, transformer: nn.Module, modules: list[str], tell: Callable[[str, Grid], None]) -> None:
        self._transformer = transformer
        self._modules = modules
        self._tell = tell

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if module is self._transformer and hidden_states.ndim == 4:  # copies are not guided
            for name in self._modules:
                self._tell(name, Grid(*hidden_states.shape[2:]))


def hook_grids(model: nn.Module, modules: Iterable[str], tell: Callable[[str, Grid], None]) -> list[RemovableHandle]:
    """Call ``tell`` with each attention module's name and grid when the UNet transformer around it gets its image."""
    handles = []
    for name, transformer in model.named_modules():
        inside = [module for module in modules if module.startswith(f"{name}.")]
        if isinstance(transformer, Transformer2DModel) and inside:
            hook = _ReadGrid(transformer, inside, tell)
            handles.append(transformer.register_forward_pre_hook(hook, with_kwargs=True))
    return handles

# SPDX-License-Identifier: Apache-2.0
"""The only module that uses private APIs of torch and triton. Each function lists the versions it was checked with."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as global_hooks

P = ParamSpec("P")
T = TypeVar("T")


def dispatch_mode_is_active() -> bool:
    """Return True if a ``TorchDispatchMode`` (fake tensors, a FLOP counter) is active; torch 2.11 to 2.13."""
    return torch._C._len_torch_dispatch_stack() != 0


def transform_is_active() -> bool:
    """Return True if a ``torch.func`` transform (``vmap``, ``grad``, ``jvp``) is active; torch 2.11 to 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def forward_mode_is_active() -> bool:
    """Return True if a ``forward_ad.dual_level`` is open; torch 2.11 to 2.13."""
    return forward_ad._current_level >= 0


def constant_while_compiling(function: Callable[P, T]) -> Callable[P, T]:
    """``torch.compiler.assume_constant_result`` without its import of the compiler; torch 2.11 to 2.13.

    The value that the function returns while a graph is compiled is a constant of the graph.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def specialised_number(number: float) -> float:
    """Return a number, or the value of a symbolic number while compiling, and guard the compiled graph on it.

    ``guard_scalar`` of torch's experimental symbolic shapes; torch 2.11 to 2.13.
    """
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # imports SymPy, which takes a third of a second

    specialised: float = guard_scalar(number)
    return specialised


def dynamo_settings(**settings: Any) -> AbstractContextManager[Any]:
    """Return a context that changes ``torch._dynamo.config``; torch 2.11 to 2.13."""
    return torch._dynamo.config.patch(settings)


def checkpointing() -> Callable[[torch.Tensor], Any] | None:
    """Return the pack hook of an active checkpoint that drops tensors (not reentrant), or None; torch 2.11 to 2.13."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks[0] if hooks and hooks[0].__module__ == "torch.utils.checkpoint" else None


def is_compiled_in_place(module: torch.nn.Module) -> bool:
    """Return True if ``module.compile()`` was called, rather than ``torch.compile(module)``; torch 2.11 to 2.13."""
    return module._compiled_call_impl is not None


def forward_hooks(module: torch.nn.Module) -> tuple[Callable[..., Any], ...]:
    """Return the forward pre-hooks and forward hooks of a module; torch 2.11 to 2.13."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return (*before.values(), *after.values()) if before or after else ()


def version_of(tensor: torch.Tensor) -> int:
    """Return a tensor's version, which increases with each write, or 0 in inference mode; torch 2.11 to 2.13."""
    return 0 if tensor.is_inference() else tensor._version


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Return True if a hook or pre-hook may change the result of the module's forward; torch 2.11 to 2.13.

    Global hooks count, except torch's own, which only observe (a FLOP counter has some).
    """
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    before, after = global_hooks._global_forward_pre_hooks, global_hooks._global_forward_hooks
    if not before and not after:
        return False
    of_all = (*before.values(), *after.values())
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in of_all)


def pytorch_attention() -> Callable[..., Any]:
    """Return PyTorch's own ``scaled_dot_product_attention``, even if it has been replaced; torch 2.11 to 2.13."""
    attention: Callable[..., Any] = torch._C._nn.scaled_dot_product_attention
    return attention


def linear_is_pytorchs() -> bool:
    """Return True if ``nn.Linear`` and the function it calls are PyTorch's own; torch 2.11 to 2.13."""
    code = getattr(torch.nn.Linear.forward, "__globals__", {})
    return torch.nn.functional.linear is torch._C._nn.linear and code.get("__name__") == torch.nn.Linear.__module__


def triton_allocator() -> Callable[[int, int, int | None], Any]:
    """Return the function that ``triton.set_allocator`` has set in this context; Triton 3.6 to 3.9."""
    from triton.runtime._allocation import _allocator

    return _allocator.get()

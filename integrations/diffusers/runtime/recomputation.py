# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing under guidance: a module that the backward pass repeats gets the plan of its original call.

diffusers' modules run their checkpointed parts through a function that ``enable_gradient_checkpointing`` sets on them.
During a guided call, this function gets wrapped parts that store the plan of the call. Within the call, a wrapped part
simply runs. When the backward pass calls it again, possibly in an autograd thread after the guidance was removed, it
temporarily restores the plan. Norms and masses of such calls are discarded. Other ways to checkpoint a part of a
denoiser do not specify what they will repeat, and are refused.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.core.private_apis import checkpointing, is_compiled_in_place
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.branches import Join, JoinPlan
from segkern.integrations.diffusers.runtime.guided_layers import GuidedLayers
from segkern.integrations.diffusers.runtime.hooks import Hook, act_here, acts_here
from segkern.integrations.diffusers.runtime.kernels import NativeAttention
from segkern.integrations.diffusers.runtime.plans import LayerPlan
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor

_COMPILED = (
    "guide does not support gradient checkpointing inside compiled code; compile only the blocks, with the denoiser's "
    "compile_repeated_blocks(), or call its disable_gradient_checkpointing()"
)
_FUNCTION = "_gradient_checkpointing_func"


class Lock(Protocol):
    """A lock that one thread holds at a time."""

    def acquire(self) -> Any:
        """Acquire the lock."""

    def release(self) -> Any:
        """Release the lock."""


class Recomputation:
    """The checkpointed parts of one denoiser.

    Args:
        model: The denoiser.
        layers: The guided layers.
        joins: Hooks that are registered during a guided call.

    Attributes:
        lock: Lock that a thread holds during a denoiser call; None if there is none.
        compiled: Whether the denoiser is in a wrapper of ``torch.compile``.
    """

    def __init__(self, model: nn.Module, layers: GuidedLayers, joins: Collection[Join]) -> None:
        self.lock: Lock | None = None
        self.compiled = False
        self._model = model
        self._layers = layers
        self._joins = joins
        self._modules: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
        self._changed: list[Any] = []
        self._watches: list[RemovableHandle] = []
        self._around: Any = None  # the checkpoint that contains the denoiser call
        self._depth = 0  # nesting depth of parts in the current call
        self._forward: tuple[object, int] | None = None  # the current call and its thread

    def attach(self) -> None:
        """Let checkpointed parts of the next call store its plan."""
        if not torch.is_grad_enabled():
            return
        self._replace()
        if not self._watches:
            for layer in self._layers:
                watch = _Watch(layer.attention, layer.info.module, self)
                self._watches.append(layer.attention.register_forward_pre_hook(watch))

    def detach(self) -> None:
        """Restore the modules."""
        self.end()
        while self._watches:
            self._watches.pop().remove()
        self._restore()

    def _replace(self) -> None:
        for module in self._modules:
            function = getattr(module, _FUNCTION, None)
            if module.gradient_checkpointing and function is not None and not isinstance(function, _PlanKeeping):
                setattr(module, _FUNCTION, _PlanKeeping(function, self))
                self._changed.append(module)

    def _restore(self) -> None:
        while self._changed:
            module = self._changed.pop()
            function = getattr(module, _FUNCTION, None)
            if isinstance(function, _PlanKeeping):
                setattr(module, _FUNCTION, function.original)

    def begin(self) -> None:
        """Begin a guided call in this thread.

        Raises:
            RuntimeError: If parts are checkpointed in a denoiser that is compiled as a whole.
        """
        if self._changed and (self.compiled or is_compiled_in_place(self._model)):
            raise RuntimeError(_COMPILED)
        self._forward = object(), threading.get_ident()
        self._around, self._depth = checkpointing(), 0

    def end(self) -> None:
        """End the call, or the guided part of it."""
        self._forward = None

    def remembering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function of the current call so that it can be called again later."""
        forward = self._forward
        if forward is None or forward[1] != threading.get_ident():
            return function
        return _Part(function, self, forward)

    def is_under_way(self, forward: tuple[object, int]) -> bool:
        """Return True in the thread of a call until the call ends."""
        return self._forward is not None and self._forward[0] is forward[0] and self._in_own_thread()

    def _in_own_thread(self) -> bool:
        return self._forward is not None and self._forward[1] == threading.get_ident()

    @contextmanager
    def within(self) -> Iterator[None]:
        """Return a context inside which a part that stores the plan runs."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def check(self, layer: str) -> None:
        """Check that the backward pass does not repeat a layer without guidance.

        Raises:
            RuntimeError: If the layer is in a checkpoint that is not the model's own.
        """
        if self._forward is None or self._depth:
            return
        if not torch.is_grad_enabled() or checkpointing() not in (None, self._around):
            raise RuntimeError(
                f"guide does not support gradients through layer {layer!r}: a part of the denoiser runs under "
                f"torch.utils.checkpoint (or torch.no_grad), and backward would repeat it without guidance; checkpoint "
                f"it with the denoiser's enable_gradient_checkpointing(), which accepts a custom function"
            )

    def parts_of(self, function: Callable[..., Any]) -> _Parts:
        """Return the guided parts of a module, or of the whole denoiser if the function belongs to no module."""
        module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        if isinstance(module, nn.Module):
            inside = set(map(id, module.modules()))
            layers = [layer for layer in self._layers if id(layer.attention) in inside]
            joins = [join for join in self._joins if id(join.module) in inside]
        else:
            layers, joins = list(self._layers), list(self._joins)
        return _Parts(
            [(layer.attention, layer.processor, layer.processor.plan, layer.processor.grid) for layer in layers],
            [(join, join.plan) for join in joins],
        )

    def run_again(self, function: Callable[..., Any], parts: _Parts, token: object, given: Any) -> Any:
        """Run a function with the plan of the call that it belongs to, and return its result."""
        args, kwargs = given
        nested, earlier = self._in_own_thread(), self._forward
        if self.lock is not None and not nested:
            self.lock.acquire()
        try:
            self._forward = token, threading.get_ident()
            self._replace()  # for nested parts
            with parts.put_back(hooked=nested), self.within():
                return function(*args, **kwargs)
        finally:
            self._forward = earlier if nested else None
            if not nested:
                self._restore()
            if self.lock is not None and not nested:
                self.lock.release()


class _Parts:
    """Guided layers and joins, with their plans in one call."""

    def __init__(
        self,
        layers: list[tuple[Any, GuidedProcessor, LayerPlan | None, Grid | None]],
        joins: list[tuple[Join, JoinPlan | None]],
    ) -> None:
        self._layers = layers
        self._joins = joins

    @contextmanager
    def put_back(self, hooked: bool) -> Iterator[None]:
        """Restore the plans of that call inside this context.

        Args:
            hooked: Whether the joins are already registered.
        """
        layers = [(attn, attn.processor, p, dict(vars(p))) for attn, p, _, _ in self._layers]
        plans = [(join, join.plan) for join, _ in self._joins]
        handles: list[RemovableHandle] = []
        native = NativeAttention()
        acted = acts_here()
        try:
            act_here(True)
            for attn, processor, plan, grid in self._layers:
                native.take(processor.original)
                if attn.processor is not processor:
                    attn.set_processor(processor)
                processor.plan, processor.grid = plan, grid
            for join, told in self._joins:
                join.plan = told
                if not hooked:
                    handles += join.hooks()
            yield
        finally:
            act_here(acted)
            native.put_back()
            for handle in handles:
                handle.remove()
            for join, told in plans:
                join.plan = told
            for attn, current, processor, state in layers:
                vars(processor).update(state)
                if attn.processor is not current:
                    attn.set_processor(current)


class _Part:
    """A function that runs a part of a call and may be called again later.

    Args:
        function: A module or another callable.
        recomputation: The checkpointed parts of the denoiser.
        forward: The call that the part belongs to.
    """

    def __init__(self, function: Callable[..., Any], recomputation: Recomputation, forward: tuple[object, int]) -> None:
        self._function = function
        self._recomputation = recomputation
        self._forward = forward
        self._parts = recomputation.parts_of(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._recomputation.is_under_way(self._forward):
            return self._recomputation.run_again(self._function, self._parts, self._forward[0], (args, kwargs))
        with self._recomputation.within():
            output = self._function(*args, **kwargs)
        self._parts = self._recomputation.parts_of(self._function)  # with the layer grids that were set inside
        return output


class _Watch(Hook):
    """Forward pre-hook of a guided layer that prevents it from being repeated without its plan.

    Args:
        module: The layer.
        name: Name of the layer.
        recomputation: The checkpointed parts of the denoiser.
    """

    def __init__(self, module: nn.Module, name: str, recomputation: Recomputation) -> None:
        self._module, self._name, self._recomputation = module, name, recomputation

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self._module and not torch.compiler.is_compiling():  # copies are not guided
            self._recomputation.check(self._name)


class _PlanKeeping:
    """Replaces the function through which a module runs its checkpointed parts.

    Args:
        original: The replaced function.
        recomputation: The checkpointed parts of the denoiser.
    """

    def __init__(self, original: Callable[..., Any], recomputation: Recomputation) -> None:
        self.original = original
        self._recomputation = recomputation

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the original function in a copy of the module."""
        return operator.itemgetter(0), ((self.original,),)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(_COMPILED)
        return self.original(self._recomputation.remembering(function), *args, **kwargs)

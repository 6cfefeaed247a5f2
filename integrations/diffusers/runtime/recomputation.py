# SPDX-License-Identifier: Apache-2.0
"""Gradient checkpointing under guidance: a module that backward runs once more gets the plan of its own forward.

diffusers' modules run their checkpointed parts through a function that ``enable_gradient_checkpointing`` sets on them.
While a guided forward is under way, that function is given parts which remember the forward's plan. Called within that
forward they only run; called later, perhaps after the guidance was removed and in a thread of autograd, they put the
plan back where it was, run, and take it off again. Norms and masses that such a run leaves are dropped. Other ways to
checkpoint a part of a denoiser do not say what they will run again, and are refused.
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
    "guide cannot follow gradient checkpointing inside of what is compiled; compile the blocks alone, with the "
    "denoiser's compile_repeated_blocks(), or call its disable_gradient_checkpointing()"
)
_FUNCTION = "_gradient_checkpointing_func"


class Lock(Protocol):
    """Taken by one thread at a time."""

    def acquire(self) -> Any:
        """Take it."""

    def release(self) -> Any:
        """Give it back."""


class Recomputation:
    """The checkpointed parts of one denoiser.

    Args:
        model: the denoiser.
        layers: that are guided.
        joins: hooks that are registered while a guided forward is under way.

    Attributes:
        lock: that a thread holds while a forward of the denoiser is under way; None where there is none.
        compiled: whether the denoiser is under a wrapper of ``torch.compile``.
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
        self._around: Any = None  # the checkpoint in which the denoiser itself runs
        self._depth = 0  # of parts that run within the forward under way
        self._forward: tuple[object, int] | None = None  # the one under way, and its thread

    def attach(self) -> None:
        """Let checkpointed parts of the coming forward remember its plan."""
        if not torch.is_grad_enabled():
            return
        self._replace()
        if not self._watches:
            for layer in self._layers:
                watch = _Watch(layer.attention, layer.info.module, self)
                self._watches.append(layer.attention.register_forward_pre_hook(watch))

    def detach(self) -> None:
        """Leave the modules as they were."""
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
        """A guided forward begins in this thread.

        Raises:
            RuntimeError: for checkpointed parts of a denoiser that is compiled as a whole.
        """
        if self._changed and (self.compiled or is_compiled_in_place(self._model)):
            raise RuntimeError(_COMPILED)
        self._forward = object(), threading.get_ident()
        self._around, self._depth = checkpointing(), 0

    def end(self) -> None:
        """It is over, or what follows in it is plain."""
        self._forward = None

    def remembering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that the forward under way calls, made fit for being called again after it."""
        forward = self._forward
        if forward is None or forward[1] != threading.get_ident():
            return function
        return _Part(function, self, forward)

    def is_under_way(self, forward: tuple[object, int]) -> bool:
        """True in the thread of a forward until that is over."""
        return self._forward is not None and self._forward[0] is forward[0] and self._in_own_thread()

    def _in_own_thread(self) -> bool:
        return self._forward is not None and self._forward[1] == threading.get_ident()

    @contextmanager
    def within(self) -> Iterator[None]:
        """Inside, a part runs that will remember the plan."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    def check(self, layer: str) -> None:
        """Refuse a layer that backward would run again as another one.

        Raises:
            RuntimeError: for a layer in a checkpoint that is none of the model's own.
        """
        if self._forward is None or self._depth:
            return
        if not torch.is_grad_enabled() or checkpointing() not in (None, self._around):
            raise RuntimeError(
                f"guide cannot follow gradients through layer {layer!r}: a part of the denoiser runs under "
                f"torch.utils.checkpoint (or torch.no_grad), and backward would run it again without guidance; "
                f"checkpoint it with the denoiser's enable_gradient_checkpointing(), which takes a function of your own"
            )

    def parts_of(self, function: Callable[..., Any]) -> _Parts:
        """What is guided in a module, or in all of the denoiser where the function is no module's."""
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
        """What a function returns when the parts have the plan of the forward that it belongs to."""
        args, kwargs = given
        nested, earlier = self._in_own_thread(), self._forward
        if self.lock is not None and not nested:
            self.lock.acquire()
        try:
            self._forward = token, threading.get_ident()
            self._replace()  # for parts of the part
            with parts.put_back(hooked=nested), self.within():
                return function(*args, **kwargs)
        finally:
            self._forward = earlier if nested else None
            if not nested:
                self._restore()
            if self.lock is not None and not nested:
                self.lock.release()


class _Parts:
    """Guided layers and joins, with their parts in one forward."""

    def __init__(
        self,
        layers: list[tuple[Any, GuidedProcessor, LayerPlan | None, Grid | None]],
        joins: list[tuple[Join, JoinPlan | None]],
    ) -> None:
        self._layers = layers
        self._joins = joins

    @contextmanager
    def put_back(self, hooked: bool) -> Iterator[None]:
        """Inside, layers and joins do what they did in that forward.

        Args:
            hooked: whether the joins are registered already.
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
                    handles.append(join.hook())
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
    """A function that runs a part of a forward, and may be called after it.

    Args:
        function: a module, or another callable.
        recomputation: of the denoiser.
        forward: it belongs to.
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
        self._parts = self._recomputation.parts_of(self._function)  # with the grids that the layers were told inside
        return output


class _Watch(Hook):
    """Forward pre-hook of a guided layer, which must not be run again without its plan.

    Args:
        module: the layer.
        name: of it.
        recomputation: of the denoiser.
    """

    def __init__(self, module: nn.Module, name: str, recomputation: Recomputation) -> None:
        self._module, self._name, self._recomputation = module, name, recomputation

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if module is self._module and not torch.compiler.is_compiling():  # a copy is not guided
            self._recomputation.check(self._name)


class _PlanKeeping:
    """Stands in for the function through which a module runs its checkpointed parts.

    Args:
        original: that function.
        recomputation: of the denoiser.
    """

    def __init__(self, original: Callable[..., Any], recomputation: Recomputation) -> None:
        self.original = original
        self._recomputation = recomputation

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the module has its own function."""
        return operator.itemgetter(0), ((self.original,),)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            raise RuntimeError(_COMPILED)
        return self.original(self._recomputation.remembering(function), *args, **kwargs)

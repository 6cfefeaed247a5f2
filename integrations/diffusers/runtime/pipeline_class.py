# SPDX-License-Identifier: Apache-2.0
"""Make every call of a pipeline instance a run that guidance can observe.

``pipe(...)`` looks up ``__call__`` on the class, so a watched instance temporarily gets a subclass of its class. The
subclass has the name, module and signature of the original, so ``isinstance``, ``help``, saving and messages are
unchanged. Copies, pickles and new instances use the original class.

Pipelines that share a guided denoiser are also watched. Their runs are not guided, even inside a guided run.
"""

from __future__ import annotations

import functools
import gc
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.modular_pipelines import ModularPipeline
from torch import nn

from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun, current_run, outside_runs
from segkern.integrations.diffusers.runtime.run_text import RunText

_WATCHERS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # number of watchers of each pipeline
# Texts of pipelines whose function was called without their class, before the progress bar starts.
_CALLED: WeakKeyDictionary[Any, RunText] = WeakKeyDictionary()
_ENDED_RUNS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_COMPONENT_READS: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
_TEXTS: WeakKeyDictionary[Any, RunText] = WeakKeyDictionary()  # encoded outside a run, for a later run

_CALLBACKS = ("callback", "callback_on_step_end")


class _Watched:
    """Base class of the subclasses that this module creates."""

    __slots__ = ()


def watch(pipe: Any) -> None:
    """Give a pipeline the subclass whose calls are runs.

    Raises:
        ValueError: If the object's class cannot be replaced. The message quotes it.
    """
    if not isinstance(pipe, _Watched):
        try:
            pipe.__class__ = _subclass(type(pipe))
        except TypeError as error:
            raise ValueError(
                f"guide cannot observe calls of a {type(pipe).__name__} ({error}); pass the denoiser and run it in a "
                f"custom loop: guide(denoiser, ..., cfg=...) and `with guidance.run(timesteps):`"
            ) from None
    _WATCHERS[pipe] = _WATCHERS.get(pipe, 0) + 1


def unwatch(pipe: Any) -> None:
    """Restore the class of a pipeline, unless it has other watchers."""
    count = _WATCHERS.pop(pipe, 0) - 1
    if count > 0:
        _WATCHERS[pipe] = count
    elif isinstance(pipe, _Watched):
        pipe.__class__ = type(pipe).__mro__[1]
        _TEXTS.pop(pipe, None)


def ended_runs(pipe: Any) -> int:
    """Return how many runs have ended since a pipeline was watched, including runs that began before."""
    return _ENDED_RUNS.get(pipe, 0)


def component_reads(pipe: Any) -> int:
    """Return how often the components of a pipeline were read since it was watched; ``from_pipe`` reads them."""
    return _COMPONENT_READS.get(pipe, 0)


def noted_text(pipe: Any) -> RunText | None:
    """Return the text that a pipeline last encoded outside its runs; None if there is none."""
    return None if isinstance(pipe, nn.Module) else _TEXTS.get(pipe)


def pipelines_with(denoisers: Iterable[nn.Module]) -> list[Any]:
    """Return every pipeline of this process that has one of the denoisers as a component."""
    models = [getattr(denoiser, "_orig_mod", denoiser) for denoiser in denoisers]
    things = gc.get_objects()
    # There may be a million objects, so this avoids a Python loop over them.
    kinds = {kind for kind in set(map(type, things)) if issubclass(kind, (DiffusionPipeline, ModularPipeline))}
    pipelines = []
    for thing in itertools.compress(things, map(kinds.__contains__, map(type, things))):
        parts = [getattr(thing, name, None) for name in ("unet", "transformer", "transformer_2")]
        if any(getattr(part, "_orig_mod", part) is model for part in parts for model in models):
            pipelines.append(thing)
    return pipelines


def _subclass(original: type) -> type:
    known: Any
    for known in original.__subclasses__():
        if known.__bases__ == (original, _Watched):
            return known

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        """Create a pipeline of the original class for ``type(pipe)(...)``, which methods such as ``from_pipe`` call."""
        return original(*args, **kwargs)

    @functools.wraps(original.__init__)  # type: ignore[misc]
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``new`` returns an initialised instance, also if its ``__init__`` calls ``guide``."""

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        """Make copies instances of the original class."""
        reduce_original: Any = original.__reduce_ex__
        _, _, *state = reduce_original(self, protocol)
        return object.__new__, (original,), *state

    namespace: dict[str, Any] = {
        "__call__": _running(original.__call__),
        "__new__": new,
        "__init__": init,
        "__reduce_ex__": reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__slots__": (),
    }
    if hasattr(original, "encode_prompt"):
        namespace["encode_prompt"] = _noting_text(original.encode_prompt)
    if hasattr(original, "check_inputs"):
        namespace["check_inputs"] = _noting_call(original.check_inputs)
    if hasattr(original, "maybe_free_model_hooks"):  # called at the end of diffusers' pipeline calls
        namespace["maybe_free_model_hooks"] = _counting_ends(original.maybe_free_model_hooks)
    if hasattr(original, "components"):  # read to create other pipelines
        namespace["components"] = property(_counting_reads(original))
    if hasattr(original, "progress_bar"):
        namespace["progress_bar"] = _beginning_run(original.progress_bar)
    return type(original)(original.__name__, (original, _Watched), namespace)


def _running(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a pipeline's call in a run. If it wraps another function (``torch.no_grad``), wrap that one too."""

    @functools.wraps(function)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call_in_run(function, self, *args, **kwargs)

    wrapped = getattr(function, "__wrapped__", None)
    if wrapped is not None:
        call.__wrapped__ = _running(wrapped)
    return call


def call_in_run(function: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a pipeline's function in a run of the pipeline."""
    bound = _bound(function, pipe, args, kwargs)
    _TEXTS.pop(pipe, None)
    _CALLED.pop(pipe, None)
    if bound is None:  # the call itself raises the error
        return function(pipe, *args, **kwargs)
    is_stock = str(function.__module__).startswith("diffusers.")
    with PipelineRun(pipe, _named(bound), is_stock=is_stock):
        return function(*bound.args, **bound.kwargs)


def _bound(
    function: Callable[..., Any], self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments | None:
    """Bind the arguments of a call and let callbacks run outside the run; None if the arguments do not fit."""
    try:
        bound = inspect.signature(function).bind(self, *args, **kwargs)
    except TypeError:
        return None
    for name in _CALLBACKS:
        if bound.arguments.get(name) is not None:
            bound.arguments[name] = _outside(bound.arguments[name])
    return bound


def _named(bound: inspect.BoundArguments) -> Mapping[str, Any]:
    """Return the arguments by name, including defaults."""
    named = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    named.apply_defaults()
    arguments = dict(named.arguments)
    return {**arguments.pop("kwargs", {}), **arguments}


class _OutsideCallback(PipelineCallback):
    """A diffusers callback object that runs outside the run."""

    def __init__(self, callback: PipelineCallback | MultiPipelineCallbacks) -> None:
        self._callback = callback

    @property
    def tensor_inputs(self) -> list[str]:
        return self._callback.tensor_inputs

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with outside_runs():
            return self._callback(*args, **kwargs)


def _outside(callback: Any) -> Any:
    """Wrap a user's callback so that it runs outside the run, because it may run other pipelines."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        return _OutsideCallback(callback)
    if not callable(callback):
        return callback

    def call(*args: Any, **kwargs: Any) -> Any:
        with outside_runs():
            return callback(*args, **kwargs)

    return functools.update_wrapper(call, callback, updated=())


def _noting_text(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``encode_prompt`` to record which text is the prompt's and which the negative prompt's."""

    @functools.wraps(function)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = function(self, *args, **kwargs)
        run = current_run()
        if run is not None and run.pipe is self:
            text = run.text
        elif self in _CALLED:
            text = _CALLED[self]
        else:
            text = _TEXTS[self] = RunText({})
        bound = _bound(function, self, args, kwargs)
        named = {} if bound is None else _named(bound)
        # The order in which functions of other packages return both texts is not known.
        if "negative_prompt" not in named or str(inspect.unwrap(function).__module__).startswith("diffusers."):
            text.note(named, result)
        return result

    return encode_prompt


def _noting_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``check_inputs``, which pipelines call first: the next progress bar belongs to a call."""

    @functools.wraps(function)
    def check_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_in_run(self):
            bound = _bound(function, self, args, kwargs)
            _CALLED[self] = RunText({} if bound is None else _named(bound))
        return function(self, *args, **kwargs)

    return check_inputs


def _is_in_run(pipe: Any) -> bool:
    run = current_run()
    return run is not None and run.pipe is pipe


def _counting_ends(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def maybe_free_model_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        _ENDED_RUNS[self] = _ENDED_RUNS.get(self, 0) + 1
        return function(self, *args, **kwargs)

    return maybe_free_model_hooks


def _counting_reads(original: Any) -> Callable[[Any], Any]:
    def components(self: Any) -> Any:
        _COMPONENT_READS[self] = _COMPONENT_READS.get(self, 0) + 1
        return original.components.__get__(self, type(self))

    return components


def _beginning_run(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``progress_bar``, which surrounds the denoising loop, to begin the run of a call that was not observed.

    This happens if the pipeline's function is called without the instance's class, as in
    ``StableDiffusionXLPipeline.__call__.__wrapped__(pipe, ...)``, which is how to enable gradients.
    """

    @functools.wraps(function)
    def progress_bar(self: Any, iterable: Any = None, *args: Any, **kwargs: Any) -> Any:
        if _is_in_run(self) or self not in _CALLED:
            return function(self, iterable, *args, **kwargs)
        is_stock = str(type(self).__module__).startswith("diffusers.")
        run = PipelineRun(self, {}, text=_CALLED.pop(self), is_stock=is_stock)
        bar = function(self, None if iterable is None else _Ending(iterable, run), *args, **kwargs)
        run.__enter__()
        close: Any = getattr(bar, "close", None)

        def close_and_end() -> None:
            close()
            run.end()

        if close is not None:
            bar.close = close_and_end
        return bar

    return progress_bar


class _Ending:
    """An iterable that ends a run when it is exhausted."""

    def __init__(self, iterable: Any, run: PipelineRun) -> None:
        self._iterable = iterable
        self._run = run

    def __len__(self) -> int:
        return len(self._iterable)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._iterable
        finally:
            self._run.end()

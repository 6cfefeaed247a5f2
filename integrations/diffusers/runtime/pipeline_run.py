# SPDX-License-Identifier: Apache-2.0
"""A run of a guided pipeline: its arguments, its texts, and the state of guidance during the run."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from segkern.integrations.diffusers.runtime.checkpoints import CheckpointCheck
from segkern.integrations.diffusers.runtime.run_text import RunText

_CURRENT: ContextVar[PipelineRun | None] = ContextVar("segkern_pipeline_run", default=None)
_REPEATED: ContextVar[bool] = ContextVar("segkern_repeated_forward", default=False)

_NUMBERS = itertools.count()

_AT_BEGIN: WeakKeyDictionary[Any, list[WeakMethod[Any]]] = WeakKeyDictionary()

AtEnd = Callable[["PipelineRun", bool], None]


class PipelineRun:
    """A context manager around one call of a pipeline or around a custom denoising loop.

    Runs can be nested, because a pipeline may call another one. Each thread and asynchronous task has its own runs.

    Args:
        pipe: The pipeline, or the denoiser of a loop.
        arguments: Arguments of the call, by name; empty for a loop.
        text: The known texts of a run that does not begin with a pipeline call.
        timesteps: Timesteps of a loop, in order; None to use those of the pipeline's scheduler.
        is_stock: See below.

    Attributes:
        number: Number of the run in this process.
        is_stock: Whether this is a call of a diffusers pipeline, whose conventions are known.
        samples: Number of images or videos that the call requests; None if the arguments do not specify it.
        state: State of each guidance for this run.
        checkpoints: Check that no checkpoint begins within the run.
    """

    def __init__(
        self,
        pipe: Any,
        arguments: Mapping[str, Any],
        text: RunText | None = None,
        timesteps: Any = None,
        is_stock: bool = False,
    ) -> None:
        self.number = next(_NUMBERS)
        self.pipe = pipe
        self.arguments = arguments
        self.samples = asked_samples(arguments)
        self.text = RunText(arguments) if text is None else text
        self.timesteps = timesteps
        self.is_stock = is_stock
        self.state: dict[Any, Any] = {}
        self.checkpoints = CheckpointCheck(self.is_loop)
        self._at_end: list[AtEnd] = []
        self._token: Token[PipelineRun | None] | None = None

    def __enter__(self) -> PipelineRun:
        for reference in _AT_BEGIN.get(self.pipe, ()):
            function = reference()
            if function is not None:
                function(self)
        self._token = _CURRENT.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end(failed=kind is not None)

    def end(self, *, failed: bool = False) -> None:
        """End the run. Does nothing if it has ended."""
        token, self._token = self._token, None
        if token is None:
            return
        try:
            _CURRENT.reset(token)
        except ValueError:  # a generator or a task that resumes in another context than it began in
            _CURRENT.set(None)
        at_end, self._at_end = self._at_end, []
        self.state.clear()
        with ExitStack() as stack:  # calls all functions in order, even if one raises an error
            for function in reversed(at_end):
                stack.callback(function, self, failed)

    @property
    def is_under_way(self) -> bool:
        """True until the run has ended, also in contexts that were copied within it."""
        return self._token is not None

    @property
    def is_loop(self) -> bool:
        """True for a custom denoising loop that the pipeline does not run."""
        return self.timesteps is not None

    def setting(self, name: str) -> Any:
        """Return a setting of the pipeline: its property or the argument of its call; None if there is neither.

        Raises:
            ValueError: If the call's arguments are not known.
        """
        if self.is_loop:
            return None
        kind: Any = type(self.pipe)
        if isinstance(getattr(kind, name, None), property):
            with suppress(AttributeError):  # the property reads an attribute that is set during a run
                return getattr(self.pipe, name)
        if not self.arguments and name in inspect.signature(kind.__call__).parameters:
            raise ValueError(
                f"guide needs the {name} of this {kind.__name__}, but cannot read it if the class's function is called "
                f"directly, as in type(pipe).__call__(pipe, ...); call pipe(...)"
            )
        return self.arguments.get(name)

    def at_end(self, function: AtEnd) -> None:
        """Register a function to call when the run ends. Its arguments are the run and whether the run failed."""
        self._at_end.append(function)


def at_begin(pipe: Any, function: Callable[[PipelineRun], None]) -> None:
    """Call a method at the start of every run of a pipeline, as long as the method's object is alive."""
    _AT_BEGIN.setdefault(pipe, []).append(WeakMethod(function))


def forget_at_begin(pipe: Any, function: Callable[[PipelineRun], None]) -> None:
    """Undo :func:`at_begin`."""
    methods = [method for method in _AT_BEGIN.get(pipe, ()) if method() not in (None, function)]
    if methods:
        _AT_BEGIN[pipe] = methods
    else:
        _AT_BEGIN.pop(pipe, None)


def current_run() -> PipelineRun | None:
    """Return the innermost active run in this context."""
    run = _CURRENT.get()
    return run if run is not None and run.is_under_way else None


@contextmanager
def outside_runs() -> Iterator[None]:
    """Hide the active run inside this context: callbacks may run other pipelines."""
    token = _CURRENT.set(None)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def repeated_forward() -> Iterator[None]:
    """Mark denoiser calls inside this context as calls by guidance, not by the pipeline."""
    token = _REPEATED.set(True)
    try:
        yield
    finally:
        _REPEATED.reset(token)


def in_repeated_forward() -> bool:
    """Return True inside :func:`repeated_forward`."""
    return _REPEATED.get()


def asked_samples(arguments: Mapping[str, Any]) -> int | None:
    """Return how many images or videos the arguments of a pipeline call request; None if they do not specify it.

    Example:
        >>> asked_samples({"prompt": ["a fox", "a boat"], "num_images_per_prompt": 2})
        4
    """
    prompt, embeds = arguments.get("prompt"), arguments.get("prompt_embeds")
    if isinstance(prompt, (str, dict)):  # a dictionary maps some frames of one video to texts
        prompts = 1
    elif isinstance(prompt, (list, tuple)):
        prompts = len(prompt)
    elif embeds is not None:
        prompts = len(embeds)
    else:
        return None
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if arguments.get(name) is not None:
            return prompts * int(arguments[name])
    return prompts

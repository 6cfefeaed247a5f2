# SPDX-License-Identifier: Apache-2.0
"""A bounded cache of device tables, safe under CUDA graphs, several streams and the caller's modes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def capturing() -> bool:
    """Return True while a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


_THREAD = threading.local()  # its attribute "own" is true in threads that call_in_own_thread started


def call_in_own_thread(make: Callable[[], T], device: torch.device | None = None) -> T:
    """Call ``make`` in a new thread on a new stream and return its result once the device has finished.

    The thread does not inherit the caller's state: dispatch modes, ``torch.func`` transforms, the default device,
    inference mode, gradient mode, or a CUDA graph's memory pool, to which compilers direct a thread's allocations.

    Args:
        make: Function without arguments. If it calls ``call_in_own_thread`` itself, no further thread is started.
        device: Device on which ``make`` works, for the stream.
    Raises:
        BaseException: Any exception that ``make`` raises.
    """
    if getattr(_THREAD, "own", False):
        return make()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        _THREAD.own = True
        try:
            stream = torch.cuda.Stream(device) if device is not None and device.type == "cuda" else None
            with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
                results.append(make())
            if stream is not None:
                stream.synchronize()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="segkern-tables")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


class BoundedCache(Generic[P, T]):
    """A function that caches its results by its arguments. Callers must not write to the results.

    A full cache is emptied once no kernel reads its results any more. Results that were requested while a CUDA graph
    was captured are kept for good, because the graph reads the same memory at every replay.

    Args:
        make: The function, called by :func:`call_in_own_thread`. A device must be an argument of the function.
        most: Maximum number of cached results.

    Calls raise a RuntimeError while a CUDA graph is captured, unless the result is cached.
    """

    def __init__(self, make: Callable[P, T], most: int) -> None:
        self._make, self._most = make, most
        self._results: dict[Any, T] = {}
        self._captured: dict[Any, T] = {}
        self.__name__ = make.__name__
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, *kwargs.items()) if kwargs else args
        result = self._results.get(key)
        if result is None:
            result = self._captured.get(key)
            if result is None:
                device = next(iter(_devices(key)), None)
                if device is not None and device.type == "cuda" and capturing():
                    raise RuntimeError(
                        f"{self.__name__}{key} is not on the device yet, and a CUDA graph is being captured; run the "
                        f"same call once before capturing"
                    )
                result = call_in_own_thread(lambda: self._make(*args, **kwargs), device)
                if len(self._results) >= self._most and not capturing():
                    self._drop()
                self._results[key] = result
        if capturing():
            result = self._captured.setdefault(key, result)
        return result

    def _drop(self) -> None:
        dropped, self._results = self._results, {}
        for device in {device for key in dropped for device in _devices(key)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels on other streams may still read a table

    def __len__(self) -> int:
        return len(self._results) + len(self._captured)

    def cache_clear(self) -> None:
        """Drop all results, including those that captured graphs read."""
        self._results, self._captured = {}, {}


def bounded_cache(most: int) -> Callable[[Callable[P, T]], BoundedCache[P, T]]:
    """Return a decorator that caches a function's results; see :class:`BoundedCache`.

    Example:
        >>> calls = []
        >>> @bounded_cache(most=2)
        ... def square(n):
        ...     calls.append(n)
        ...     return n * n
        >>> [square(n) for n in (3, 3, 4, 5, 3)], calls
        ([9, 9, 16, 25, 9], [3, 4, 5, 3])
    """
    return lambda make: BoundedCache(make, most)


def _devices(key: Any) -> list[torch.device]:
    """Return the devices among the arguments of a call."""
    parts = [part for entry in key for part in (entry if isinstance(entry, tuple) else (entry,))]
    return [part for part in parts if isinstance(part, torch.device)]

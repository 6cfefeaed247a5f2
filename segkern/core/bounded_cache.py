# SPDX-License-Identifier: Apache-2.0
"""A bounded cache of tables made on a device, safe beside CUDA graphs, other streams and the caller's modes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from segkern.core.private_apis import no_modes_or_transforms

P = ParamSpec("P")
T = TypeVar("T")


def capturing() -> bool:
    """True while a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make tensors that later calls can use too, whatever the caller's modes: no fake, inference or tracked ones."""
    with no_modes_or_transforms(), torch.inference_mode(False), torch.no_grad():
        yield


class BoundedCache(Generic[P, T]):
    """A function that remembers its results by its arguments; callers must not write to them.

    When there are too many they are all dropped, once no kernel reads them any more. Only those that were asked for
    while a CUDA graph was captured stay for good: the graph reads the same memory at every replay.

    Args:
        make: the function, which runs under :func:`ordinary_tensors`; a device is an argument of its own.
        most: results that are remembered.
    """

    def __init__(self, make: Callable[P, T], most: int) -> None:
        self._make, self._most = make, most
        self._results: dict[Any, T] = {}
        self._captured: dict[Any, T] = {}
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, *kwargs.items()) if kwargs else args
        result = self._results.get(key)
        if result is None:
            result = self._captured.get(key)
            if result is None:
                with ordinary_tensors():
                    result = self._make(*args, **kwargs)
                # A graph that is being captured takes no waiting for the device.
                if len(self._results) >= self._most and not capturing():
                    self._drop()
                self._results[key] = result
        if capturing():
            result = self._captured.setdefault(key, result)
        return result

    def _drop(self) -> None:
        dropped, self._results = self._results, {}
        for device in {part for key in dropped for part in _parts(key) if isinstance(part, torch.device)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels of other streams than the one that made a table

    def __len__(self) -> int:
        return len(self._results) + len(self._captured)

    def cache_clear(self) -> None:
        """Forget all, also what captured graphs read."""
        self._results, self._captured = {}, {}


def bounded_cache(most: int) -> Callable[[Callable[P, T]], BoundedCache[P, T]]:
    """A decorator; see :class:`BoundedCache`.

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


def _parts(key: Any) -> list[Any]:
    return [part for entry in key for part in (entry if isinstance(entry, tuple) else (entry,))]

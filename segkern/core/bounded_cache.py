# SPDX-License-Identifier: Apache-2.0
"""Tables that are made once and kept: how many, and how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

MOST_BYTES = 2**28  # of one kind of table


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


class Kept(Generic[P, T]):
    """A function whose results are kept, by its arguments; nobody may write to them.

    When there are too many they are all dropped, once no kernel reads them any more. Only those that were asked for
    while a CUDA graph was captured stay for good: the graph reads the same memory at every replay.

    Args:
        make: the function; a device is an argument of its own.
        most: results that are kept.
    """

    def __init__(self, make: Callable[P, T], most: int) -> None:
        self._make, self._most = make, most
        self._found: dict[Any, T] = {}
        self._for_good: dict[Any, T] = {}
        self._bytes = 0
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (args, *kwargs.items()) if kwargs else args
        found = self._found.get(key)
        if found is None:
            found = self._for_good.get(key)
            found = self._keep(key, self._make(*args, **kwargs)) if found is None else found
        if capturing():
            found = self._for_good.setdefault(key, found)
        return found

    def _keep(self, key: Any, made: T) -> T:
        size = _size(made)
        # A graph that is being captured takes no waiting for the device.
        if (len(self._found) >= self._most or self._bytes + size > MOST_BYTES) and not capturing():
            self._drop()
        self._bytes += size
        self._found[key] = made
        return made

    def _drop(self) -> None:
        dropped, self._found, self._bytes = self._found, {}, 0
        for device in {part for key in dropped for part in _parts(key) if isinstance(part, torch.device)}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # kernels of other streams than the one that made a table

    def __len__(self) -> int:
        return len(self._found) + len(self._for_good)

    def cache_clear(self) -> None:
        """Forget all, also what captured graphs read."""
        self._found, self._for_good, self._bytes = {}, {}, 0


def kept(most: int) -> Callable[[Callable[P, T]], Kept[P, T]]:
    """A decorator; see :class:`Kept`.

    Example:
        >>> calls = []
        >>> @kept(most=2)
        ... def square(n):
        ...     calls.append(n)
        ...     return n * n
        >>> [square(n) for n in (3, 3, 4, 5, 3)], calls
        ([9, 9, 16, 25, 9], [3, 4, 5, 3])
    """
    return lambda make: Kept(make, most)


def _parts(key: Any) -> list[Any]:
    return [part for entry in key for part in (entry if isinstance(entry, tuple) else (entry,))]


def _size(x: Any) -> int:
    """Bytes of all tensors in a table."""
    if isinstance(x, torch.Tensor):
        return x.numel() * x.itemsize
    if isinstance(x, tuple):
        return sum(map(_size, x))
    if dataclasses.is_dataclass(x):
        return sum(_size(getattr(x, field.name)) for field in dataclasses.fields(x))
    return 0

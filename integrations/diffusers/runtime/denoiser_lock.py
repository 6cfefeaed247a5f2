# SPDX-License-Identifier: Apache-2.0
"""A lock that allows one thread at a time to call a guided denoiser.

A guided call modifies the denoiser's parts until it ends, so calls run one after the other. Hooks acquire and release
the lock. After an interrupt (``KeyboardInterrupt``), PyTorch calls no hooks, and the end of the run releases the lock.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, DenoiserLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


class DenoiserLock:
    """The lock of one denoiser. A thread that holds it may acquire it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self) -> None:
        """Acquire the lock, and wait while another thread holds it."""
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def release(self) -> None:
        """Release the lock once. Does nothing if this thread does not hold it."""
        if self.is_held_here:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
            self._lock.release()

    @property
    def is_held_here(self) -> bool:
        """True if this thread holds the lock."""
        return self._owner == threading.get_ident()


def denoiser_lock(denoiser: nn.Module) -> DenoiserLock:
    """Return the lock of a denoiser, which all its guidance shares."""
    with _MAKING:
        return _LOCKS.setdefault(denoiser, DenoiserLock())

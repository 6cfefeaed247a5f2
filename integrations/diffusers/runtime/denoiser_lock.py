# SPDX-License-Identifier: Apache-2.0
"""A lock that lets one thread at a time into a guided denoiser.

A guided forward changes the denoiser's parts until it is over, so that one forward comes after the other, whoever asked
for it. Hooks take the lock and release it. PyTorch calls none after an interrupt (``KeyboardInterrupt``), after which
the end of the run releases it.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

from torch import nn

_LOCKS: WeakKeyDictionary[nn.Module, DenoiserLock] = WeakKeyDictionary()
_MAKING = threading.Lock()


class DenoiserLock:
    """The lock of one denoiser; a thread that has it may take it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._owner: int | None = None
        self._depth = 0

    def acquire(self) -> None:
        """Take the lock; wait while another thread has it."""
        self._lock.acquire()
        self._owner = threading.get_ident()
        self._depth += 1

    def release(self) -> None:
        """Give it back as often as it was taken; nothing happens where this thread has not got it."""
        if self.is_held_here:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
            self._lock.release()

    @property
    def is_held_here(self) -> bool:
        """True if this thread has it."""
        return self._owner == threading.get_ident()


def denoiser_lock(denoiser: nn.Module) -> DenoiserLock:
    """The lock of a denoiser, which all its guidances share."""
    with _MAKING:
        return _LOCKS.setdefault(denoiser, DenoiserLock())

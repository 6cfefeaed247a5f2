# SPDX-License-Identifier: Apache-2.0
"""Who is in a guided denoiser: while it runs for one thread its parts are not what others would find.

Pipelines that share a denoiser may run in threads of their own. A guided forward changes the denoiser's parts until it
is over, so that one forward comes after the other, whoever asked for it.

An interrupt (``KeyboardInterrupt``, anything that is no ``Exception``) ends a forward without a word to its hooks.
Whether one is under way is therefore read from the call stack, which cannot be wrong.
"""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch import nn

_CALL = nn.Module._call_impl.__code__
_SECONDS = 0.02  # until a turn is looked at again whose holder may have been interrupted


class Turns:
    """The forwards of one denoiser.

    Args:
        denoiser: as pipelines call it.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._change = threading.Condition()
        self._holder: int | None = None
        # Threads that were in a forward before there was anybody to ask for a turn.
        here = threading.get_ident()
        self._earlier = {each for each, frame in sys._current_frames().items() if each != here and self._in(frame)}

    def begin(self) -> None:
        """Take the turn; wait while another thread has it."""
        here = threading.get_ident()
        with self._change:
            while self._others(here):
                self._change.wait(_SECONDS)
            self._holder = here

    def end(self) -> None:
        """Give it back; nothing happens where this thread has none."""
        with self._change:
            if self._holder == threading.get_ident():
                self._holder = None
                self._change.notify_all()

    def inside(self) -> bool:
        """Whether this thread is in a forward of the denoiser."""
        return self._in(sys._getframe(1))

    def interrupted(self) -> bool:
        """Whether the last turn was never given back, and its forward is over."""
        with self._change:
            return self._holder is not None and not self._in(sys._current_frames().get(self._holder))

    def _others(self, here: int) -> bool:
        """Whether another thread is in a forward."""
        suspects = {each for each in (self._holder, *self._earlier) if each is not None and each != here}
        if not suspects:
            return False
        frames = sys._current_frames()
        found = {each for each in suspects if self._in(frames.get(each))}
        self._earlier &= found
        return bool(found)

    def _in(self, frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self._denoiser:
                return True
            frame = frame.f_back
        return False

# SPDX-License-Identifier: Apache-2.0
"""A lock that lets one thread at a time into a guided denoiser.

Pipelines that share a denoiser may run in threads of their own. A guided forward changes the denoiser's parts until it
is over, so that one forward comes after the other, whoever asked for it.

An interrupt (``KeyboardInterrupt``, anything that is no ``Exception``) ends a forward without a word to its hooks.
Whether one is under way is therefore read from the call stack.
"""

from __future__ import annotations

import sys
import threading

from torch import nn

from segkern.integrations.diffusers.runtime.call_stack import Call, first_call, module_call, outermost_module_calls

_SECONDS = 0.02  # until a turn is looked at again whose holder may have been interrupted


class ForwardLock:
    """The forwards of one denoiser.

    Args:
        denoiser: as pipelines call it.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._is_forward = module_call(denoiser)
        self._change = threading.Condition()
        self._holder: Call | None = None
        # What was in a module, perhaps the denoiser, before there was anybody to ask for a turn.
        self._earlier = outermost_module_calls()

    def acquire(self) -> None:
        """Take the turn; wait while another thread has it."""
        frame = sys._getframe(1)
        call = first_call(frame, self._is_forward) or Call(threading.get_ident(), id(frame))
        with self._change:
            while self._others(call.thread):
                self._change.wait(_SECONDS)
            self._holder = call

    def release(self) -> None:
        """Give it back; nothing happens where this thread has none."""
        with self._change:
            if self._holder is not None and self._holder.thread == threading.get_ident():
                self._holder = None
                self._change.notify_all()

    def inside(self) -> bool:
        """True if this thread is in a forward of the denoiser."""
        return first_call(sys._getframe(1), self._is_forward) is not None

    def interrupted(self) -> bool:
        """True if the last turn was never given back, and its forward is over."""
        with self._change:
            return self._holder is not None and not self._holder.is_under_way()

    def _others(self, here: int) -> bool:
        """True if another thread is in a forward."""
        if self._earlier:
            self._earlier = [call for call in self._earlier if call.thread != here and call.is_under_way()]
        holder = self._holder
        held = holder is not None and holder.thread != here and holder.is_under_way()
        return held or bool(self._earlier)

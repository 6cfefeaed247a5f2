# SPDX-License-Identifier: Apache-2.0
"""Read from call stacks whether a call is still under way.

Of other threads only the identity of frames is looked at: while one reads the local variables of a frame, the thread
that runs it may go on and leave it, which crashes the interpreter.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from torch import nn

from segkern.core.private_apis import module_call_code

_CALL = module_call_code()


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        thread: that it is made in.
        frame: identity of its frame, which no other has while it is under way.
    """

    thread: int
    frame: int

    def is_under_way(self) -> bool:
        """True if it has not returned, nor been left by an exception."""
        return any(id(frame) == self.frame for frame in frames(sys._current_frames().get(self.thread)))


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it, the nearest first."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def first_call(frame: FrameType | None, is_it: Callable[[FrameType], bool]) -> Call | None:
    """The nearest call of this thread's stack that fits."""
    nearest = next(filter(is_it, frames(frame)), None)
    return None if nearest is None else Call(threading.get_ident(), id(nearest))


def module_call(module: nn.Module) -> Callable[[FrameType], bool]:
    """True if a frame of this thread is a call of a module."""
    return lambda frame: frame.f_code is _CALL and frame.f_locals.get("self") is module


def outermost_module_calls() -> list[Call]:
    """Of every other thread that is in a module the call of the outermost one."""
    calls_of_threads = []
    for thread, top in sys._current_frames().items():
        calls = [frame for frame in frames(top) if frame.f_code is _CALL]
        if calls and thread != threading.get_ident():
            calls_of_threads.append(Call(thread, id(calls[-1])))
    return calls_of_threads

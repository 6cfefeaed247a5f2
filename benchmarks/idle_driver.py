# SPDX-License-Identifier: Apache-2.0
"""A Triton driver that compiles kernels for a GPU and launches nothing, to measure the host time of launches.

Triton and segkern do all their work on the host except the call of the GPU driver. Tensors are on the CPU, and kernels
must not be interpreted in the process (``TRITON_INTERPRET=0``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

_SHARED_BYTES = 227 * 1024


class _Utilities:
    """The part of a driver that loads binaries."""

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), name, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED_BYTES}


class IdleDriver:
    """A driver that launches nothing. While ``noting``, it records each launch: kernel, programs and arguments."""

    utils = _Utilities()

    def __init__(self) -> None:
        self.noting = False
        self.launches: list[tuple[str, int, tuple[Any, ...]]] = []

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def launch(programs: int, y: int, z: int, stream: int, function: Any, packed: Any, *rest: Any) -> None:
            if self.noting:
                self.launches.append((function, programs, rest[3:]))  # skips metadata and two hooks

        return launch

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def idle_driver() -> Iterator[IdleDriver]:
    """Use the idle driver, so Triton launches nothing."""
    driver = IdleDriver()
    triton.runtime.driver.set_active(driver)
    try:
        yield driver
    finally:
        triton.runtime.driver.set_active(None)  # detected again when needed

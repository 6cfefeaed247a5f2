# SPDX-License-Identifier: Apache-2.0
"""Calls that use the Triton kernels by default on a CPU, as on a GPU, and kernels that fail to launch."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

import segkern
from segkern import Grid, api
from segkern.core import call_cache, dispatch, fallback
from segkern.kernels import (
    attention_energy,
    attention_mass,
    gaussian_blur,
    split_attention,
    tiled_attention,
    unmasked_attention,
)
from segkern.ops import attention, masses

CPU = torch.device("cpu")
GRID, SIGMA = Grid(3, 4, start=1), (0.0, 1.5)

_NUMBERS = itertools.count()

# Errors that a launch raises on incomplete machines. Their form is taken from Triton's sources.
BROKEN: dict[str, Callable[[], Exception]] = {
    "no C compiler": lambda: RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    "C compiler fails": lambda: subprocess.CalledProcessError(1, ["gcc", f"/tmp/{next(_NUMBERS)}/main.c"]),
    "no driver": lambda: RuntimeError("0 active drivers ([]). There should only be one."),
    "no libcuda": lambda: AssertionError("libcuda.so cannot found!"),
    "no ptxas": lambda: FileNotFoundError(2, "No such file or directory", "ptxas"),
    "ptxas fails": lambda: PTXASError("`ptxas` failed with error code 1"),
    "cache cannot be written": lambda: PermissionError(13, "Permission denied", "/root/.triton"),
    "out of resources": lambda: OutOfResources(300_000, 232_448, "shared memory"),
    "compilation fails": lambda: CompilationError("x = y", None, "y is not defined"),
    "passes fail": lambda: RuntimeError("PassManager::run failed"),
    "binary is refused": lambda: RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    "launcher cannot be imported": lambda: ImportError("launcher.so: undefined symbol"),
}

# Errors that are not about the kernel; PyTorch's path would fail as well.
NOT_BROKEN: dict[str, Callable[[], BaseException]] = {
    "CUDA is out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "no memory for the binary": lambda: RuntimeError("Triton Error [CUDA]: out of memory"),
    "the device is broken": lambda: RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    "the device was broken": lambda: torch.AcceleratorError("CUDA error: unspecified launch failure"),
    "a graph is captured": lambda: RuntimeError("operation not permitted when stream is capturing"),
    "host is out of memory": lambda: MemoryError(),
    "interrupted": lambda: KeyboardInterrupt(),
}

KERNELS = {
    gaussian_blur: ("_image_blur_kernel", "_axis_blur_kernel"),
    tiled_attention: ("_tiled_attention_kernel",),
    unmasked_attention: ("_unmasked_attention_kernel",),
    split_attention: ("_split_attention_kernel", "_combine_splits_kernel"),
    attention_energy: ("_attention_energy_kernel",),
    attention_mass: ("_attention_mass_kernel",),
}


def tensors(tokens: int = 14, dim: int = 8) -> list[torch.Tensor]:
    return [torch.randn(2, 2, tokens, dim).half() for _ in range(3)]


# name -> a call of (query, key, value)
CALLS: dict[str, Callable[..., Any]] = {
    "gaussian_blur": lambda q, k, v, **o: segkern.gaussian_blur(q, GRID, SIGMA, **o),
    "seg_attention": lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, **o),
    "attention_mass": lambda q, k, v, **o: segkern.attention_mass(q, k, **o),
    "attention_energy": lambda q, k, v, **o: segkern.attention_energy(q, k, GRID, SIGMA, **o),
}


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Serve half precision on the CPU as on a Hopper GPU, with kernels in Triton's interpreter."""
    real = dispatch.choose_backend

    def choose(device: torch.device, *arguments: Any, **options: Any) -> tuple[str, str]:
        return real(torch.device("cuda", 0) if device.type == "cpu" else device, *arguments, **options)

    def failure_reason(device: torch.device, *kind: Any) -> str | None:
        return fallback.failure_reason(CPU, *kind)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(dispatch, "_compute_capability", return_value=(9, 0)))
        stack.enter_context(mock.patch.object(dispatch, "failure_reason", failure_reason))
        for module in (api, attention, masses, dispatch):
            stack.enter_context(mock.patch.object(module, "choose_backend", choose))
        forget()
        yield
    forget()


def forget() -> None:
    fallback.forget_failures()
    call_cache.forget_calls()


class Failing:
    """A kernel whose launch raises an exception.

    Attributes:
        launches: Number of attempted launches.
    """

    def __init__(self, make: Callable[[], BaseException]) -> None:
        self.make, self.launches = make, 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(*_: object, **__: object) -> None:
            self.launches += 1
            raise self.make()

        return launch


@contextmanager
def failing(make: Callable[[], BaseException], *modules: Any) -> Iterator[Failing]:
    """Make kernels of these modules (default: all) fail to launch."""
    kernel = Failing(make)
    with ExitStack() as stack:
        for module in modules or KERNELS:
            for name in KERNELS[module]:
                stack.enter_context(mock.patch.object(module, name, kernel))
        yield kernel

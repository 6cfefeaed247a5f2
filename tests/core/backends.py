# SPDX-License-Identifier: Apache-2.0
"""Parameters for tests that run on every backend and dtype of the machine."""

from __future__ import annotations

import pytest
import torch

from segkern.core.dispatch import triton_is_installed

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
BACKENDS = ["torch"] + (["triton"] if triton_is_installed() else [])
# The interpreter is slow.
QUICK_BACKENDS = ["torch"] + [pytest.param(name, marks=pytest.mark.robustness) for name in BACKENDS[1:]]
# Inductor compiles C++, which is slow. Whether graphs and gradients are correct does not depend on it.
every_compiler = pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
PLAIN_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Triton's interpreter computes wrong bfloat16 products.
BACKENDS_AND_DTYPES = [
    pytest.param(backend, dtype, id=f"{backend}-{str(dtype).removeprefix('torch.')}")
    for backend in BACKENDS
    for dtype in (PLAIN_DTYPES if CUDA or backend == "torch" else PLAIN_DTYPES[:2])
]

# SPDX-License-Identifier: Apache-2.0
"""Test set-up: the interpreter where there is no GPU, fresh seeds, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests import compatibility

# Triton reads this when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Deterministic algorithms, which poison memory, want this of cuBLAS before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tensors here are tiny: more threads than cores, in parallel test runs, only wait for each other.
torch.set_num_threads(1)

_SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("segkern", deadline=None, print_blob=True, suppress_health_check=_SUPPRESSED)
settings.load_profile("segkern")


pytest_addoption = compatibility.pytest_addoption
pytest_configure = compatibility.pytest_configure
pytest_collection_modifyitems = compatibility.pytest_collection_modifyitems


@pytest.fixture
def device() -> torch.device:
    """A CUDA device where there is one, so that kernels run compiled; the CPU otherwise."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, so that an element nobody wrote is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(params=["in the prologue", "before", "together"])
def blur_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All ways to blur queries, whatever the estimated costs say."""
    from segkern.kernels import _routes

    ways = {"in the prologue": _routes.HERE, "before": _routes.BEFORE, "together": _routes.TOGETHER}
    monkeypatch.setattr(_routes, "choose_blur", lambda *_: ways[request.param])
    _routes.attention_route.cache_clear()
    yield
    _routes.attention_route.cache_clear()

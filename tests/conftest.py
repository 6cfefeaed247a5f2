# SPDX-License-Identifier: Apache-2.0
"""Test set-up: the interpreter where there is no GPU, seeds, poisoned memory."""

from __future__ import annotations

import gc
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator

import numpy
import pytest
import torch
from hypothesis import HealthCheck, register_random, settings

from tests import compatibility

# Triton reads this when a kernel is defined, so it must be set before any kernel module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Deterministic algorithms, which poison memory, want this of cuBLAS before it starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Tensors here are tiny: more threads than cores, in parallel test runs, only wait for each other.
torch.set_num_threads(1)

_SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("fuzz", deadline=None, database=None, print_blob=True, suppress_health_check=_SUPPRESSED)
settings.register_profile("fixed", settings.get_profile("fuzz"), derandomize=True)
settings.load_profile("fixed")  # `make fuzz` says --hypothesis-profile=fuzz


class _TorchRandom:
    """PyTorch's generator as hypothesis wants to seed it before every example."""

    offset = 0

    def seed(self, seed: int) -> None:
        torch.manual_seed(self.offset + seed)

    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()
register_random(_TORCH_RANDOM)


def _seed(name: str) -> None:
    seed = zlib.crc32(name.encode()) ^ _TORCH_RANDOM.offset
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_finish() -> None:
    """Let the collector, and ``guide``, which looks for pipelines with its help, leave what was imported alone."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same with what a module's tests imported and keep, which would be looked through by all that come after."""
    if nextitem is None or item.path != nextitem.path:
        gc.collect()
        gc.freeze()


pytest_addoption = compatibility.pytest_addoption


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests: ``cuda`` those that compute on a device, a fixture or of a module, ``slow`` most of ``one_in``'s."""
    seen: Counter[str] = Counter()
    for item in items:
        if (sampled := item.get_closest_marker("one_in")) is not None:
            function = item.nodeid.partition("[")[0]
            if seen[function] % sampled.args[0] and not torch.cuda.is_available():  # a device computes them in no time
                item.add_marker("slow")
            seen[function] += 1
        if "device" in getattr(item, "fixturenames", ()) or "DEVICE" in vars(getattr(item, "module", object)):
            item.add_marker("cuda")
    compatibility.pytest_collection_modifyitems(items)


def pytest_configure(config: pytest.Config) -> None:
    compatibility.pytest_configure(config)
    _TORCH_RANDOM.offset = int(config.getoption("--hypothesis-seed") or 0)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Fixtures that several tests share draw the same whichever test is the first."""
    if fixturedef.scope != "function":
        _seed(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.fixture(autouse=True)
def _fixed_seed(request: pytest.FixtureRequest) -> None:
    _seed(request.node.nodeid)


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
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(params=["PROLOGUE", "BEFORE"])
def blur_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both places to blur queries, whatever the estimated costs say."""
    from segkern.kernels import _routes

    place = _routes.BlurPlace[request.param]
    monkeypatch.setattr(_routes.BlurEstimate, "place", place)
    _routes.attention_route.cache_clear()
    yield
    _routes.attention_route.cache_clear()

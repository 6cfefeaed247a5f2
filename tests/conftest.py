# SPDX-License-Identifier: Apache-2.0
"""Test setup: Triton's interpreter without a GPU, fixed seeds, poisoned memory."""

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

# Deterministic algorithms, which poison memory, require this setting before cuBLAS starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The tensors of the tests are tiny. In parallel test runs, more threads than cores only wait for each other.
torch.set_num_threads(1)

_SUPPRESSED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("fuzz", deadline=None, database=None, print_blob=True, suppress_health_check=_SUPPRESSED)
settings.register_profile("fixed", settings.get_profile("fuzz"), derandomize=True)
settings.load_profile("fixed")  # `make fuzz` passes --hypothesis-profile=fuzz


class _TorchRandom:
    """PyTorch's generator in the form that hypothesis needs to seed it before every example."""

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
    """Freeze imported objects, so that neither the garbage collector nor ``guide``, which uses it, scans them."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Freeze the objects that a module's tests imported, which all later tests would scan."""
    if nextitem is None or item.path != nextitem.path:
        gc.collect()
        gc.freeze()


pytest_addoption = compatibility.pytest_addoption


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests: ``cuda`` if they, a fixture or the module use a device, ``slow`` for most cases of ``one_in``."""
    seen: Counter[str] = Counter()
    for item in items:
        if (sampled := item.get_closest_marker("one_in")) is not None:
            function = item.nodeid.partition("[")[0]
            if seen[function] % sampled.args[0] and not torch.cuda.is_available():  # all cases are fast on a device
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
    """Seed fixtures that several tests share, so they do not depend on which test is first."""
    if fixturedef.scope != "function":
        _seed(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.fixture(autouse=True)
def _fixed_seed(request: pytest.FixtureRequest) -> None:
    _seed(request.node.nodeid)


@pytest.fixture
def device() -> torch.device:
    """A CUDA device if there is one, so kernels run compiled; otherwise the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every ``torch.empty`` with NaN, to detect elements that are never written."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@pytest.fixture(params=["PROLOGUE", "BEFORE"])
def blur_route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Test both places to blur queries, regardless of the estimated costs."""
    from segkern.kernels import _routes

    place = _routes.BlurPlace[request.param]
    monkeypatch.setattr(_routes.BlurEstimate, "place", place)
    _routes.attention_route.cache_clear()
    yield
    _routes.attention_route.cache_clear()

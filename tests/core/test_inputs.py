# SPDX-License-Identifier: Apache-2.0
"""Random calls of every public function compared with the float64 reference, and calls without work."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid
from segkern.core.dispatch import triton_is_installed
from segkern.core.gaussian import BOUNDARIES
from tests.core.backends import QUICK_BACKENDS
from tests.core.drawn_calls import Call, check_attention, check_blur, check_scores, draw_call

# Triton's interpreter computes wrong bfloat16 products.
DTYPES = {
    "torch": (torch.float64, torch.float32, torch.float16, torch.bfloat16),
    "triton": (torch.float32, torch.float16),
}
CHECKS = {"attention": check_attention, "blur": check_blur, "masses and energies": check_scores}

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]


@pytest.fixture
def every_route(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Alternate between both places to blur queries, regardless of the estimated costs."""
    if not triton_is_installed():
        yield
        return
    from segkern.kernels import _routes

    places = itertools.cycle((_routes.BlurPlace.PROLOGUE, _routes.BlurPlace.BEFORE))
    monkeypatch.setattr(_routes.BlurEstimate, "place", property(lambda _: next(places)))
    _routes.attention_route.cache_clear()
    yield
    _routes.attention_route.cache_clear()


@pytest.mark.hypothesis  # hypothesis marks only tests that use @given; `make fuzz` runs all tests with this mark
@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_any_call(check: Callable[[Call, str], None], backend: str) -> None:
    """Calls are drawn by hypothesis, which searches for the smallest failing call."""

    @settings(max_examples=2 if backend == "triton" else 25)
    @given(rng=st.randoms(use_true_random=False))
    def draw(rng: random.Random) -> None:
        check(draw_call(rng, DTYPES[backend], 5 if backend == "triton" else 9), backend)

    draw()


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("sigma", [0.0, 1.5, math.inf, "by head"], ids=str)
@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0), (0, 0)])
def test_nothing_to_compute_gives_nothing(batch: int, heads: int, sigma: float | str, backend: str) -> None:
    q, k, v = (torch.ones(batch, heads, 12, 8) for _ in range(3))
    given = [[1.0] * heads for _ in range(batch)] if isinstance(sigma, str) else sigma
    for boundary in BOUNDARIES:
        options = {"boundary": boundary, "backend": backend}
        output, lse = segkern.seg_attention(q, k, v, Grid(3, 4), given, return_lse=True, **options)
        assert output.shape == q.shape
        assert lse.shape == q.shape[:3]
        assert segkern.gaussian_blur(q, Grid(3, 4), given, **options).shape == q.shape
        if not isinstance(sigma, str):
            assert segkern.attention_energy(q, k, Grid(3, 4), given, **options).shape == q.shape[:3]
            coarse = segkern.seg_attention(q, k, v, Grid(3, 4), given, query_stride=2, **options)
            assert coarse.shape == q.shape
        assert segkern.attention_mass(q, k, backend=backend).shape == q.shape[:3]


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
def test_no_keys_are_refused_and_no_queries_have_no_grid(backend: str) -> None:
    some, none = torch.ones(1, 2, 12, 8), torch.ones(1, 2, 0, 8)
    with pytest.raises(ValueError, match="at least one key"):
        segkern.seg_attention(some, none, none, Grid(3, 4), 1.0, backend=backend)
    with pytest.raises(ValueError, match="at least one key"):
        segkern.attention_mass(some, none, backend=backend)
    with pytest.raises(ValueError, match="only 0 tokens"):
        segkern.seg_attention(none, some, some, Grid(3, 4), 1.0, backend=backend)
    with pytest.raises(ValueError, match="at least one channel"):
        segkern.seg_attention(some, some, some[..., :0], Grid(3, 4), 1.0, backend=backend)
    assert segkern.attention_energy(none, some, backend=backend).shape == (1, 2, 0)

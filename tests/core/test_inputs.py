# SPDX-License-Identifier: Apache-2.0
"""Thousands of random calls of every public function against the reference in float64, on both backends."""

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
from segkern import Grid, reference
from segkern.core.dispatch import triton_is_installed
from segkern.core.gaussian import BOUNDARIES
from tests.core.robust_tools import (
    Call,
    check_attention,
    check_blur,
    check_scores,
    draw_call,
    grid_for,
    sigma_for,
    tensor,
)

# The interpreter takes its time.
BACKENDS = ["torch", *([pytest.param("triton", marks=pytest.mark.robustness)] if triton_is_installed() else [])]
# Triton's interpreter multiplies bfloat16 wrongly.
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
    """Kernels blur queries in both of their ways in turn, whatever the estimated costs say."""
    if not triton_is_installed():
        yield
        return
    from segkern.kernels import _routes

    places = itertools.cycle((_routes.BlurPlace.PROLOGUE, _routes.BlurPlace.BEFORE))
    monkeypatch.setattr(_routes.BlurEstimate, "place", property(lambda _: next(places)))
    _routes.attention_route.cache_clear()
    yield
    _routes.attention_route.cache_clear()


@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_any_call(check: Callable[[Call, str], None], backend: str) -> None:
    """Drawn by hypothesis, which looks for the smallest call that fails."""

    @settings(max_examples=2 if backend == "triton" else 25)
    @given(rng=st.randoms(use_true_random=False))
    def draw(rng: random.Random) -> None:
        check(draw_call(rng, DTYPES[backend], 5 if backend == "triton" else 9), backend)

    draw()


@pytest.mark.robustness
@pytest.mark.usefixtures("every_route")
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_very_many_calls(check: Callable[[Call, str], None], backend: str, part: int) -> None:
    for seed in range(8 if backend == "triton" else 600):
        call = draw_call(random.Random(f"{part}, {seed}"), DTYPES[backend], 6 if backend == "triton" else 14)
        try:
            check(call, backend)
        except Exception as error:
            raise AssertionError(f"random.Random('{part}, {seed}'): {error}") from error


@pytest.mark.parametrize("count", [20, pytest.param(400, marks=pytest.mark.robustness)])
def test_coarse_queries(count: int) -> None:
    for seed in range(count):
        rng = random.Random(f"coarse {seed}")
        call = draw_call(rng, (torch.float64,), 12, by_head=False, per_key=True)
        stride = rng.choice((1, 2, 3, (1, 4), (5, 2), 100))
        arguments = call.query, call.key, call.value, call.grid, call.sigma
        options = {"scale": call.scale, "attn_mask": call.mask, "boundary": call.boundary, "query_stride": stride}
        found = segkern.seg_attention(*arguments, return_lse=True, **options)
        expected = reference.seg_attention(*arguments, return_lse=True, **options)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-8, atol=1e-8, msg=f"seed {seed}")
        torch.testing.assert_close(found[1].double(), expected[1], rtol=1e-5, atol=1e-5, msg=f"seed {seed}")


@pytest.mark.parametrize("count", [15, pytest.param(300, marks=pytest.mark.robustness)])
def test_energies(count: int) -> None:
    for seed in range(count):
        rng = random.Random(f"energy {seed}")
        call = draw_call(rng, (torch.float64, torch.float32), 9, by_head=False)
        q, k, grid, sigma = call.query.double(), call.key.double(), call.grid, call.sigma
        options = {"scale": call.scale, "boundary": call.boundary}
        rows = reference.attention_energy(q, k, grid, sigma, **options)[:, :, grid.start : grid.stop]
        found = segkern.energy.energies(call.query, call.key, grid, sigma, dtype=torch.float64, **options)
        torch.testing.assert_close(found, rows, rtol=1e-9, atol=1e-9)
        image = reference.gaussian_blur(q, grid, sigma, boundary=call.boundary)[:, :, grid.start : grid.stop]
        logits = image @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if call.scale is None else call.scale)
        columns = segkern.energy.energies(
            call.query, call.key, grid, sigma, over="queries", dtype=torch.float64, **options
        )
        torch.testing.assert_close(columns, -torch.logsumexp(logits, dim=-2), rtol=1e-9, atol=1e-9)
        moments = segkern.energy.logit_moments(call.query, call.key, grid, sigma, dtype=torch.float64, **options)
        flat = logits.flatten(2)
        torch.testing.assert_close(moments.mean, flat.mean(-1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(moments.variance, flat.var(-1, correction=0), rtol=1e-8, atol=1e-9)


def settled(logits: torch.Tensor) -> torch.Tensor:
    """Rows whose largest logit leads by so much that no rounding decides: the others' probability is 0."""
    best = logits.topk(min(2, logits.shape[-1]), dim=-1).values
    if best.shape[-1] == 1:
        return torch.ones(logits.shape[:-1], dtype=torch.bool)
    return best[..., 0] - best[..., 1] > 200 + 1e-4 * logits.abs().amax(dim=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [0.0, 1e-38, 1e-30, 1e4, 1e15], ids=str)
def test_logits_of_any_size(factor: float, backend: str) -> None:
    """Tiny and equal logits give the mean value, huge ones the value of the largest."""
    for seed in range(1 if backend == "triton" else 12):
        rng = random.Random(f"{factor} {seed}")
        grid, tokens = grid_for(rng, 4)
        shape = rng.randint(1, 2), 1, tokens, rng.choice((2, 8, 33))
        q, k, v = (tensor(rng, shape, torch.float32) for _ in range(3))
        q, sigma = q * factor, sigma_for(rng, shape[0], 1, by_head=False)
        found, lse = segkern.seg_attention(q, k, v, grid, sigma, backend=backend, return_lse=True)
        mass = segkern.attention_mass(q, k, backend=backend)
        energy = segkern.attention_energy(q, k, grid, sigma, backend=backend)
        assert found.isfinite().all()
        assert lse.isfinite().all()
        assert energy.isfinite().all()
        assert (mass.sum(-1) - tokens).abs().max() <= 1e-4 * tokens
        if factor < 1:
            torch.testing.assert_close(found, v.mean(2, keepdim=True).expand_as(found), rtol=1e-5, atol=1e-6)
        else:
            blurred = reference.gaussian_blur(q.double(), grid, sigma)
            logits = blurred @ k.double().transpose(-1, -2) / math.sqrt(shape[3])
            sure = settled(logits)
            best = v.gather(2, logits.argmax(-1)[..., None].expand(*logits.shape[:-1], shape[3]))
            torch.testing.assert_close(found[sure], best[sure], rtol=1e-6, atol=1e-6)


REFUSED: dict[str, tuple[dict, str]] = {
    "negative sigma": ({"sigma": -1.0}, r"-1\.0"),
    "NaN sigma": ({"sigma": math.nan}, "nan"),
    "minus infinity": ({"sigma": -math.inf}, "-inf"),
    "NaN in one head": ({"sigma": [[1.0, math.nan]] * 2}, "nan"),
    "a sigma too many": ({"sigma": (1.0, 1.0, 1.0)}, "3 numbers"),
    "a sigma too few": ({"sigma": (1.0,)}, "1 numbers"),
    "heads too many": ({"sigma": [[1.0] * 3] * 2}, "of which there are 2"),
    "words for sigma": ({"sigma": "1.0"}, "'1.0'"),
    "no sigma": ({"sigma": None}, "None"),
    "a complex sigma": ({"sigma": 1j}, "1j"),
    "grid too large": ({"grid": Grid(3, 5)}, "only 12 tokens"),
    "grid too far": ({"grid": Grid(3, 4, 1)}, "only 12 tokens"),
    "a pair for a grid": ({"grid": (3, 4)}, r"\(3, 4\)"),
    "no channels": ({"shape": (2, 2, 12, 0)}, "at least one channel"),
    "three dimensions": ({"shape": (2, 12, 8)}, "4 dimensions"),
    "five dimensions": ({"shape": (1, 2, 2, 12, 8)}, "4 dimensions"),
    "integers": ({"dtype": torch.int32}, "int32"),
    "booleans": ({"dtype": torch.bool}, "bool"),
    "complex numbers": ({"dtype": torch.complex64}, "complex64"),
    "8-bit floating point": ({"dtype": torch.float8_e4m3fn}, "float8"),
    "unknown boundary": ({"boundary": "zero"}, "zero"),
    "unknown backend": ({"backend": "cuda"}, "'cuda'"),
}


@pytest.mark.parametrize(("changes", "quoted"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_quoted(changes: dict, quoted: str) -> None:
    usual = {"grid": Grid(3, 4), "sigma": 1.0, "shape": (2, 2, 12, 8), "dtype": torch.float32}
    given = usual | {"boundary": "reflect", "backend": "auto"} | changes
    x = torch.ones(given["shape"]).to(given["dtype"])
    where, options = (given["grid"], given["sigma"]), {"boundary": given["boundary"]}
    calls = [
        lambda: segkern.gaussian_blur(x, *where, backend=given["backend"], **options),
        lambda: segkern.seg_attention(x, x, x, *where, backend=given["backend"], **options),
        lambda: segkern.attention_energy(x, x, *where, backend=given["backend"], **options),
    ]
    if "in one head" in quoted or isinstance(given["sigma"], list):
        calls = calls[:2]
    if "shape" in changes or "dtype" in changes:
        calls += [lambda: segkern.attention_mass(x, x), lambda: segkern.energy.energies(x, x, Grid(3, 4))]
    for call in calls:
        with pytest.raises(ValueError, match=quoted):
            call()


@pytest.mark.parametrize("number", [0, -1, 1.5, True, "3", None, math.nan], ids=str)
@pytest.mark.parametrize("name", ["height", "width", "start", "frames"])
def test_grids_are_of_whole_numbers(name: str, number: object) -> None:
    if name == "start" and number == 0 and number is not True and not isinstance(number, bool):
        return
    with pytest.raises(ValueError, match=f"Grid.{name}"):
        Grid(**({"height": 2, "width": 2} | {name: number}))


@pytest.mark.parametrize(
    "mask",
    [torch.ones(3), torch.ones(2, 2, 12, 13), torch.ones(1, 1, 1, 1, 12), torch.ones(12, dtype=torch.int32), [1.0]],
    ids=["3 keys", "13 keys", "5 dimensions", "integers", "a list"],
)
def test_masks_that_do_not_fit_are_refused(mask: object) -> None:
    x = torch.ones(2, 2, 12, 8)
    for backend in ("torch", "triton") if triton_is_installed() else ("torch",):
        with pytest.raises(ValueError, match="attn_mask"):
            segkern.seg_attention(x, x, x, Grid(3, 4), 1.0, attn_mask=mask, backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
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


@pytest.mark.parametrize("backend", BACKENDS)
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

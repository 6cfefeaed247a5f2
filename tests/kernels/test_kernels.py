# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the float64 reference under the numerics contract.

On a CUDA device the kernels run compiled, in all three dtypes. Elsewhere they run in Triton's interpreter, in two
dtypes because its bfloat16 products are wrong.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid, reference
from segkern.core.gaussian import BOUNDARIES
from tests.core.contract import LAYOUTS, assert_contract, draw, oracle_attention, plain_attention, plain_blur

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels import _routes
from tests.kernels.kernel_tools import CUDA, DEVICE, DTYPES, check_attention

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes with NumPy, which warns about the infinities and NaNs of the tests.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

USUAL = (HealthCheck.too_slow, HealthCheck.data_too_large)  # as in conftest.py
EXAMPLES = 60 if CUDA else 25

sigmas = st.one_of(st.just(0.0), st.floats(0.2, 30.0), st.just(math.inf))


@pytest.mark.one_in(2)
@pytest.mark.usefixtures("blur_route")
@settings(max_examples=EXAMPLES // 2, suppress_health_check=[HealthCheck.function_scoped_fixture, *USUAL])
@given(data=st.data())
def test_any_grid_stride_sigma_and_batch(data: st.DataObject) -> None:
    grid = Grid(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 13)), data.draw(st.integers(0, 5)))
    tokens = grid.stop + data.draw(st.integers(0, 5))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    check_attention(
        (batch, heads, tokens, data.draw(st.sampled_from([1, 8, 16, 24, 32, 40, 64, 80]))),
        grid,
        tuple(data.draw(sigmas) for _ in range(batch)),
        data.draw(st.sampled_from(DTYPES)),
        tuple(data.draw(st.sampled_from(LAYOUTS)) for _ in range(3)),
        data.draw(st.integers(1, 70)),
        scale=data.draw(st.sampled_from([None, 0.2, -0.3, 0.0])),
        boundary=data.draw(st.sampled_from(BOUNDARIES)),
    )


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("blur_route")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 40, 64, 80, 96, 128, 160, 256])
def test_head_dimensions(dim: int, dtype: torch.dtype) -> None:
    check_attention((3, 1, 5 * 9, dim), Grid(5, 9), (0.0, 1.2, math.inf), dtype)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(13, 19), (1, 50), (50, 1), (3, 40)], ids=str)
def test_unusual_grids(shape: tuple[int, int], dtype: torch.dtype) -> None:
    check_attention((1, 1, shape[0] * shape[1], 16), Grid(*shape), 1.4, dtype)


@pytest.mark.skipif(not CUDA, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(26, 38), (36, 28), (64, 64), (18, 32), (52, 76)], ids=str)
@pytest.mark.parametrize("sigma", [0.0, 1.0, 10.0, math.inf], ids=str)
def test_sdxl_grids(shape: tuple[int, int], sigma: float, dtype: torch.dtype) -> None:
    check_attention((3, 10, shape[0] * shape[1], 64), Grid(*shape), (0.0, 0.0, sigma), dtype)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 21])
@pytest.mark.parametrize("keys", [128, 300])
def test_few_rows_share_their_keys_among_programs(
    rows: int, keys: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coarse queries are an example: they are already blurred, and fewer than the keys."""
    splits = spied_splits(monkeypatch)
    check_attention((2, 1, rows, 40), Grid(1, 1), 0.0, dtype, keys=keys)
    assert splits == ([] if keys == 128 else [3])


def spied_splits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of splits of the keys for each call, on a device of 8 multiprocessors."""
    from segkern.kernels._configs import key_splits

    seen = []

    def spied(*arguments: int) -> tuple[int, int]:
        seen.append(key_splits(*arguments)[0])
        return key_splits(*arguments)

    monkeypatch.setattr("segkern.kernels.split_attention.key_splits", spied)
    monkeypatch.setattr("segkern.kernels.split_attention.multiprocessors", lambda _: 8)
    monkeypatch.setattr("segkern.kernels._routes.multiprocessors", lambda _: 8)
    return seen


@pytest.mark.one_in(3)
@pytest.mark.parametrize("keys", [1, 31, 32, 33, 127, 129, 260])
def test_infinite_sigma_at_any_number_of_keys(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    splits = spied_splits(monkeypatch)
    shape, grid = (3, 1, 2 * 9 + 1, 24), Grid(2, 9, start=1)
    check_attention(shape, grid, (math.inf,) * 3, DTYPES[1], keys=keys)
    assert splits == [-(-keys // 128)]
    check_attention(shape, grid, (math.inf, 0.0, math.inf), DTYPES[1], keys=keys)
    assert len(splits) == 1, "a tile of the batch's attention should serve these samples"


@pytest.mark.usefixtures("blur_route")
@pytest.mark.parametrize("height, width, start", [(1, 1, 3), (9, 11, 0), (4, 8, 33)])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_infinite_sigma_beside_other_samples(head_dim: int, height: int, width: int, start: int) -> None:
    """One tile computes and writes all tokens of an image, for any number of tiles."""
    grid = Grid(height, width, start=start)
    sigmas = math.inf, 0.0, 1.5, math.inf
    check_attention((4, 2, grid.stop + 3, head_dim), grid, sigmas, DTYPES[1], ("packed",) * 3, keys=45)


MASKS = {
    "additive per key": lambda b, h, m, n: torch.randn(b, 1, 1, n),
    "boolean per key": lambda b, h, m, n: torch.rand(b, 1, 1, n) > 0.4,
    "additive full": lambda b, h, m, n: torch.randn(b, h, m, n),
    "boolean per row": lambda b, h, m, n: torch.rand(1, 1, m, n) > 0.4,
    "row without keys": lambda b, h, m, n: torch.arange(m)[None, None, :, None].expand(b, h, m, n) > 2,
    "no keys at all": lambda b, h, m, n: torch.zeros(b, 1, 1, n, dtype=torch.bool),
}


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("blur_route")
@pytest.mark.parametrize("make_mask", MASKS.values(), ids=MASKS)
def test_masks(make_mask) -> None:
    shape = (3, 2, 4 * 9 + 3, 16)
    mask = make_mask(*shape[:3], 45).to(DEVICE)
    check_attention(shape, Grid(4, 9, start=2), (0.0, 1.0, math.inf), torch.float32, keys=45, attn_mask=mask)


@pytest.mark.one_in(10)
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_blur(boundary: str, dtype: torch.dtype, backend: str) -> None:
    grid, sigma = Grid(7, 35, start=3), (0.0, 1.3, 40.0, math.inf)
    x = draw((4, 2, grid.stop + 2, 40), dtype, DEVICE, "packed")
    blurred = segkern.gaussian_blur(x, grid, sigma, boundary=boundary, backend=backend)
    oracle = reference.gaussian_blur(x.double(), grid, sigma, boundary=boundary)
    for sample in range(4):  # separately, because blurred values are much smaller than unblurred ones
        plain = plain_blur(x[sample : sample + 1], grid, sigma[sample], boundary)
        assert_contract(blurred[sample : sample + 1], oracle[sample : sample + 1], plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_query_is_unchanged_by_the_blur(dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 9 * 11, 16), 1.2345, dtype=dtype, device=DEVICE)
    blurred = segkern.gaussian_blur(x, Grid(9, 11), 2.0, backend="triton")
    assert (blurred - x).abs().max() <= 2 * torch.finfo(dtype).eps  # float32 weights sum to 1 within one eps


def test_samples_and_heads_do_not_see_each_other() -> None:
    grid, sigma = Grid(4, 9), (0.0, 2.0, math.inf)
    tensors = [draw((3, 2, 36, 16), torch.float32, DEVICE) for _ in range(3)]
    before = segkern.seg_attention(*tensors, grid, sigma, backend="triton")
    for sample in range(3):
        poisoned = [x.clone() for x in tensors]
        for x in poisoned:
            x[sample, 1] = math.nan
        after = segkern.seg_attention(*poisoned, grid, sigma, backend="triton")
        clean = torch.ones(3, 2, dtype=torch.bool)
        clean[sample, 1] = False
        assert torch.equal(after[clean.to(DEVICE)], before[clean.to(DEVICE)])
        assert after[sample, 1].isnan().all()


def test_large_logits_stay_finite() -> None:
    query, key, value = (draw((2, 1, 36, 16), torch.float32, DEVICE) for _ in range(3))
    output, lse = segkern.seg_attention(
        query * 1e4, key * 1e4, value, Grid(4, 9), (0.0, math.inf), backend="triton", return_lse=True
    )
    assert output.isfinite().all()
    assert lse.isfinite().all()


def test_backends_agree() -> None:
    query, key, value = (draw((3, 2, 45, 24), torch.float32, DEVICE) for _ in range(3))
    outputs = [
        segkern.seg_attention(query, key, value, Grid(5, 9), (0.0, 1.0, math.inf), backend=backend)
        for backend in ("triton", "torch")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 18], ids=["per key", "per row"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_smallest_finite_mask_is_not_minus_infinity(backend: str, rows: int) -> None:
    """A row that is fully masked by the dtype's most negative number attends uniformly, as in PyTorch in float32."""
    query, key, value = (draw((2, 1, 18, 16), torch.float32, DEVICE) for _ in range(3))
    mask = torch.full((1, 1, rows, 18), torch.finfo(torch.float32).min, device=DEVICE)
    output = segkern.seg_attention(query, key, value, Grid(2, 9), (1.0, math.inf), attn_mask=mask, backend=backend)
    torch.testing.assert_close(output, value.mean(dim=2, keepdim=True).expand_as(output), rtol=1e-5, atol=1e-5)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("sigma", "scale", "backend"),
    [
        ((0.0, 1.3, 4.0), None, "default"),
        ((0.0, 1.3, 4.0), -0.3, "flash"),
        ((0.0, 1.3, math.inf), -0.3, "cudnn"),
        ((math.inf, 0.0, math.inf), None, "default"),
        (math.inf, 0.2, "efficient"),
    ],
    ids=str,
)
def test_blur_then_pytorchs_attention_where_that_was_faster(
    sigma: object, scale: float | None, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(_routes, "faster_sdpa", lambda *_: backend)
    monkeypatch.setattr("segkern.kernels.seg_attention.launch_seg_attention", lambda *_: calls.append("kernel"))
    query, key, value = (draw((3, 2, 40, 16), dtype, DEVICE, layout) for layout in LAYOUTS[:3])
    grid = Grid(4, 9, 2)
    output = segkern.seg_attention(query, key, value, grid, sigma, scale=scale, backend="triton")
    oracle, _ = oracle_attention(query, key, value, grid, sigma, scale=scale)
    assert_contract(output, oracle, plain_attention(query, key, value, grid, sigma, scale=scale))
    assert output.transpose(1, 2).is_contiguous()
    assert calls == []
    segkern.seg_attention(query, key, value, grid, sigma, backend="triton", return_lse=True)
    assert calls == ["kernel"]


@pytest.mark.parametrize("rows", [1, 36], ids=["few rows", "tiles"])
def test_the_most_negative_number_as_a_mask(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other libraries mask with it instead of minus infinity. If it masks a whole row, it is the row's log-sum-exp."""
    spied_splits(monkeypatch)
    query, key, value = (draw((1, 1, n, 16), torch.float32, DEVICE) for n in (rows, 300, 300))
    mask = torch.full((1, 1, rows, 300), torch.finfo(torch.float32).min, device=DEVICE)
    mask[:, :, 1:, :40] = 0.0
    oracle, oracle_lse = oracle_attention(query, key, value, Grid(1, rows), 0.0, attn_mask=mask)
    output, lse = segkern.seg_attention(
        query, key, value, Grid(1, rows), 0.0, attn_mask=mask, backend="triton", return_lse=True
    )
    torch.testing.assert_close(lse, oracle_lse.float(), rtol=1e-5, atol=1e-5)
    # The differences between the first row's logits are below the precision of such a number.
    torch.testing.assert_close(output[:, :, 1:], oracle[:, :, 1:].float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output[0, 0, 0], value.mean(dim=2)[0, 0], rtol=1e-4, atol=1e-5)

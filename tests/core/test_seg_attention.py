# SPDX-License-Identifier: Apache-2.0
"""``seg_attention`` on PyTorch's path: the reference, the identities of the method, the contract, invalid input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid, reference
from segkern.ops import torch_attention
from tests.core.contract import LAYOUTS, assert_contract, draw, oracle_attention, plain_attention

sigmas = st.one_of(st.just(0.0), st.floats(0.1, 50.0), st.just(math.inf))


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype)


@settings(max_examples=60)
@given(data=st.data())
def test_float64_equals_the_reference(data: st.DataObject) -> None:
    grid = Grid(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 3)))
    tokens = grid.stop + data.draw(st.integers(0, 2))
    batch, heads, dim = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 24))
    keys, value_dim = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 24))
    sigma = tuple(data.draw(sigmas) for _ in range(batch))
    query, key, value = (
        randn(batch, heads, tokens, dim),
        randn(batch, heads, keys, dim),
        randn(batch, heads, keys, value_dim),
    )
    mask = data.draw(
        st.sampled_from(
            [
                None,
                torch.rand(tokens, keys) > 0.3,
                randn(batch, 1, 1, keys),
                randn(1, heads, tokens, keys),
                torch.rand(batch, 1, 1, keys) > 0.3,
            ]
        )
    )
    options = {"scale": data.draw(st.sampled_from([None, 0.3, -0.5])), "attn_mask": mask, "boundary": "reflect"}
    expected, expected_lse = reference.seg_attention(query, key, value, grid, sigma, return_lse=True, **options)
    result, lse = segkern.seg_attention(query, key, value, grid, sigma, return_lse=True, backend="torch", **options)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-5)
    assert lse.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_contract_holds_in_every_dtype_and_layout(dtype: torch.dtype, layout: str) -> None:
    grid, sigma = Grid(13, 19, start=2), (0.0, 1.5, 8.0, math.inf)
    query, key, value = (draw((4, 2, 251, 40), dtype, torch.device("cpu"), layout) for _ in range(3))
    oracle, _ = oracle_attention(query, key, value, grid, sigma)
    result = segkern.seg_attention(query, key, value, grid, sigma)
    assert result.dtype == dtype
    assert_contract(result, oracle, plain_attention(query, key, value, grid, sigma))


def test_zero_sigma_is_plain_attention() -> None:
    query, key, value = (randn(2, 3, 20, 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value)
    assert torch.equal(segkern.seg_attention(query, key, value, Grid(4, 5), 0.0), expected)


def test_blurred_logits_are_logits_of_blurred_queries() -> None:
    """Proposition 3.1: the blur commutes with the product, so it suffices to blur Q."""
    grid, (query, key, value) = Grid(6, 7), (randn(1, 2, 42, 8) for _ in range(3))
    logits = query @ key.transpose(-2, -1) * 8**-0.5
    blurred = segkern.gaussian_blur(logits, grid, 1.7)  # over the grid of the queries, with keys as channels
    expected = torch.softmax(blurred, dim=-1) @ value
    torch.testing.assert_close(segkern.seg_attention(query, key, value, grid, 1.7), expected, rtol=0, atol=1e-12)


def test_infinite_sigma_is_attention_of_the_mean_query() -> None:
    grid, (query, key, value) = Grid(6, 7), (randn(2, 2, 42, 8) for _ in range(3))
    mean = query.mean(dim=2, keepdim=True).expand_as(query)
    expected = F.scaled_dot_product_attention(mean, key, value)
    result = segkern.seg_attention(query, key, value, grid, math.inf)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert torch.equal(result, result[:, :, :1].expand_as(result))


def test_samples_do_not_see_each_other() -> None:
    grid, (query, key, value) = Grid(5, 6), (randn(3, 2, 30, 8) for _ in range(3))
    before = segkern.seg_attention(query, key, value, grid, (0.0, 2.0, math.inf))
    for poisoned in range(3):
        tensors = [x.clone() for x in (query, key, value)]
        for x in tensors:
            x[poisoned] = math.nan
        after = segkern.seg_attention(*tensors, grid, (0.0, 2.0, math.inf))
        others = [i for i in range(3) if i != poisoned]
        assert torch.equal(after[others], before[others])
        assert after[poisoned].isnan().all()


def test_infinite_samples_form_one_query_row(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    original = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        seen.append((query.shape[0], query.shape[2]))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch_attention.F, "scaled_dot_product_attention", spy)
    query, key, value = (randn(3, 2, 30, 8) for _ in range(3))
    segkern.seg_attention(query, key, value, Grid(5, 6), (0.0, 0.0, math.inf))
    assert seen == [(2, 30), (1, 1)]


def test_unblurred_queries_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    pointers: list[int] = []
    original = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        pointers.append(query.data_ptr())
        return original(query, *args, **kwargs)

    monkeypatch.setattr(torch_attention.F, "scaled_dot_product_attention", spy)
    query, key, value = (randn(3, 2, 30, 8) for _ in range(3))
    segkern.seg_attention(query, key, value, Grid(5, 6), (0.0, 0.0, 2.0))
    assert pointers[0] == query.data_ptr()


def test_result_is_a_tensor_of_its_own() -> None:
    query, key, value = (randn(2, 2, 30, 8) for _ in range(3))
    for sigma in (0.0, 1.0, math.inf, (0.0, math.inf)):
        segkern.seg_attention(query, key, value, Grid(5, 6), sigma).add_(1.0)  # would fail on an expanded row


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_behaves_as_for_pytorchs_attention(dtype: torch.dtype) -> None:
    query, key, value = (randn(2, 2, 30, 8, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", dtype=dtype):
        expected = F.scaled_dot_product_attention(query, key, value)
        result = segkern.seg_attention(query, key, value, Grid(5, 6), (0.0, 2.0))
    assert result.dtype == expected.dtype == dtype
    low = [x.to(dtype) for x in (query, key, value)]
    outside = segkern.seg_attention(*low, Grid(5, 6), (0.0, 2.0))
    assert torch.equal(result, outside)


@pytest.mark.parametrize("sigma", [0.0, 1.3, math.inf, (0.0, 2.0, math.inf)], ids=str)
def test_gradients(sigma: object) -> None:
    grid = Grid(2, 3, start=1)
    tensors = [randn(3, 1, 8, 2).requires_grad_() for _ in range(3)]
    mask = randn(1, 1, 8, 8).requires_grad_()

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return segkern.seg_attention(*inputs[:3], grid, sigma, attn_mask=inputs[3])

    assert torch.autograd.gradcheck(run, (*tensors, mask))


BAD_CALLS = {
    "three dimensions": ({"query": torch.zeros(2, 6, 4)}, r"\(2, 6, 4\)"),
    "integers": ({"query": torch.zeros(1, 1, 6, 4, dtype=torch.long)}, "torch.int64"),
    "not a tensor": ({"key": [1, 2]}, "list"),
    "other dtype": ({"value": torch.zeros(1, 1, 6, 4, dtype=torch.float16)}, "torch.float16"),
    "other device": ({"key": torch.zeros(1, 1, 6, 4, device="meta")}, "meta"),
    "other batch": ({"key": torch.zeros(2, 1, 6, 4)}, r"\(2, 1, 6, 4\)"),
    "other heads": ({"value": torch.zeros(1, 3, 6, 4)}, r"\(1, 3, 6, 4\)"),
    "other head_dim": ({"key": torch.zeros(1, 1, 6, 5)}, r"\(1, 1, 6, 5\)"),
    "other keys": ({"value": torch.zeros(1, 1, 7, 4)}, r"\(1, 1, 7, 4\)"),
    "no keys": ({"key": torch.zeros(1, 1, 0, 4), "value": torch.zeros(1, 1, 0, 4)}, r"\(1, 1, 0, 4\)"),
    "grid": ({"grid": Grid(3, 3)}, r"Grid\(height=3, width=3, start=0\)"),
    "sigma": ({"sigma": -2.0}, "-2.0"),
    "sigmas": ({"sigma": (1.0, 2.0)}, r"\(1.0, 2.0\) for a batch of 1"),
    "boundary": ({"boundary": "wrap"}, "'wrap'"),
    "backend": ({"backend": "cuda"}, "'cuda'"),
    "mask shape": ({"attn_mask": torch.zeros(5, 6)}, r"\(1, 1, 5, 6\)"),
    "mask dtype": ({"attn_mask": torch.zeros(6, 6, dtype=torch.long)}, "torch.int64"),
    "mask device": ({"attn_mask": torch.zeros(6, 6, device="meta")}, "meta"),
}


@pytest.mark.parametrize(("changes", "quoted"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_quoted(changes: dict, quoted: str) -> None:
    arguments = {
        "query": torch.zeros(1, 1, 6, 4),
        "key": torch.zeros(1, 1, 6, 4),
        "value": torch.zeros(1, 1, 6, 4),
        "grid": Grid(2, 3),
        "sigma": 1.0,
    }
    segkern.seg_attention(**arguments)
    for mask in ({}, {"attn_mask": torch.ones(6, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=quoted):
            segkern.seg_attention(**(arguments | mask | changes))

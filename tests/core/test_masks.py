# SPDX-License-Identifier: Apache-2.0
"""Masks: additive masks keep float32 with half precision; rows without keys have output 0 and gradients of 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import segkern
from segkern import Grid, reference
from tests.core.backends import CUDA, PLAIN_DTYPES, QUICK_BACKENDS
from tests.core.contract import assert_contract, oracle_attention
from tests.core.failure_tools import as_on_a_gpu

GRID, TOKENS = Grid(3, 4, start=1), 14
SIGMAS = (0.0, 1.5, math.inf, (1.5, math.inf))

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter warns about infinities
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]
every_backend = pytest.mark.parametrize("backend", QUICK_BACKENDS)


def draw(dtype: torch.dtype, dim: int = 16) -> list[torch.Tensor]:
    return [torch.randn(2, 2, TOKENS, dim, dtype=torch.float64).to(dtype) for _ in range(3)]


def rows_of(value: float) -> torch.Tensor:
    """Return a mask with a value at the last keys of every row, and at all keys of row 3."""
    mask = torch.zeros(TOKENS, TOKENS)
    mask[:, 8:] = value
    mask[3] = value
    return mask


# float32 or float64 masks that half precision cannot represent.
WIDE_MASKS = {
    "a bias of the position": -(torch.arange(14.0) + 600.0),
    "a bias of rows and keys": 700.3 - (torch.arange(14.0)[:, None] - torch.arange(14.0)).abs(),
    "a bias of the head": torch.tensor([0.5, 2.0])[:, None, None] * -(torch.arange(14.0) + 300.0),
    "padding by -1e9": rows_of(-1e9),
    "padding by -70000": rows_of(-70000.0),
    "padding by the least number": rows_of(torch.finfo(torch.float32).min),
    "large numbers": torch.arange(14.0) * 1e5,
    "small differences": 300.0 + torch.linspace(0.0, 0.4, 14),
    "padding by minus infinity": rows_of(-math.inf),
    "float64": -(torch.arange(14.0, dtype=torch.float64) + 600.0),
}


def assert_as_the_reference(
    inputs: list[torch.Tensor], sigma: Any, mask: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], **options: Any
) -> None:
    """Check the contract. The reference at the inputs' dtype, with a float32 mask, serves as plain PyTorch."""
    oracle, lse = oracle_attention(*inputs, GRID, sigma, attn_mask=mask, **options)
    assert_contract(found[0], oracle, reference.seg_attention(*inputs, GRID, sigma, attn_mask=mask, **options))
    torch.testing.assert_close(found[1].double(), lse, rtol=4e-7, atol=1e-2 if inputs[0].itemsize == 2 else 1e-5)


@every_backend
@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("mask", WIDE_MASKS.values(), ids=WIDE_MASKS)
def test_a_mask_of_float32_is_not_rounded(mask: torch.Tensor, backend: str, dtype: torch.dtype) -> None:
    if backend == "triton" and dtype == torch.bfloat16 and not CUDA:
        pytest.skip("Triton's interpreter computes wrong bfloat16 products")
    inputs = draw(dtype)
    for sigma in SIGMAS:
        found = segkern.seg_attention(*inputs, GRID, sigma, attn_mask=mask, return_lse=True, backend=backend)
        assert_as_the_reference(inputs, sigma, mask, found)


@every_backend
def test_nor_is_it_with_one_sigma_per_head_or_with_points(backend: str) -> None:
    inputs = draw(torch.float16)
    for sigma, options, name in (
        ([[0.0, 1.5]], {}, "a bias of the head"),
        ([[1.0, 2.0], [math.inf, 0.0]], {}, "a bias of rows and keys"),
        (1.5, {"query_stride": 2}, "a bias of the position"),
        ((0.0, 1.5), {"query_stride": (1, 2)}, "small differences"),
    ):
        mask = WIDE_MASKS[name]
        found = segkern.seg_attention(*inputs, GRID, sigma, attn_mask=mask, return_lse=True, backend=backend, **options)
        assert_as_the_reference(inputs, sigma, mask, found, **options)


@pytest.mark.parametrize("sigma", [0.0, 1.5], ids=str)
def test_kernels_serve_wide_masks_on_a_gpu(sigma: float) -> None:
    """PyTorch's attention on a GPU requires a mask in the dtype of the queries."""
    inputs, mask = draw(torch.float16), WIDE_MASKS["a bias of the position"]
    with as_on_a_gpu():
        found = segkern.seg_attention(*inputs, GRID, sigma, attn_mask=mask, return_lse=True)
    assert_as_the_reference(inputs, sigma, mask, found)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_call_keeps_the_mask(dtype: torch.dtype, dynamic: bool) -> None:
    inputs, mask = draw(dtype), WIDE_MASKS["a bias of rows and keys"]

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Any:
        return segkern.seg_attention(q, k, v, GRID, (0.0, 1.5), attn_mask=mask, return_lse=True)

    assert_as_the_reference(inputs, (0.0, 1.5), mask, attend(*inputs, mask))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_leaves_the_mask_alone(dtype: torch.dtype) -> None:
    inputs, mask = draw(torch.float32), WIDE_MASKS["a bias of the position"]
    with torch.autocast("cpu", dtype):
        found = segkern.seg_attention(*inputs, GRID, 1.5, attn_mask=mask, return_lse=True)
    assert_as_the_reference([x.to(dtype) for x in inputs], 1.5, mask, found)


@every_backend
@pytest.mark.parametrize("name", ["a bias of the position", "a bias of rows and keys", "a bias of the head"])
@pytest.mark.parametrize("sigma", [0.0, (1.5, math.inf)], ids=str)
def test_gradients_of_and_beside_a_wide_mask(name: str, sigma: Any, backend: str) -> None:
    inputs, mask = draw(torch.float16), WIDE_MASKS[name].clone().requires_grad_()
    doubled = [x.double().requires_grad_() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    weights = torch.randn(2, 2, TOKENS, 16)

    def gradients(function: Any, q: Any, k: Any, v: Any, mask: torch.Tensor, **options: Any) -> Any:
        out, lse = function(q, k, v, GRID, sigma, attn_mask=mask, return_lse=True, **options)
        return torch.autograd.grad((out * weights).sum() + lse.sum() * 0.1, (q, k, v, mask))

    found = gradients(segkern.seg_attention, *inputs, mask, backend=backend)
    oracle = gradients(reference.seg_attention, *doubled, mask.detach().double().requires_grad_())
    assert found[3].dtype == torch.float32
    for ours, expected in zip(found, oracle, strict=True):
        assert (ours.double() - expected).norm() <= 4e-3 * expected.norm()


def emptying_masks() -> dict[str, torch.Tensor]:
    """Return masks that leave rows, or a whole sample, without any key."""
    rows = torch.ones(TOKENS, TOKENS, dtype=torch.bool)
    rows[2] = rows[7] = False
    keys = torch.ones(2, 1, 1, TOKENS, dtype=torch.bool)
    keys[1] = False
    heads = torch.ones(1, 2, TOKENS, 1, dtype=torch.bool)
    heads[0, 1] = False
    return {"rows": rows, "a sample": keys, "a head": heads}


EMPTYING = emptying_masks()


def composed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: Any, keep: torch.Tensor) -> Any:
    """Return output and log-sum-exp (0 for rows without keys) from operations with finite derivatives."""
    logits = reference.gaussian_blur(q, GRID, sigma) @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    keep = keep.expand(logits.shape)
    alive = keep.any(dim=-1, keepdim=True)
    logits = logits.masked_fill(~keep, -1e30).masked_fill(~alive, 0.0)
    return (torch.softmax(logits, dim=-1) * alive) @ v, torch.logsumexp(logits, dim=-1) * alive[..., 0]


@every_backend
@pytest.mark.parametrize("with_lse", [False, True], ids=["output", "output and log-sum-exp"])
@pytest.mark.parametrize("additive", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("name", EMPTYING)
def test_emptied_rows_are_zero_and_so_are_their_gradients(
    name: str, additive: bool, with_lse: bool, backend: str
) -> None:
    keep = EMPTYING[name]
    mask = torch.zeros(keep.shape).masked_fill(~keep, -math.inf) if additive else keep
    for sigma in (0.0, 1.5, math.inf):
        inputs = [x.requires_grad_() for x in draw(torch.float32, dim=8)]
        doubled = [x.detach().double().requires_grad_() for x in inputs]
        result = segkern.seg_attention(*inputs, GRID, sigma, attn_mask=mask, return_lse=with_lse, backend=backend)
        output, lse = result if with_lse else (result, None)
        oracle, oracle_lse = composed(*doubled, sigma, keep)
        torch.testing.assert_close(output.double(), oracle, rtol=1e-5, atol=1e-5)
        empty = ~keep.expand(2, 2, TOKENS, TOKENS).any(dim=-1)
        assert (output[empty] == 0.0).all()
        loss, expected = output.square().sum(), oracle.square().sum()
        if lse is not None:
            assert torch.equal(lse == -math.inf, empty)
            loss = loss + lse.where(lse > -math.inf, torch.zeros(())).square().sum()
            expected = expected + oracle_lse.square().sum()
        for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, doubled), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", EMPTYING)
def test_the_mask_that_empties_rows_has_finite_gradients(name: str) -> None:
    keep = EMPTYING[name]
    additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -math.inf).requires_grad_()
    output, lse = segkern.seg_attention(*draw(torch.float64), GRID, (0.0, 1.5), attn_mask=additive, return_lse=True)
    loss = output.square().sum() + lse.where(lse > -math.inf, torch.zeros(())).sum()
    (grad,) = torch.autograd.grad(loss, additive)
    assert grad.isfinite().all()
    assert (grad[~keep] == 0.0).all()

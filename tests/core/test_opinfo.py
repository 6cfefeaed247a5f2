# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own sample inputs of ``scaled_dot_product_attention``: the shapes, strides and masks of its tests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segkern
from segkern import Grid, reference
from tests.core.contract import assert_contract, oracle_attention, plain_attention

DTYPES = (torch.float64, torch.float32, torch.float16)

pytestmark = pytest.mark.slow  # importing PyTorch's samples takes ten seconds

Sample = tuple[list[torch.Tensor], dict[str, Any]]


@cache
def attention_of_pytorch() -> Any:
    """Return the entry in PyTorch's operator database, which is imported only when a test runs."""
    pytest.importorskip("expecttest", reason="PyTorch's samples need expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    # The import disables setting PyTorch's flags, which other tests need.
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
    (attention,) = [op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention"]
    return attention


def samples(dtype: torch.dtype, wanted: bool = False) -> Iterator[Sample]:
    """Yield query, key, value and options of the four-dimensional samples.

    Samples with dropout are skipped, keys and values of grouped heads are repeated, and causal calls get a mask.
    """
    for sample in attention_of_pytorch().sample_inputs("cpu", dtype, requires_grad=wanted):
        inputs: tuple[torch.Tensor, ...] = (sample.input, *sample.args)
        (q, k, v), options = inputs, dict(sample.kwargs)
        options.pop("dropout_p", 0.0)
        if options.pop("enable_gqa", False):
            k, v = (x.detach().repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            k, v = k.requires_grad_(wanted), v.requires_grad_(wanted)
        if any(x.dim() != 4 for x in (q, k, v)):
            continue
        if options.pop("is_causal", False):
            options["attn_mask"] = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
        assert set(options) <= {"attn_mask", "scale"}
        yield [q, k, v], options


def grid_of(query: torch.Tensor) -> Grid:
    """Return a grid of two rows that starts at token 1 if the number of tokens is odd, or one token of a single one."""
    tokens = query.shape[2]
    return Grid(2, tokens // 2, tokens % 2) if tokens > 1 else Grid(1, 1)


def test_there_are_samples() -> None:
    options = [options for _, options in samples(torch.float32)]
    assert len(options) >= 8
    assert sum("attn_mask" in one for one in options) >= 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigma", [0.0, 1.5], ids=str)
def test_results_are_those_of_the_reference(sigma: float, dtype: torch.dtype) -> None:
    for (q, k, v), options in samples(dtype):
        grid = grid_of(q)
        output, lse = segkern.seg_attention(q, k, v, grid, sigma, return_lse=True, **options)
        oracle, oracle_lse = oracle_attention(q, k, v, grid, sigma, **options)
        if dtype == torch.float64:
            torch.testing.assert_close(output, oracle, rtol=1e-10, atol=1e-10)
        else:
            # Logits are in the hundreds, so every rounding changes probabilities. The larger error of a composition
            # and of PyTorch's own attention, which round differently, then serves as plain PyTorch's.
            blurred = reference.gaussian_blur(q, grid, sigma)
            ways = (
                plain_attention(q, k, v, grid, sigma, **options),
                F.scaled_dot_product_attention(blurred, k, v, **options),
            )
            assert_contract(output, oracle, max(ways, key=lambda way: (way.double() - oracle).abs().max().item()))
        eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        size = max(1.0, q.abs().max().item() * k.abs().max().item() * q.shape[3] ** 0.5)
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=0, atol=8 * eps * size)


@pytest.mark.parametrize("sigma", [0.0, 1.5], ids=str)
def test_gradients_are_those_of_the_reference(sigma: float) -> None:
    for inputs, options in samples(torch.float64, wanted=True):
        grid = grid_of(inputs[0])
        mask = options.get("attn_mask")
        wanted = [*inputs, *([mask] if mask is not None and mask.requires_grad else [])]
        found, expected = (
            torch.autograd.grad(function(*inputs, grid, sigma, **options).square().sum(), wanted)
            for function in (segkern.seg_attention, reference.seg_attention)
        )
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)

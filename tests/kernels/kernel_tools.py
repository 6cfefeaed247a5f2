# SPDX-License-Identifier: Apache-2.0
"""The device of kernel tests, and a check of attention's output and log-sum-exp."""

from __future__ import annotations

import torch

import segkern
from segkern import Grid
from tests.core.contract import assert_contract, draw, oracle_attention, plain_attention

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else [])


def check_attention(
    shape: tuple[int, int, int, int],
    grid: Grid,
    sigma: object,
    dtype: torch.dtype,
    layouts: tuple[str, str, str] = ("tokens_first",) * 3,
    keys: int | None = None,
    **options: object,
) -> None:
    """Check output and log-sum-exp of the kernels under the contract."""
    batch, heads, tokens, dim = shape
    query = draw(shape, dtype, DEVICE, layouts[0])
    key, value = (draw((batch, heads, keys or tokens, dim), dtype, DEVICE, layout) for layout in layouts[1:])
    if dim < 8:
        value.abs_()  # few numbers can almost cancel, which makes plain PyTorch's error, or ours, small by chance
    oracle, oracle_lse = oracle_attention(query, key, value, grid, sigma, **options)
    output, lse = segkern.seg_attention(query, key, value, grid, sigma, backend="triton", return_lse=True, **options)
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    assert_contract(output, oracle, plain_attention(query, key, value, grid, sigma, **options))
    finite = oracle_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    if finite.any():  # the log-sum-exp is computed from blurred queries that were rounded to the dtype once
        bound = 4 * torch.finfo(dtype).eps * max(1.0, oracle_lse[finite].abs().max().item())
        assert (lse.double() - oracle_lse)[finite].abs().max() <= bound

# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements: no offset of a kernel and no shape function overflows.

Memory is virtual: a storage of a few GB in which only the pages of some tokens are accessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

import segkern
from segkern import Grid

pytest.importorskip("triton", reason="kernels need triton")
from tests.core.contract import assert_contract, oracle_attention, plain_attention
from tests.core.failure_tools import KERNELS
from tests.kernels.kernel_tools import DEVICE

STEP = 2**30 + 64  # in elements: fits 32 bits, but twice the step does not
GRID, SIGMA = Grid(2, 3), (0.0, math.inf, 1.2)
SHAPE = (3, 3, 6, 16)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def spread(shape: tuple[int, ...], dim: int, step: int) -> torch.Tensor:
    """Return normal float16 values, ``step`` elements apart along ``dim``. The memory in between is never accessed."""
    inner = [i for i in range(len(shape)) if i != dim]
    strides = [0] * len(shape)
    for place, i in enumerate(inner):
        strides[i] = math.prod(shape[j] for j in inner[place + 1 :])
    strides[dim] = step
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)  # deterministic algorithms would fill all of the memory
    size = (shape[dim] - 1) * step + math.prod(shape[i] for i in inner)
    base = torch.empty(size, dtype=torch.float16, device=DEVICE)
    torch.use_deterministic_algorithms(before)
    return base.as_strided(shape, strides).normal_()


CALLS: dict[str, Callable[..., Any]] = {
    "seg_attention": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, SIGMA, backend="triton"),
    "few rows": lambda q, k, v: segkern.seg_attention(q[:, :, :1], k, v, Grid(1, 1), 0.0, backend="triton"),
    "gaussian_blur": lambda q, k, v: segkern.gaussian_blur(q, GRID, SIGMA, backend="triton"),
    "attention_mass": lambda q, k, v: segkern.attention_mass(q, k, backend="triton"),
    "attention_energy": lambda q, k, v: segkern.attention_energy(q, k, GRID, SIGMA, backend="triton"),
}
READS = {"gaussian_blur": (0,), "attention_mass": (0, 1), "attention_energy": (0, 1)}


@pytest.mark.robustness
@pytest.mark.usefixtures("blur_route")
@pytest.mark.parametrize("dim", [0, 1], ids=["samples", "heads"])
def test_samples_and_heads_far_apart(dim: int) -> None:
    """With query, key or value spread out, the result equals that of dense tensors bit for bit."""
    for far in range(3):
        tensors = [torch.randn(SHAPE, device=DEVICE).half() for _ in range(3)]
        tensors[far] = spread(SHAPE, dim, STEP)
        dense = [x.contiguous() for x in tensors]
        for name, call in CALLS.items():
            if far in READS.get(name, (0, 1, 2)):
                assert torch.equal(call(*tensors), call(*dense)), name
        del tensors


@pytest.mark.parametrize("dim", [0, pytest.param(1, marks=pytest.mark.robustness)], ids=["samples", "heads"])
def test_masks_of_samples_and_heads_far_apart(dim: int) -> None:
    q, k, v = (torch.randn(SHAPE, device=DEVICE).half() for _ in range(3))
    mask = spread((3, 3, 6, 6), dim, STEP)
    output = segkern.seg_attention(q, k, v, GRID, SIGMA, attn_mask=mask, backend="triton")
    dense = segkern.seg_attention(q, k, v, GRID, SIGMA, attn_mask=mask.contiguous(), backend="triton")
    assert torch.equal(output, dense)


@pytest.mark.robustness
@pytest.mark.parametrize("name", ["attention_mass", "attention_energy"])
@pytest.mark.parametrize("dim", [2, 3], ids=["tokens", "channels"])
def test_tokens_and_channels_far_apart(name: str, dim: int) -> None:
    step = 2**31 // (SHAPE[dim] - 1) + 64
    for far in (0, 1):
        tensors = [torch.randn(1, 1, *SHAPE[2:], device=DEVICE).half() for _ in range(3)]
        tensors[far] = spread((1, 1, *SHAPE[2:]), dim, step)
        call = {
            "attention_mass": lambda q, k: segkern.attention_mass(q, k, backend="triton"),
            "attention_energy": lambda q, k: segkern.attention_energy(q, k, GRID, 1.2, backend="triton"),
        }[name]
        assert torch.equal(call(*tensors[:2]), call(*(x.contiguous() for x in tensors[:2])))
        del tensors


@pytest.mark.parametrize("sigma", [0.0, 1.2, math.inf], ids=str)
@pytest.mark.slow
def test_offsets_beyond_32_bits(sigma: float) -> None:
    shape, step = (1, 1, 9, 16), 2**28
    assert (shape[2] - 1) * step >= 2**31
    for wide in range(3):  # query, key, value in turn
        tensors = [torch.randn(shape, device=DEVICE).half() for _ in range(3)]
        tensors[wide] = spread(shape, 2, step)
        output = segkern.seg_attention(*tensors, Grid(1, 9), sigma, backend="triton")
        dense = [x.contiguous() for x in tensors]
        arguments = (*dense, Grid(1, 9), sigma)
        assert_contract(output, oracle_attention(*arguments)[0], plain_attention(*arguments))
        if wide == 0:
            blurred = segkern.gaussian_blur(tensors[0], Grid(1, 9), sigma, backend="triton")
            assert torch.equal(blurred, segkern.gaussian_blur(dense[0], Grid(1, 9), sigma, backend="triton"))
        del tensors, dense


@pytest.mark.parametrize("dim", [2, 3], ids=["rows", "keys"])
@pytest.mark.slow
def test_mask_offsets_beyond_32_bits(dim: int) -> None:
    mask = spread((1, 1, 9, 9), dim, 2**28)
    tensors = [torch.randn(1, 1, 9, 16, device=DEVICE).half() for _ in range(3)]
    output = segkern.seg_attention(*tensors, Grid(1, 9), 1.2, attn_mask=mask, backend="triton")
    dense = segkern.seg_attention(*tensors, Grid(1, 9), 1.2, attn_mask=mask.contiguous(), backend="triton")
    assert torch.equal(output, dense)


class Recorder:
    """A kernel that records its launches, including the grid, and does nothing else."""

    def __init__(self) -> None:
        self.grids: list[tuple[int, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *_, **__: self.grids.append(grid)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("sigma", [0.0, 2.0, math.inf], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "grid"),
    [(1, 1, Grid(2048, 2048)), (2**12, 24, Grid(6, 8)), (4, 2**16, Grid(4, 4)), (2, 3, Grid(3000, 3000))],
    ids=["many tokens", "many samples", "many heads", "very many tokens"],
)
def test_launches_fit_a_device(
    batch: int, heads: int, grid: Grid, sigma: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid of programs is limited to 2^31 - 1 along its first axis and to 65,535 along the others."""
    recorder = Recorder()
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, recorder)
    x = torch.zeros(1, 1, 1, 64).half().expand(batch, heads, grid.tokens, 64)
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda x, *size, dtype=None, device=None: huge(size, dtype or x.dtype)
    )
    monkeypatch.setattr(torch, "empty", lambda *size, dtype=None, device=None: huge(size, dtype))
    monkeypatch.setattr(torch, "empty_permuted", lambda size, order, dtype=None, device=None: huge(size, dtype))
    monkeypatch.setattr("segkern.kernels.split_attention._mean", lambda image: image[:, :, :1])
    sigmas = (sigma,) * batch
    segkern.ops.attention.fused_attention(x, x, x, None, grid, sigmas, 1.0, "reflect", True)
    if sigma < math.inf:  # infinity would copy one result to all tokens, in memory that does not exist
        segkern.ops.masses.fused_energy(x, x, grid, sigmas, 1.0, "reflect")
    for launched in recorder.grids:
        assert 0 < launched[0] < 2**31, launched
        assert all(0 < programs < 2**16 for programs in launched[1:]), launched
    assert recorder.grids


_EMPTY = torch.empty


def huge(size: tuple[Any, ...], dtype: torch.dtype | None) -> torch.Tensor:
    """Return a tensor of any size in the memory of one element."""
    shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
    return _EMPTY(1, dtype=dtype).expand(tuple(shape))


@pytest.mark.robustness
def test_shapes_of_huge_results() -> None:
    """Operators infer the shapes of results without making them."""
    grid = Grid(1500, 1500, start=77)
    q = torch.empty(4, 24, grid.stop, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(4, 24, 2**23, 128, device="meta", dtype=torch.bfloat16)
    assert q.numel() > 2**31
    output, lse = segkern.seg_attention(q, k, k, grid, (0.0, 1.0, 30.0, math.inf), return_lse=True)
    assert (output.shape, lse.shape) == (q.shape, q.shape[:3])
    assert segkern.gaussian_blur(q, grid, 2.0).shape == q.shape
    assert segkern.attention_mass(q, k).shape == k.shape[:3]
    assert segkern.attention_energy(q, k, grid, 1.0).shape == q.shape[:3]
    assert segkern.seg_attention(q, k, k, grid, 2.0, query_stride=3).shape == q.shape

# SPDX-License-Identifier: Apache-2.0
"""The blur's half-precision kernel: weights in two planes, grids for all its constants, extreme inputs."""

from __future__ import annotations

import math

import pytest
import torch

import segkern
from segkern import Grid, reference
from segkern.core.gaussian import blur_matrix
from segkern.ops.attention import gaussian_blur as blur_operator
from tests.core.contract import assert_contract, draw, plain_blur

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels._blur_matrices import PLANE_SCALE, PLANE_STEP, blur_matrices
from segkern.kernels.gaussian_blur import blurred_image
from tests.kernels.kernel_tools import CUDA, DEVICE

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

HALVES = [torch.float16] + ([torch.bfloat16] if CUDA else [])
KINDS = [Grid(5, 9), Grid(6, 40), Grid(3, 70, start=1), Grid(35, 4), Grid(33, 37), Grid(67, 3)]


def check_blur(x: torch.Tensor, grid: Grid, sigma: float, boundary: str = "reflect") -> None:
    """Check the kernel's blur under the contract."""
    blurred = segkern.gaussian_blur(x, grid, sigma, boundary=boundary, backend="triton")
    oracle = reference.gaussian_blur(x.double(), grid, sigma, boundary=boundary)
    assert_contract(blurred, oracle, plain_blur(x, grid, sigma, boundary))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sigma", [0.5, 10.0, math.inf])
def test_planes_are_the_float32_weights(sigma: float, dtype: torch.dtype) -> None:
    matrices = blur_matrices((0,), (sigma,), 9, 70, "reflect", torch.device("cpu"), planes=dtype)
    for planes, length in ((matrices.rows, 9), (matrices.columns, 70)):
        assert planes.dtype == dtype
        assert planes.shape[-1] % PLANE_STEP == 0
        assert not planes[..., length:, :].any()
        assert not planes[..., length:].any()
        weights = blur_matrix(length, sigma, dtype=torch.float64)
        both = planes[0].double().sum(dim=0)[:length, :length] / PLANE_SCALE[dtype]
        # The precision of two numbers of the dtype. Scaled float16 numbers end at 2^-24.
        assert ((both - weights).abs() <= torch.finfo(dtype).eps ** 2 * weights + 2.0**-38).all()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("grid", KINDS, ids=str)
def test_grids_of_every_kind(grid: Grid, dtype: torch.dtype) -> None:
    x = draw((1, 1, grid.stop + 1, 24), dtype, DEVICE, "tokens_first")
    for sigma, boundary in ((0.8, "symmetric"), (7.0, "reflect"), (math.inf, "circular")):
        check_blur(x, grid, sigma, boundary)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 60000.0])
def test_small_and_large_numbers(size: float, dtype: torch.dtype) -> None:
    """Numbers near the smallest normal float16 number and near the largest."""
    x = (draw((1, 1, 20 * 24, 16), torch.float32, DEVICE).clamp(-1, 1) * size).to(dtype)
    check_blur(x, Grid(20, 24), 3.0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_transposed_blur_of_large_numbers(dtype: torch.dtype) -> None:
    """Columns of a matrix sum to more than 1, so numbers between the axes exceed float16. The result does not."""
    grid = Grid(6, 5)
    x = torch.zeros(1, 1, 30, 16, dtype=dtype, device=DEVICE)
    x[:, :, :5] = 60000.0
    sigmas = [2.0]
    blurred = blur_operator(x, 6, 5, 0, sigmas, "reflect", "triton", True)
    rows, columns = (blur_matrix(n, 2.0, dtype=torch.float64, device=DEVICE).T for n in (grid.height, grid.width))
    halfway = torch.einsum("jl,nkld->nkjd", columns, x[0].double().unflatten(1, (6, 5)))
    assert halfway.max() > torch.finfo(torch.float16).max
    oracle = torch.einsum("ik,nkjd->nijd", rows, halfway).flatten(1, 2)[None]
    assert (blurred.double() - oracle).abs().max() <= torch.finfo(dtype).eps * oracle.max()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_some_samples_of_a_batch(dtype: torch.dtype) -> None:
    """Each sample uses its own matrices, regardless of the samples in between."""
    grid, sigmas, samples = Grid(4, 9, start=2), (0.7, 0.0, 3.0, 1.5), (0, 2, 3)
    query = draw((4, 2, grid.stop + 1, 16), dtype, DEVICE, "packed")
    image = blurred_image(query, grid, sigmas, samples, "reflect").transpose(1, 2)
    for slot, sample in enumerate(samples):
        one = query[sample : sample + 1, :, grid.start : grid.stop]
        oracle = reference.gaussian_blur(one.double(), Grid(4, 9), sigmas[sample])
        assert_contract(image[slot : slot + 1], oracle, plain_blur(one, Grid(4, 9), sigmas[sample]))

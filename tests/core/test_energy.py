# SPDX-License-Identifier: Apache-2.0
"""``segkern.energy``, compared with explicitly formed logits and with autograd's Hessian."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from segkern import Grid
from segkern.analysis import energy
from tests.core.energy_tools import BOUNDARIES, dense, lse

GRID = Grid(3, 5, start=2)
TOKENS, KEYS, DIM = 19, 7, 8
SIGMAS = (0.0, 0.8, 2.0, math.inf)
BOTH = pytest.mark.parametrize("over", ["keys", "queries"])


def draw(batch: int = 2, heads: int = 3, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries and keys with surrounding text tokens and a nonzero mean, so all parts of the variance occur."""
    query = torch.randn(batch, heads, TOKENS, DIM, dtype=torch.float64) + 1.0
    key = torch.randn(batch, heads, KEYS, DIM, dtype=torch.float64) + 0.5
    return query.to(dtype), key.to(dtype)


def blurred_logits(
    query: torch.Tensor, key: torch.Tensor, sigma: float, boundary: str, scale: float | None = None
) -> torch.Tensor:
    """Return ``[batch, heads, image queries, keys]`` in float64, with the blur applied to the logits."""
    logits = query.double() @ key.double().transpose(-2, -1) * (DIM**-0.5 if scale is None else scale)
    return dense(GRID, sigma, boundary) @ logits[:, :, GRID.start : GRID.stop]


@BOTH
@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=["64", "32"])
def test_energies_are_minus_the_log_sum_exp(
    over: Any, boundary: str, sigma: float, dtype: torch.dtype, tolerance: float
) -> None:
    query, key = draw()
    expected = -lse(blurred_logits(query, key, sigma, boundary), 3 if over == "keys" else 2)
    result = energy.energies(query, key, GRID, sigma, over=over, boundary=boundary, dtype=dtype)
    assert (result.dtype, result.shape) == (dtype, expected.shape)
    torch.testing.assert_close(result.double(), expected, rtol=tolerance, atol=tolerance)
    layer = energy.layer_energy(query, key, GRID, sigma, over=over, boundary=boundary, dtype=dtype)
    torch.testing.assert_close(layer.double(), expected.sum(dim=-1), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("boundary", BOUNDARIES)
@pytest.mark.parametrize("sigma", SIGMAS)
def test_moments_are_those_of_the_logits(boundary: str, sigma: float) -> None:
    query, key = draw()
    logits = blurred_logits(query, key, sigma, boundary, scale=0.3)
    options: dict[str, Any] = {"scale": 0.3, "boundary": boundary, "dtype": torch.float64}
    for per_key, axes in ((False, (2, 3)), (True, (2,))):
        result = energy.logit_moments(query, key, GRID, sigma, per_key=per_key, **options)
        torch.testing.assert_close(result.mean, logits.mean(dim=axes))
        torch.testing.assert_close(result.variance, logits.var(dim=axes, correction=0), rtol=1e-9, atol=1e-12)


def test_a_small_variance_beside_a_large_mean_keeps_its_digits_in_float32() -> None:
    query, key = draw()
    query, key = 1.0 + 1e-3 * query, 1.0 + 1e-3 * key
    expected = blurred_logits(query, key, 0.0, "reflect").var(dim=(2, 3), correction=0)
    result = energy.logit_moments(query.float(), key.float(), GRID).variance
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=0.0)


@BOTH
def test_one_sigma_per_sample(over: Any) -> None:
    query, key = draw()
    both = energy.energies(query, key, GRID, (0.0, 2.0), over=over)
    for sample, sigma in enumerate((0.0, 2.0)):
        one = slice(sample, sample + 1)
        torch.testing.assert_close(both[one], energy.energies(query[one], key[one], GRID, sigma, over=over))
    factors = [energy.log_curvature(query, key, GRID, (0.0, 2.0), factor=f) for f in ("none", "paper")]
    assert torch.equal(factors[0][0], factors[1][0])
    assert (factors[1][1] < factors[0][1]).all()


@BOTH
@pytest.mark.parametrize("factor", ["none", "paper", "chain"])
def test_log_curvature_is_the_logarithm_of_the_determinant(over: Any, factor: Any) -> None:
    """Compare with autograd's Hessian, the first logit of every vector held fixed; the paper's uses its diagonal."""
    grid, sigma = Grid(2, 3), 0.7
    query, key = (torch.randn(1, 1, n, DIM, dtype=torch.float64) for n in (6, 4))
    blur = dense(grid, sigma, "reflect")
    logits = (query @ key.transpose(-2, -1) * DIM**-0.5)[0, 0]
    axis = 1 if over == "keys" else 0
    start = blur @ logits if factor == "none" else logits

    def layer(free: torch.Tensor) -> torch.Tensor:
        first = start[:, :1] if over == "keys" else start[:1]
        whole = torch.cat([first, free], dim=axis)
        return -lse(whole if factor == "none" else blur @ whole, axis).sum()

    options: dict[str, Any] = {"over": over, "factor": factor, "dtype": torch.float64}
    result = energy.log_curvature(query, key, grid, sigma, **options).item()
    if factor == "paper":
        diagonal = torch.softmax(blur @ logits, dim=axis) * blur.diagonal()[:, None]
        assert result == pytest.approx(diagonal.log().sum().item())
        return
    free = start[:, 1:] if over == "keys" else start[1:]
    matrix = torch.autograd.functional.hessian(layer, free.clone()).reshape(free.numel(), free.numel())
    sign, expected = torch.linalg.slogdet(matrix)
    assert sign.item() == (-1) ** free.numel()
    assert result == pytest.approx(expected.item())


@BOTH
@pytest.mark.parametrize("sigma", [0.0, 0.7, math.inf])
def test_spectrum_is_that_of_the_hessian(over: Any, sigma: float) -> None:
    grid = Grid(2, 3)
    query, key = (torch.randn(2, 2, n, DIM, dtype=torch.float64) for n in (6, 4))
    result = energy.curvature_spectrum(query, key, grid, sigma, over=over)
    blur = dense(grid, sigma, "reflect")
    logits = query @ key.transpose(-2, -1) * DIM**-0.5
    for sample in range(2):
        for head in range(2):
            start = logits[sample, head]
            if over == "keys":
                cases = [(result[sample, head], start, lambda a: -lse(blur @ a, 1).sum())]
            else:
                cases = [(result[sample, head, j], start[:, j], lambda a: -lse(blur @ a, 0)) for j in range(4)]
            for values, at, function in cases:
                matrix = torch.autograd.functional.hessian(function, at).reshape(at.numel(), at.numel())
                expected = (-torch.linalg.eigvalsh(matrix)).sort(descending=True).values
                torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_largest_curvature_is_over_all_pairs_of_rows(boundary: str) -> None:
    grid = Grid(3, 4)
    for sigma in (0.0, 0.5, 1.0, 3.0, math.inf):
        blur = dense(grid, sigma, boundary)
        expected = (blur[:, None] - blur[None]).square().sum(dim=-1).max().item() / 4
        assert energy.largest_curvature(grid, sigma, boundary) == pytest.approx(expected, abs=1e-15)


@BOTH
def test_over_sigma_is_each_of_them(over: Any) -> None:
    query, key = draw()
    result = energy.over_sigma(query, key, GRID, SIGMAS, over=over, boundary="circular", dtype=torch.float64)
    assert result.sigmas == SIGMAS
    for i, sigma in enumerate(SIGMAS):
        options: dict[str, Any] = {"boundary": "circular", "dtype": torch.float64}
        assert torch.equal(result.energies[i], energy.energies(query, key, GRID, sigma, over=over, **options))
        assert torch.equal(result.energy[i], energy.layer_energy(query, key, GRID, sigma, over=over, **options))
        mean, variance = energy.logit_moments(query, key, GRID, sigma, **options)
        assert torch.equal(result.mean[i], mean)
        assert torch.equal(result.variance[i], variance)
        per_key = energy.logit_moments(query, key, GRID, sigma, per_key=True, **options).variance
        assert torch.equal(result.query_variance[i], per_key.mean(dim=-1))
        for factor, values in result.log_curvature.items():
            expected = energy.log_curvature(query, key, GRID, sigma, over=over, factor=factor, **options)
            assert torch.equal(values[i], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    query, key = draw(dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # autocast does not round either
        result = energy.energies(query, key, GRID, 1.0)
        variance = energy.logit_moments(query, key, GRID, 1.0).variance
    assert result.dtype == variance.dtype == torch.float32
    expected = blurred_logits(query, key, 1.0, "reflect").var(dim=(2, 3), correction=0)
    torch.testing.assert_close(variance.double(), expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(
        result.double(), -lse(blurred_logits(query, key, 1.0, "reflect"), 3), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"query": "a"}, "query must be a tensor"),
        ({"key": torch.zeros(2, 3, 7, 4)}, "key must be"),
        ({"key": torch.zeros(2, 3, 0, 8)}, "at least one key"),
        ({"grid": Grid(4, 5, 2)}, "covers tokens"),
        ({"grid": (3, 5)}, "segkern.Grid"),
        ({"sigma": -1.0}, "-1"),
        ({"sigma": (1.0, 2.0, 3.0)}, "batch of 2"),
        ({"boundary": "zero"}, "'zero'"),
        ({"over": "rows"}, "'rows'"),
        ({"scale": math.nan}, "nan"),
        ({"dtype": torch.float16}, "float16"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_quoted(change: dict[str, Any], words: str) -> None:
    query, key = draw()
    arguments: dict[str, Any] = {"query": query, "key": key, "grid": GRID, "sigma": 1.0, **change}
    for function in (energy.energies, energy.layer_energy, energy.log_curvature):
        with pytest.raises(ValueError, match=words):
            function(**arguments)


def test_what_else_is_refused() -> None:
    query, key = draw()
    with pytest.raises(ValueError, match="'exact'"):
        energy.log_curvature(query, key, GRID, factor="exact")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sigma"):
        energy.over_sigma(query, key, GRID, ())
    large = torch.zeros(1, 1, 33 * 32, 4)
    with pytest.raises(ValueError, match="33 x 32 = 1056 queries would have 1056 rows, but the maximum is 1024"):
        energy.curvature_spectrum(large, large, Grid(33, 32))
    none = torch.zeros(0, 2, 6, 4)
    assert energy.curvature_spectrum(none, none[:, :, :5], Grid(2, 3)).shape == (0, 2, 5, 6)
    assert energy.curvature_spectrum(none, none[:, :, :5], Grid(2, 3), over="keys").shape == (0, 2, 30)
    with pytest.raises(ValueError, match="8 x 8 queries times 64 keys = 4096 logits"):
        energy.curvature_spectrum(large[:, :, :64], large[:, :, :64], Grid(8, 8), over="keys")

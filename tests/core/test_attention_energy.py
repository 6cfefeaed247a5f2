# SPDX-License-Identifier: Apache-2.0
"""``attention_energy``: the numerics contract on both backends, properties of energies, gradients, invalid input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid, reference
from segkern.core.gaussian import BOUNDARIES
from segkern.core.sigmas import check_sigma
from segkern.ops import torch_masses
from tests.core.backends import BACKENDS, BACKENDS_AND_DTYPES, CUDA, DEVICE, PLAIN_DTYPES, every_compiler
from tests.core.contract import LAYOUTS, assert_contract, draw, plain_blur

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes with NumPy, which warns about the infinities and NaNs of the tests.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
USUAL = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)
GRID, SIGMA = Grid(3, 4, start=1), (0.0, 1.5, math.inf)
WHERE = (3, 4, 1, list(SIGMA))

sigmas = st.one_of(st.just(0.0), st.floats(0.2, 30.0), st.just(math.inf))


def plain_energy(
    query: torch.Tensor, key: torch.Tensor, grid: Grid | None, sigma: object, scale: float | None, boundary: str
) -> torch.Tensor:
    """Compute energies in plain PyTorch, with every step at the input's dtype."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = query if grid is None else plain_blur(query, grid, sigma, boundary)
    return -torch.logsumexp(query @ key.transpose(-2, -1) * scale, dim=-1)


def check_energy(
    shape: tuple[int, int, int, int],
    keys: int,
    grid: Grid | None,
    sigma: object,
    dtype: torch.dtype,
    backend: str,
    layouts: tuple[str, str] = ("tokens_first",) * 2,
    scale: float | None = None,
    boundary: str = "reflect",
) -> None:
    """Check each sample separately, because energies of blurred rows are closer together than those of others."""
    batch, heads, _, dim = shape
    query = draw(shape, dtype, DEVICE, layouts[0])
    key = draw((batch, heads, keys, dim), dtype, DEVICE, layouts[1])
    result = segkern.attention_energy(query, key, grid, sigma, scale=scale, boundary=boundary, backend=backend)
    assert result.dtype == torch.float32
    oracle = reference.attention_energy(query.double(), key.double(), grid, sigma, scale=scale, boundary=boundary)
    plain = plain_energy(query, key, grid, sigma, scale, boundary)
    for sample, value in enumerate(check_sigma(sigma, batch)):
        assert_contract(result[sample], oracle[sample], plain[sample])
        if grid is not None and math.isinf(value):
            image = result[sample, :, grid.start : grid.stop]
            assert torch.equal(image, image[:, :1].expand_as(image))


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@settings(max_examples=12, suppress_health_check=USUAL)
@given(data=st.data())
def test_any_grid_stride_sigma_and_batch(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    grid = Grid(data.draw(st.integers(1, 7)), data.draw(st.integers(1, 11)), data.draw(st.integers(0, 5)))
    # Tokens outside the image, and heads, so that a sample with one row for its image still has many numbers. With few
    # numbers, plain PyTorch's errors can all be small by chance.
    batch, tokens = data.draw(st.integers(1, 3)), grid.stop + data.draw(st.integers(6, 11))
    shape = batch, data.draw(st.integers(2, 3)), tokens, data.draw(st.sampled_from([1, 8, 16, 24, 40, 64, 80]))
    check_energy(
        shape,
        data.draw(st.integers(1, 70)),
        grid,
        tuple(data.draw(sigmas) for _ in range(batch)),
        dtype,
        backend,
        (data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(LAYOUTS))),
        data.draw(st.sampled_from([None, 0.2, -0.3, 0.0])),
        data.draw(st.sampled_from(BOUNDARIES)),
    )


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 40, 64, 80, 100, 128, 160, 256])
def test_head_dimensions(dim: int, backend: str, dtype: torch.dtype) -> None:
    check_energy((2, 1, 45, dim), 39, None, 0.0, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "keys"), [(300, 9), (9, 300), (1, 1), (1, 400), (40, 1)], ids=str)
def test_few_of_one_and_many_of_the_other(tokens: int, keys: int, backend: str) -> None:
    heads = 32 if tokens * keys == 1 else 1  # the error of a single number can be small by chance
    check_energy((1, heads, tokens, 24), keys, None, 0.0, torch.float32, backend)


@pytest.mark.skipif(not CUDA, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (26, 38), (64, 64)], ids=str)
def test_sdxl_grids(shape: tuple[int, int], dtype: torch.dtype) -> None:
    tokens = shape[0] * shape[1]
    check_energy((3, 10, tokens, 64), tokens, Grid(*shape), (0.0, 10.0, math.inf), dtype, "triton")


def test_rows_of_infinite_sigma_share_their_keys_among_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="kernels need triton")
    from segkern.kernels import attention_energy
    from segkern.kernels._configs import key_splits

    seen = []

    def spied(*arguments: int) -> tuple[int, int]:
        seen.append(key_splits(*arguments)[0])
        return key_splits(*arguments)

    monkeypatch.setattr(attention_energy, "key_splits", spied)
    monkeypatch.setattr(attention_energy, "multiprocessors", lambda _: 8)
    check_energy((2, 1, 20, 16), 300, Grid(4, 5), math.inf, torch.float32, "triton")
    assert seen == [3]


@pytest.mark.parametrize("block", [(1, 1), (7, 50), (16, 2**20)], ids=str)
def test_pytorchs_path_in_blocks_of_any_size(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_masses, "_CPU_BLOCK", block)
    monkeypatch.setattr(torch_masses, "_OTHER_BLOCK", block)
    check_energy((3, 3, 33, 8), 21, Grid(4, 7, start=2), SIGMA, torch.float32, "torch")


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_samples_form_one_row(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    if backend == "torch":
        original = torch_masses._write_energy
        monkeypatch.setattr(
            torch_masses, "_write_energy", lambda q, *rest: (shapes.append(q.shape[2]), original(q, *rest))
        )
    else:
        from segkern.kernels import attention_energy as kernels

        launch = kernels._launch
        monkeypatch.setattr(kernels, "_launch", lambda q, *rest: (shapes.append(q.shape[2]), launch(q, *rest)))
    query, key = torch.randn(2, 1, 1, 14, 8, device=DEVICE)
    segkern.attention_energy(query, key, GRID, math.inf, backend=backend)
    assert sorted(n for n in shapes if n) == [1, 1, 1], "the mean, and one token on each side of the grid"


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_minus_the_log_sum_exp_of_attention(backend: str) -> None:
    query, key = (torch.randn(3, 2, 14, 8, device=DEVICE) for _ in range(2))
    _, lse = segkern.seg_attention(query, key, key, GRID, SIGMA, backend=backend, return_lse=True)
    result = segkern.attention_energy(query, key, GRID, SIGMA, backend=backend)
    torch.testing.assert_close(result, -lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_nothing_have_the_energy_of_a_uniform_row(backend: str) -> None:
    result = segkern.attention_energy(
        torch.zeros(1, 1, 3, 16, device=DEVICE), torch.randn(1, 1, 50, 16, device=DEVICE), backend=backend
    )
    torch.testing.assert_close(result, torch.full_like(result, -math.log(50)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15], ids=str)
def test_huge_logits_do_not_overflow(size: float, backend: str) -> None:
    query, key = (draw((2, 1, 45, 16), torch.float32, DEVICE) * size for _ in range(2))
    result = segkern.attention_energy(query, key, Grid(5, 9), (0.0, math.inf), backend=backend)
    oracle = reference.attention_energy(query.double(), key.double(), Grid(5, 9), (0.0, math.inf))
    assert_contract(result, oracle, plain_energy(query, key, Grid(5, 9), (0.0, math.inf), None, "reflect"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_and_heads_do_not_see_each_other(backend: str) -> None:
    tensors = [draw((3, 2, 14, 16), torch.float32, DEVICE) for _ in range(2)]
    before = segkern.attention_energy(*tensors, GRID, SIGMA, backend=backend)
    for sample, which in itertools.product(range(3), range(2)):
        poisoned = [x.clone() for x in tensors]
        poisoned[which][sample, 1] = math.nan
        after = segkern.attention_energy(*poisoned, GRID, SIGMA, backend=backend)
        assert after[sample, 1].isnan().all()
        after[sample, 1] = before[sample, 1]
        assert torch.equal(after, before)


def test_float64_stays_float64() -> None:
    query, key = torch.randn(2, 3, 2, 14, 8, dtype=torch.float64)
    result = segkern.attention_energy(query, key, GRID, SIGMA)
    torch.testing.assert_close(result, reference.attention_energy(query, key, GRID, SIGMA), rtol=1e-12, atol=1e-12)
    assert result.dtype == torch.float64


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_products_and_sums_are_never_rounded_to_half_precision(backend: str, dtype: torch.dtype) -> None:
    query, key = (3.0 * torch.randn(3, 2, 14, 24, device=DEVICE)).to(dtype), torch.randn(3, 2, 29, 24).to(DEVICE, dtype)
    result = segkern.attention_energy(query, key, backend=backend)
    torch.testing.assert_close(result, reference.attention_energy(query.float(), key.float()), rtol=1e-5, atol=1e-5)
    blurred = reference.gaussian_blur(query, GRID, SIGMA)  # rounded to the query's dtype, as documented
    result = segkern.attention_energy(query, key, GRID, SIGMA, backend=backend)
    expected = reference.attention_energy(blurred.float(), key.float())
    near = torch.finfo(dtype).eps if dtype != torch.float32 else 1e-5  # in float32, sums before it round differently
    torch.testing.assert_close(result, expected, rtol=near, atol=near)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    query, key = (torch.randn(3, 2, n, 8, device=DEVICE, requires_grad=True) for n in (14, 9))
    torch.library.opcheck(torch.ops.segkern.attention_energy.default, (query, key, *WHERE, 0.3, "reflect", backend))
    grad = torch.randn(3, 2, 14, device=DEVICE)
    backward = torch.ops.segkern.attention_energy_backward.default
    torch.library.opcheck(backward, (grad, query.detach(), key.detach(), *WHERE, 0.3, "reflect"))


@pytest.mark.one_in(3)
@pytest.mark.parametrize("sigma", [0.0, 1.3, math.inf, SIGMA], ids=str)
def test_gradients(sigma: object) -> None:
    query, key = (torch.randn(3, 1, n, 2, dtype=torch.float64, requires_grad=True) for n in (14, 5))
    assert torch.autograd.gradcheck(lambda q, k: segkern.attention_energy(q, k, GRID, sigma), (query, key))


@pytest.mark.parametrize("backend", BACKENDS)
@every_compiler
def test_compiles_without_graph_break(compiler: str, backend: str) -> None:
    def loss(query: torch.Tensor, key: torch.Tensor, sigma: float) -> torch.Tensor:
        blurred = segkern.attention_energy(query, key, GRID, (0.0, sigma, math.inf), backend=backend)
        return (blurred - segkern.attention_energy(query, key, backend=backend)).square().sum()

    tensors = [torch.randn(3, 2, 14, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for sigma in (1.5, 2.5):
        torch.testing.assert_close(compiled(*tensors, sigma), loss(*tensors, sigma), rtol=1e-4, atol=1e-5)
    result = torch.autograd.grad(compiled(*tensors, 2.5), tensors)
    for ours, theirs in zip(result, torch.autograd.grad(loss(*tensors, 2.5), tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


BAD_CALLS = {
    "grid": ({"grid": Grid(3, 3)}, r"Grid\(height=3, width=3, start=0\)"),
    "no grid": ({"grid": None}, "grid=None, sigma=1.0"),
    "size for a grid": ({"grid": (2, 3)}, r"\(2, 3\)"),
    "sigma": ({"sigma": -2.0}, "-2.0"),
    "sigmas": ({"sigma": (1.0, 2.0)}, r"\(1.0, 2.0\) for a batch of 1"),
    "boundary": ({"boundary": "wrap"}, "'wrap'"),
    "other dtype": ({"key": torch.zeros(1, 1, 6, 4, dtype=torch.float16)}, "query and key .* torch.float16"),
    "scale": ({"scale": math.inf}, "inf"),
    "backend": ({"backend": "cuda"}, "'cuda'"),
}


@pytest.mark.parametrize(("changes", "quoted"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_quoted(changes: dict, quoted: str) -> None:
    arguments = {"query": torch.zeros(1, 1, 6, 4), "key": torch.zeros(1, 1, 7, 4), "grid": Grid(2, 3), "sigma": 1.0}
    segkern.attention_energy(**arguments)
    with pytest.raises(ValueError, match=quoted):
        segkern.attention_energy(**(arguments | changes))


def test_operators_called_directly_check_their_arguments() -> None:
    x = torch.randn(1, 1, 6, 4)
    with pytest.raises(ValueError, match="Grid"):
        torch.ops.segkern.attention_energy(x, x, 3, 3, 0, [1.0], 0.5, "reflect", "torch")
    with pytest.raises(ValueError, match="wrap"):
        torch.ops.segkern.attention_energy(x, x, 2, 3, 0, [1.0], 0.5, "wrap", "torch")

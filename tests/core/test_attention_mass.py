# SPDX-License-Identifier: Apache-2.0
"""``attention_mass``: the numerics contract on both backends, properties of masses, gradients, invalid input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import segkern
from segkern import reference
from segkern.ops import torch_masses
from tests.core.backends import BACKENDS, BACKENDS_AND_DTYPES, CUDA, DEVICE, PLAIN_DTYPES, every_compiler
from tests.core.contract import LAYOUTS, assert_contract, draw, plain_mass

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # The interpreter computes with NumPy, which warns about the infinities and NaNs of the tests.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
USUAL = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture)


def check_mass(
    shape: tuple[int, int, int, int],
    keys: int,
    dtype: torch.dtype,
    backend: str,
    layouts: tuple[str, str] = ("tokens_first",) * 2,
    scale: float | None = None,
) -> None:
    batch, heads, _, dim = shape
    query = draw(shape, dtype, DEVICE, layouts[0])
    key = draw((batch, heads, keys, dim), dtype, DEVICE, layouts[1])
    result = segkern.attention_mass(query, key, scale=scale, backend=backend)
    assert result.dtype == torch.float32
    oracle = reference.attention_mass(query.double(), key.double(), scale=scale)
    assert_contract(result, oracle, plain_mass(query, key, scale))
    torch.testing.assert_close(
        result.sum(dim=-1), torch.full(shape[:2], float(shape[2]), device=DEVICE), rtol=1e-5, atol=0
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@settings(max_examples=12, suppress_health_check=USUAL)
@given(data=st.data())
def test_any_shape_and_strides(backend: str, dtype: torch.dtype, data: st.DataObject) -> None:
    dim = data.draw(st.sampled_from([1, 3, 8, 16, 24, 40, 64, 80]))
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 3)), data.draw(st.integers(1, 70)), dim
    layouts = data.draw(st.sampled_from(LAYOUTS)), data.draw(st.sampled_from(LAYOUTS))
    scale = data.draw(st.sampled_from([None, 0.2, -0.3, 0.0]))
    check_mass(shape, data.draw(st.integers(1, 70)), dtype, backend, layouts, scale)


@pytest.mark.one_in(4)
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("dim", [1, 16, 40, 64, 80, 100, 128, 160, 256])
def test_head_dimensions(dim: int, backend: str, dtype: torch.dtype) -> None:
    check_mass((2, 1, 45, dim), 39, dtype, backend)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "keys"), [(300, 9), (9, 300), (1, 1), (1, 40), (40, 1), (160, 128)], ids=str)
def test_few_of_one_and_many_of_the_other(tokens: int, keys: int, backend: str) -> None:
    """With few keys, programs share the queries."""
    check_mass((3, 4, tokens, 24), keys, torch.float32, backend)


def test_queries_are_shared_out_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="kernels need triton")
    from segkern.kernels import attention_mass
    from segkern.kernels._configs import key_splits

    seen = []

    def spied(*arguments: int) -> tuple[int, int]:
        seen.append(key_splits(*arguments)[0])
        return key_splits(*arguments)

    monkeypatch.setattr(attention_mass, "key_splits", spied)
    monkeypatch.setattr(attention_mass, "multiprocessors", lambda _: 8)
    check_mass((1, 2, 300, 16), 9, torch.float32, "triton")
    assert seen == [3]


@pytest.mark.skipif(not CUDA, reason="takes minutes in the interpreter")
@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1024, 26 * 38, 4096])
def test_sdxl_shapes(tokens: int, dtype: torch.dtype) -> None:
    check_mass((3, 10, tokens, 64), tokens, dtype, "triton")


@pytest.mark.parametrize("block", [(1, 1), (7, 50), (16, 2**20)], ids=str)
def test_pytorchs_path_in_blocks_of_any_size(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_masses, "_CPU_BLOCK", block)
    monkeypatch.setattr(torch_masses, "_OTHER_BLOCK", block)
    check_mass((2, 3, 33, 8), 21, torch.float32, "torch")


def test_pytorchs_path_forms_no_matrix_of_all_scores() -> None:
    query, key = (torch.randn(1, 2, 6000, 8) for _ in range(2))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        segkern.attention_mass(query, key, backend="torch")
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < 6000 * 6000 * 4 / 4, "at most a quarter of one head's scores"


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_keys_share_alike(backend: str) -> None:
    query, key = torch.randn(1, 2, 30, 16, device=DEVICE), torch.randn(1, 2, 1, 16, device=DEVICE).expand(1, 2, 50, 16)
    result = segkern.attention_mass(query, key, backend=backend)
    torch.testing.assert_close(result, torch.full_like(result, 30 / 50), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_attention_of_ones_seen_from_the_keys(backend: str) -> None:
    """The mass of a key is the gradient of the summed outputs with respect to its value."""
    query, key = (torch.randn(2, 2, 20, 8, device=DEVICE) for _ in range(2))
    value = torch.zeros(2, 2, 20, 8, device=DEVICE, requires_grad=True)
    torch.nn.functional.scaled_dot_product_attention(query, key, value)[..., 0].sum().backward()
    torch.testing.assert_close(segkern.attention_mass(query, key, backend=backend), value.grad[..., 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e4, 1e8, 1e15], ids=str)
def test_huge_logits_neither_overflow_nor_lose_mass(size: float, backend: str) -> None:
    query, key = (draw((2, 1, 45, 16), torch.float32, DEVICE) * size for _ in range(2))
    result = segkern.attention_mass(query, key, backend=backend)
    assert result.isfinite().all()
    torch.testing.assert_close(result.sum(dim=-1), torch.full((2, 1), 45.0, device=DEVICE))
    assert_contract(result, reference.attention_mass(query.double(), key.double()), plain_mass(query, key))


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_and_heads_do_not_see_each_other(backend: str) -> None:
    tensors = [draw((2, 2, 36, 16), torch.float32, DEVICE) for _ in range(2)]
    before = segkern.attention_mass(*tensors, backend=backend)
    for which in range(2):  # a single bad query or key affects its whole head
        poisoned = [x.clone() for x in tensors]
        poisoned[which][1, 0, 35] = math.nan
        after = segkern.attention_mass(*poisoned, backend=backend)
        assert after[1, 0].isnan().all()
        after[1, 0] = before[1, 0]
        assert torch.equal(after, before)


def test_float64_stays_float64() -> None:
    query, key = torch.randn(2, 2, 2, 21, 8, dtype=torch.float64)
    result = segkern.attention_mass(query, key)
    torch.testing.assert_close(result, reference.attention_mass(query, key), rtol=1e-12, atol=1e-12)
    assert result.dtype == torch.float64


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
def test_products_and_sums_are_never_rounded_to_half_precision(backend: str, dtype: torch.dtype) -> None:
    query, key = (3.0 * torch.randn(2, 2, 37, 24, device=DEVICE)).to(dtype), torch.randn(2, 2, 29, 24).to(DEVICE, dtype)
    result = segkern.attention_mass(query, key, backend=backend)
    torch.testing.assert_close(result, reference.attention_mass(query.float(), key.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS if CUDA else ["torch"])
def test_a_key_of_infinities_gets_no_mass_and_takes_none(backend: str) -> None:
    """Next to such a key, the kernel's padding of queries is NaN. A device's minimum, unlike NumPy's, makes it 0."""
    query, key = torch.rand(1, 1, 5, 4, device=DEVICE) + 0.1, torch.randn(1, 1, 5, 4, device=DEVICE)
    key[0, 0, 3] = -math.inf
    result = segkern.attention_mass(query, key, backend=backend)
    torch.testing.assert_close(result, reference.attention_mass(query, key), rtol=1e-5, atol=1e-6)
    assert result[0, 0, 3] == 0.0


def test_gradients_inside_autocast_are_not_rounded() -> None:
    """The forward runs outside autocast and the backward inside it; the differentiated tensors are float32."""
    query, key, weights = (torch.randn(2, 2, 30, 8) for _ in range(3))
    weights = 10.0 + 3.0 * weights[..., 0]
    grads = []
    for function, double in ((segkern.attention_mass, False), (reference.attention_mass, True)):
        q, k = (x.double() if double else x.clone() for x in (query, key))
        q.requires_grad_()
        k.requires_grad_()
        loss = (function(q, k) * weights).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=not double):
            grads.append(torch.autograd.grad(loss, (q, k)))
    for result, expected in zip(*grads, strict=True):
        assert ((result - expected).norm() / expected.norm()).item() < 1e-5


@pytest.mark.one_in(2)
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    query = torch.randn(2, 2, 14, 8, device=DEVICE, requires_grad=True)
    key = torch.randn(2, 2, 9, 8, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.segkern.attention_mass.default, (query, key, 0.3, backend))
    backward = torch.ops.segkern.attention_mass_backward.default
    torch.library.opcheck(backward, (torch.randn(2, 2, 9, device=DEVICE), query.detach(), key.detach(), 0.3))


@pytest.mark.parametrize("scale", [None, -0.7], ids=str)
def test_gradients(scale: float | None) -> None:
    query = torch.randn(2, 1, 5, 3, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 1, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: segkern.attention_mass(q, k, scale=scale), (query, key))


@pytest.mark.parametrize("backend", BACKENDS)
@every_compiler
def test_compiles_without_graph_break(compiler: str, backend: str) -> None:
    def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (segkern.attention_mass(query, key, backend=backend) - 1.0).relu().square().sum()

    tensors = [torch.randn(2, 2, 14, 8, device=DEVICE, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    torch.testing.assert_close(compiled(*tensors), loss(*tensors), rtol=1e-5, atol=1e-5)
    result = torch.autograd.grad(compiled(*tensors), tensors)
    for ours, theirs in zip(result, torch.autograd.grad(loss(*tensors), tensors), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


BAD_CALLS = {
    "three dimensions": ({"query": torch.zeros(2, 6, 4)}, r"\(2, 6, 4\)"),
    "integers": ({"query": torch.zeros(1, 1, 6, 4, dtype=torch.long)}, "torch.int64"),
    "not a tensor": ({"key": [1, 2]}, "list"),
    "other dtype": ({"key": torch.zeros(1, 1, 6, 4, dtype=torch.float16)}, "query and key .* torch.float16"),
    "other device": ({"key": torch.zeros(1, 1, 6, 4, device="meta")}, "meta"),
    "other batch": ({"key": torch.zeros(2, 1, 6, 4)}, r"\(2, 1, 6, 4\)"),
    "other heads": ({"key": torch.zeros(1, 3, 6, 4)}, r"\(1, 3, 6, 4\)"),
    "other head_dim": ({"key": torch.zeros(1, 1, 6, 5)}, r"\(1, 1, 6, 5\)"),
    "no keys": ({"key": torch.zeros(1, 1, 0, 4)}, r"\(1, 1, 0, 4\)"),
    "scale": ({"scale": math.nan}, "nan"),
    "backend": ({"backend": "cuda"}, "'cuda'"),
}


@pytest.mark.parametrize(("changes", "quoted"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_input_is_quoted(changes: dict, quoted: str) -> None:
    arguments = {"query": torch.zeros(1, 1, 6, 4), "key": torch.zeros(1, 1, 7, 4)}
    segkern.attention_mass(**arguments)
    with pytest.raises(ValueError, match=quoted):
        segkern.attention_mass(**(arguments | changes))


@pytest.mark.parametrize("function", ["attention_mass", "attention_energy"])
@pytest.mark.parametrize(
    ("dim", "dtype", "reason"),
    [(300, torch.float32, "from 1 to 256, not 300"), (8, torch.float64, "not float64")],
    ids=str,
)
def test_a_backend_that_cannot_serve_says_why(dim: int, dtype: torch.dtype, reason: str, function: str) -> None:
    x = torch.randn(1, 1, 6, dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this call: .*{reason}"):
        getattr(segkern, function)(x, x, backend="triton")
    torch.testing.assert_close(getattr(segkern, function)(x, x), getattr(reference, function)(x, x))

# SPDX-License-Identifier: Apache-2.0
"""All modes of the caller: autograd, inference, autocast, transforms, compilation, defaults, subclasses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import segkern
from segkern.core import gaussian
from segkern.core.dispatch import triton_is_installed
from tests.core.backends import QUICK_BACKENDS
from tests.core.functions import FUNCTIONS, GRID, PLAIN, SHAPE, SIGMA, tensors

# A warning of PyTorch about its own attention under vmap.
slowly = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
every_function = pytest.mark.parametrize("name", FUNCTIONS)
every_backend = pytest.mark.parametrize("backend", QUICK_BACKENDS)


@every_backend
@every_function
def test_modes_of_autograd(name: str, backend: str) -> None:
    call, (q, k, v) = FUNCTIONS[name], tensors()
    expected = call(q, k, v, backend=backend)
    wanting = q.clone().requires_grad_()
    with torch.no_grad():
        result = call(wanting, k, v, backend=backend)
    assert not result.requires_grad
    torch.testing.assert_close(result, expected)
    result = call(torch.nn.Parameter(q), k, v, backend=backend)
    assert type(result) is torch.Tensor
    (grad,) = torch.autograd.grad(call(wanting, k, v, backend=backend).square().sum(), wanting)
    double = [x.double() for x in (q, k, v)]
    double[0].requires_grad_()
    (oracle,) = torch.autograd.grad(PLAIN[name](*double).square().sum(), double[0])
    torch.testing.assert_close(grad.double(), oracle, rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        result = call(wanting, k, v, backend=backend)
        assert result.is_inference()
    torch.testing.assert_close(result.clone(), expected)
    with torch.inference_mode():
        inference = [x.clone() for x in (q, k, v)]
    torch.testing.assert_close(call(*inference, backend=backend), expected)  # without gradient, nothing is saved


@every_backend
@every_function
def test_results_are_the_same_bit_for_bit_at_every_run(name: str, backend: str) -> None:
    first, second = (FUNCTIONS[name](*(x.clone() for x in tensors()), backend=backend) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["seg_attention", "attention_mass", "attention_energy"])
@every_backend
def test_inference_tensors_are_not_saved_for_a_gradient(name: str, backend: str) -> None:
    q, k, v = tensors()
    with torch.inference_mode():
        key, value = k.clone(), v.clone()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        FUNCTIONS[name](q.requires_grad_(), key, value, backend=backend)


@every_backend
def test_autocast_casts_what_pytorchs_attention_casts(backend: str) -> None:
    q, k, v = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        if backend == "triton":
            with pytest.raises(ValueError, match="wrong bfloat16 products"):
                segkern.seg_attention(q, k, v, GRID, SIGMA, backend=backend)
            return
        result = segkern.seg_attention(q, k, v, GRID, SIGMA, backend=backend)
        assert result.dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.bfloat16
        energy = segkern.attention_energy(q, k, GRID, SIGMA, backend=backend)
        mass = segkern.attention_mass(q, k, backend=backend)
        assert energy.dtype == mass.dtype == torch.float32
    cast = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(result, segkern.seg_attention(*cast, GRID, SIGMA, backend=backend))
    assert torch.equal(energy, segkern.attention_energy(*cast[:2], GRID, SIGMA, backend=backend))
    assert torch.equal(mass, segkern.attention_mass(*cast[:2], backend=backend))


@slowly
@every_function
def test_transforms_are_right_on_pytorchs_path(name: str) -> None:
    call, plain, (q, k, v) = FUNCTIONS[name], PLAIN[name], tensors()
    stacked = torch.randn(3, *SHAPE)
    result = torch.vmap(lambda q: call(q, k, v))(stacked)
    torch.testing.assert_close(result, torch.stack([call(q, k, v) for q in stacked]), rtol=1e-5, atol=1e-5)
    for backend in ("auto", "torch"):
        grad = torch.func.grad(lambda q: call(q, k, v, backend=backend).square().sum())  # noqa: B023
        expected = torch.func.grad(lambda q: plain(q, k, v).square().sum())
        torch.testing.assert_close(grad(q), expected(q), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.vmap(grad)(stacked[:2]), torch.stack(list(map(expected, stacked[:2]))),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.skipif(not triton_is_installed(), reason="kernels need triton")
@every_function
def test_kernels_under_a_transform_are_refused_and_auto_takes_pytorch(name: str) -> None:
    from tests.core.failure_tools import as_on_a_gpu

    call, (q, k, v) = FUNCTIONS[name], tensors()
    batched = torch.vmap(lambda q: call(q, k, v, backend="triton"))
    for transform in (batched, torch.func.grad(lambda q: call(q, k, v, backend="triton").sum())):
        with pytest.raises(ValueError, match=r"backend='triton' does not support torch\.func transforms"):
            transform(torch.stack([q, q]) if transform is batched else q)
    half = [x.half() for x in (q, k, v)]
    with as_on_a_gpu():
        grad = torch.func.grad(lambda q: call(q, *half[1:]).float().square().sum())(half[0])
    expected = torch.func.grad(lambda q: PLAIN[name](q, k, v).square().sum())(q)
    assert (grad.float() - expected).norm() <= 2e-2 * expected.norm()


@contextmanager
def defaults(dtype: torch.dtype | None, device: str | None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("dtype", "device"), [(torch.float64, None), (torch.bfloat16, None), (None, "meta"), (torch.float64, "meta")]
)
@every_backend
@every_function
def test_defaults_do_not_matter(name: str, backend: str, dtype: torch.dtype | None, device: str | None) -> None:
    """Tables that were made under the defaults do not matter either."""
    call, inputs = FUNCTIONS[name], tensors()
    forget_tables()
    expected = call(*inputs, backend=backend)
    forget_tables()
    with defaults(dtype, device):
        result = call(*inputs, backend=backend)
    assert torch.equal(result, expected)
    assert result.dtype == expected.dtype
    assert torch.equal(call(*inputs, backend=backend), expected)


def forget_tables() -> None:
    from segkern.core import coarse_queries

    tables: list[Any] = [
        gaussian.cached_blur_matrix,
        coarse_queries.cached_sampling_matrix,
        coarse_queries.cached_interpolation_matrix,
    ]
    if triton_is_installed():
        from segkern.kernels import _blur_matrices, _routes

        tables += [_routes.attention_route, _blur_matrices.blur_matrices, _blur_matrices.index_tensor]
    for table in tables:
        table.cache_clear()


class Marked(torch.Tensor):
    """A tensor subclass without changes."""


@every_backend
@every_function
def test_a_subclass_stays_one(name: str, backend: str) -> None:
    q, k, v = tensors()
    result = FUNCTIONS[name](q.as_subclass(Marked), k, v, backend=backend)
    assert type(result) is type(F.scaled_dot_product_attention(q.as_subclass(Marked), k, v)) is Marked
    torch.testing.assert_close(result.as_subclass(torch.Tensor), FUNCTIONS[name](q, k, v, backend=backend))


@pytest.mark.parametrize("far", range(3))
@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
def test_tensors_on_two_devices_are_refused(far: int, backend: str) -> None:
    inputs = tensors()
    inputs[far] = inputs[far].to("meta")
    for name in ("seg_attention", "coarse queries", *(("attention_mass", "attention_energy") if far < 2 else ())):
        with pytest.raises(ValueError, match="must share a device, got"):
            FUNCTIONS[name](*inputs, backend=backend)
    with pytest.raises(ValueError, match="query's device"):
        segkern.seg_attention(*tensors(), GRID, SIGMA, attn_mask=torch.ones(12, device="meta"), backend=backend)

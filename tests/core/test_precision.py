# SPDX-License-Identifier: Apache-2.0
"""Blurs, logits and masses of float32 keep their precision under any of PyTorch's settings for products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

import segkern
from segkern import Grid, reference
from segkern.core import precision
from tests.core.backends import QUICK_BACKENDS

GRID = Grid(8, 9, start=2)
OLD_SETTINGS = ("highest", "high", "medium")
ONE_DNN: Any = torch.backends.mkldnn  # its stubs lack the settings for products
HOLDERS: tuple[Any, ...] = (torch.backends, ONE_DNN.matmul, torch.backends.cuda.matmul)

# The older setting, and the newer ones: global, per library, and for products.
SETTINGS: dict[str, Callable[[], None]] = {
    **{f"precision {value}": partial(torch.set_float32_matmul_precision, value) for value in OLD_SETTINGS},
    "everywhere tf32": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "everywhere ieee": lambda: setattr(torch.backends, "fp32_precision", "ieee"),
    "oneDNN bf16": lambda: setattr(ONE_DNN, "fp32_precision", "bf16"),
    "oneDNN tf32": lambda: setattr(ONE_DNN, "fp32_precision", "tf32"),
    "products bf16": lambda: setattr(ONE_DNN.matmul, "fp32_precision", "bf16"),
    "products tf32": lambda: setattr(ONE_DNN.matmul, "fp32_precision", "tf32"),
    "CUDA's products tf32": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
}


@contextmanager
def setting(name: str) -> Iterator[None]:
    """Apply one setting inside the context and restore all settings afterwards."""
    old, new = torch.get_float32_matmul_precision(), [holder.fp32_precision for holder in HOLDERS]
    for holder in HOLDERS:
        holder.fp32_precision = "none"
    SETTINGS[name]()
    try:
        yield
    finally:
        for holder in HOLDERS:  # PyTorch accepts the older setting only if no newer one contradicts it
            holder.fp32_precision = "none"
        torch.set_float32_matmul_precision(old)
        for holder, value in zip(HOLDERS, new, strict=True):
            holder.fp32_precision = value
        assert torch.get_float32_matmul_precision() == old
        assert [holder.fp32_precision for holder in HOLDERS] == new


def draw(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(2, 2, 76, 64, dtype=torch.float64).to(dtype) for _ in range(3)]


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: Any) -> dict[str, torch.Tensor]:
    q, k, v = q.double(), k.double(), v.double()
    return {
        "blur": reference.gaussian_blur(q, GRID, sigma),
        "log-sum-exp": reference.seg_attention(q, k, v, GRID, sigma, return_lse=True)[1],
        "mass": reference.attention_mass(q, k),
        "energy": reference.attention_energy(q, k, GRID, sigma),
    }


def found(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {
        "blur": segkern.gaussian_blur(q, GRID, sigma, **options),
        "log-sum-exp": segkern.seg_attention(q, k, v, GRID, sigma, return_lse=True, **options)[1],
        "mass": segkern.attention_mass(q, k, **options),
        "energy": segkern.attention_energy(q, k, GRID, sigma, **options),
    }


def assert_exact(results: dict[str, torch.Tensor], oracle: dict[str, torch.Tensor]) -> None:
    for name, result in results.items():
        error = (result.double() - oracle[name]).abs().max()
        assert error <= 1e-5, f"{name}: {error:.1e}"


@pytest.mark.parametrize("backend", QUICK_BACKENDS)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_for_products_do_not_matter(name: str, backend: str) -> None:
    inputs, sigma = draw(), (0.0, 1.5)
    oracle = exact(*inputs, sigma)
    assert_exact(found(*inputs, sigma, backend=backend), oracle)
    with setting(name):
        assert_exact(found(*inputs, sigma, backend=backend), oracle)
        assert_exact(exact_in_float32(*inputs, sigma), oracle)
    assert_exact(found(*inputs, sigma, backend=backend), oracle)


def exact_in_float32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sigma: Any) -> dict[str, torch.Tensor]:
    """Check that the float32 reference is as accurate."""
    return {
        "blur": reference.gaussian_blur(q, GRID, sigma),
        "log-sum-exp": reference.seg_attention(q, k, v, GRID, sigma, return_lse=True)[1],
        "mass": reference.attention_mass(q, k),
        "energy": reference.attention_energy(q, k, GRID, sigma),
    }


def gradients(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    result = function(*inputs)
    grads = torch.autograd.grad(result.square().sum(), inputs, allow_unused=True)
    return tuple(grad for grad in grads if grad is not None)


@pytest.mark.parametrize("name", ["precision medium", "products bf16"])
def test_nor_do_they_for_gradients(name: str) -> None:
    inputs = draw()
    calls: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
        "blur": (
            lambda q, k, v: segkern.gaussian_blur(q, GRID, 1.5),
            lambda q, k, v: reference.gaussian_blur(q, GRID, 1.5),
        ),
        "mass": (lambda q, k, v: segkern.attention_mass(q, k), lambda q, k, v: reference.attention_mass(q, k)),
        "energy": (
            lambda q, k, v: segkern.attention_energy(q, k, GRID, 1.5),
            lambda q, k, v: reference.attention_energy(q, k, GRID, 1.5),
        ),
        "operator": (
            lambda q, k, v: torch.ops.segkern.seg_attention(
                q, k, v, None, 8, 9, 2, [1.5], None, "reflect", "torch", False
            )[0],
            lambda q, k, v: reference.seg_attention(q, k, v, GRID, 1.5),
        ),
    }
    for call, plain in calls.values():
        oracle = gradients(plain, [x.double() for x in inputs])
        with setting(name):
            grads = gradients(call, inputs)
        bound = 2e-5 if call is not calls["operator"][0] else 5e-2  # its output is computed by PyTorch's attention
        for ours, expected in zip(grads, oracle, strict=True):
            assert (ours - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once_whatever_they_are(dtype: torch.dtype) -> None:
    inputs = draw(dtype)
    oracle = exact(*inputs, 1.5)
    with setting("precision medium"):
        results = found(*inputs, 1.5)
    eps = torch.finfo(dtype).eps
    assert (results["blur"].double() - oracle["blur"]).abs().max() <= 0.6 * eps * oracle["blur"].abs().max()
    assert (results["mass"].double() - oracle["mass"]).abs().max() <= 1e-5


def test_coarse_queries_are_exact_too() -> None:
    q, k, v = draw()
    oracle = reference.seg_attention(q.double(), k.double(), v.double(), GRID, 1.5, query_stride=2, return_lse=True)[1]
    with setting("precision medium"):
        lse = segkern.seg_attention(q, k, v, GRID, 1.5, query_stride=2, return_lse=True)[1]
    assert (lse.double() - oracle).abs().max() <= 1e-5


def test_a_compiled_graph_is_exact_under_the_setting_it_runs_with() -> None:
    inputs = draw()
    oracle = exact(*inputs, 1.5)
    compiled: Any = torch.compile(lambda q, k, v: found(q, k, v, 1.5), backend="aot_eager", fullgraph=True)
    assert_exact(compiled(*inputs), oracle)
    with setting("precision medium"):
        assert_exact(compiled(*inputs), oracle)


@pytest.mark.parametrize("device_type", ["cpu", "cuda", "xpu", "meta"])
@pytest.mark.parametrize("name", SETTINGS)
def test_float64_is_taken_where_pytorch_would_round(name: str, device_type: str) -> None:
    """Also for devices that the machine does not have."""
    rounding = {
        "cpu": {"precision high", "precision medium", "everywhere tf32", "oneDNN bf16", "oneDNN tf32", "products bf16",
                "products tf32"},
        # PyTorch's setter for oneDNN changes the global setting.
        "cuda": {"precision high", "precision medium", "everywhere tf32", "oneDNN tf32", "CUDA's products tf32"},
    }  # fmt: skip
    rounding["xpu"] = rounding["cpu"]
    with setting(name):
        assert precision._rounds_float32_products(device_type) == (name in rounding.get(device_type, set()))

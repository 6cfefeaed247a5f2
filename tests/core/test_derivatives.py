# SPDX-License-Identifier: Apache-2.0
"""Forward and backward derivatives, first and second: equal to the reference's, or refused with a reason."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import segkern
from segkern import Grid, reference
from segkern.core.dispatch import triton_is_installed
from segkern.core.gaussian import BOUNDARIES
from tests.core.backends import BACKENDS
from tests.core.functions import FUNCTIONS, GRID, PLAIN, SHAPE, SIGMA, tensors

Function = Callable[..., Any]
every_function = pytest.mark.parametrize("name", FUNCTIONS)

MASK = torch.linspace(-1.0, 1.0, 144, dtype=torch.float64).view(12, 12)
KEEP = (torch.arange(144).view(12, 12) % 5 > 0) & (torch.arange(12)[:, None] != 3)  # row 3 has no key

# name -> segkern's function and the reference's, of query, key and value
CALLS: dict[str, tuple[Function, Function]] = {name: (FUNCTIONS[name], PLAIN[name]) for name in FUNCTIONS}


def add_calls(name: str, *arguments: Any, **options: Any) -> None:
    CALLS[name] = (
        lambda q, k, v, **o: segkern.seg_attention(q, k, v, *arguments, **options, **o),
        lambda q, k, v: reference.seg_attention(q, k, v, *arguments, **options),
    )


add_calls("sigma 0", GRID, 0.0)
add_calls("sigma 1.3", GRID, 1.3)
add_calls("infinite sigma", GRID, math.inf)
add_calls("per head", GRID, [[0.0, 1.3]])
add_calls("frames", Grid(1, 5, 1, frames=2), 1.3)
add_calls("additive mask", GRID, SIGMA, attn_mask=MASK)
add_calls("additive mask of keys", GRID, math.inf, attn_mask=MASK[0])
add_calls("circular, scaled", GRID, 1.3, boundary="circular", scale=-0.7)
add_calls("log-sum-exp", GRID, SIGMA, return_lse=True)
CALLS["blur by head"] = (
    lambda q, k, v, **o: segkern.gaussian_blur(q, GRID, [[0.7, 0.0], [math.inf, 2.0]], **o),
    lambda q, k, v: reference.gaussian_blur(q, GRID, [[0.7, 0.0], [math.inf, 2.0]]),
)
CALLS["emptied rows"] = (
    lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, attn_mask=KEEP, **o),
    lambda q, k, v: (
        reference.seg_attention(q, k, v, GRID, SIGMA, attn_mask=KEEP | ~KEEP.any(1, True)) * KEEP.any(1, True)
    ),
)
# A compilation takes about a second.
few_quick = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "gaussian_blur" else pytest.mark.slow) for name in FUNCTIONS]
)
SECOND = (*FUNCTIONS, "additive mask", "log-sum-exp", "emptied rows", "per head")
every_call = pytest.mark.parametrize(("ours", "plain"), CALLS.values(), ids=CALLS)


def summed(result: Any) -> torch.Tensor:
    """Return all numbers of a result in one float64 vector. The log-sum-exp of a path is float32."""
    return torch.cat([x.double().flatten() for x in (result if isinstance(result, tuple) else (result,))])


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@every_call
def test_forward_derivatives_are_those_of_the_reference(ours: Function, plain: Function) -> None:
    inputs, directions = tuple(tensors(torch.float64)), tuple(torch.randn(3, *SHAPE, dtype=torch.float64))
    value, tangent = torch.func.jvp(lambda *x: summed(ours(*x)), inputs, directions)
    _, expected = torch.func.jvp(lambda *x: summed(plain(*x)), inputs, directions)
    assert expected.abs().max() > 1e-3
    close(tangent, expected)
    close(value, summed(ours(*inputs)))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, direction) for x, direction in zip(inputs, directions, strict=True)]
        close(forward_ad.unpack_dual(summed(ours(*duals))).tangent, expected)
        only_query = forward_ad.unpack_dual(summed(ours(duals[0], *inputs[1:]))).tangent
    _, of_query = torch.func.jvp(lambda q: summed(plain(q, *inputs[1:])), inputs[:1], directions[:1])
    close(only_query, of_query)


def test_forward_derivatives_of_a_mask() -> None:
    q, k, v = tensors(torch.float64)
    for dtype in (torch.float64, torch.float32):  # float32 masks are combined with half precision
        half = [x.half() for x in (q, k, v)] if dtype == torch.float32 else [q, k, v]
        _, tangent = torch.func.jvp(
            lambda m: segkern.seg_attention(*half, GRID, SIGMA, attn_mask=m),  # noqa: B023
            (MASK.to(dtype),),
            (MASK.T.to(dtype).contiguous(),),
        )
        _, expected = torch.func.jvp(
            lambda m: reference.seg_attention(q, k, v, GRID, SIGMA, attn_mask=m), (MASK,), (MASK.T.contiguous(),)
        )
        close(tangent, expected, 1e-6 if dtype == torch.float64 else 5e-3)


@every_function
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_forward_derivatives_in_other_dtypes(name: str, dtype: torch.dtype) -> None:
    inputs, direction = tensors(torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    _, expected = torch.func.jvp(lambda q: PLAIN[name](q, *inputs[1:]), (inputs[0],), (direction,))
    low = [x.to(dtype) for x in inputs]
    value, tangent = torch.func.jvp(lambda q: FUNCTIONS[name](q, *low[1:]), (low[0],), (direction.to(dtype),))
    assert tangent.dtype == value.dtype == FUNCTIONS[name](*low).dtype
    assert (tangent.double() - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()


@pytest.mark.parametrize("name", ["seg_attention", "gaussian_blur", "attention_mass", "attention_energy"])
def test_forward_over_reverse_is_the_hessian(name: str) -> None:
    q, k, v = (x[:1, :1, :11, :2] for x in tensors(torch.float64))
    sigma = {"seg_attention": lambda f, x: f.seg_attention(x, k, v, GRID, 1.3),
             "gaussian_blur": lambda f, x: f.gaussian_blur(x, GRID, 1.3),
             "attention_mass": lambda f, x: f.attention_mass(x, k),
             "attention_energy": lambda f, x: f.attention_energy(x, k, GRID, 1.3)}[name]  # fmt: skip
    found, expected = (
        torch.func.hessian(lambda x: sigma(functions, x).square().sum())(q)  # noqa: B023
        for functions in (segkern, reference)
    )
    close(found, expected)


@every_function
@pytest.mark.skipif(not triton_is_installed(), reason="kernels need triton")
def test_kernels_refuse_forward_derivatives(name: str) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match="does not support forward-mode derivatives; use backend='torch'"):
        torch.func.jvp(lambda q: FUNCTIONS[name](q, k, v, backend="triton"), (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(ValueError, match="does not support forward-mode derivatives"):
        FUNCTIONS[name](forward_ad.make_dual(q, q), k, v, backend="triton")


REFUSED = r"segkern's functions do not support torch\.func transforms or forward-mode derivatives inside"


@few_quick
def test_forward_derivatives_inside_a_graph_are_refused(name: str) -> None:
    torch._dynamo.reset()
    inputs, direction = tensors(torch.float64), torch.randn(SHAPE, dtype=torch.float64)

    def call(q: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](q, *inputs[1:])

    def derive(q: torch.Tensor, direction: torch.Tensor) -> Any:
        return torch.func.jvp(call, (q,), (direction,))

    for compiled in (derive, lambda q, _: torch.func.grad(lambda q: call(q).sum())(q)):
        with pytest.raises(Exception, match=REFUSED):
            torch.compile(compiled, backend="aot_eager", fullgraph=True)(inputs[0], direction)


@few_quick
def test_without_fullgraph_they_are_taken_eagerly(name: str) -> None:
    torch._dynamo.reset()
    inputs, direction = tensors(torch.float64), torch.randn(SHAPE, dtype=torch.float64)

    def call(q: torch.Tensor) -> torch.Tensor:
        return FUNCTIONS[name](q, *inputs[1:])

    _, expected = torch.func.jvp(lambda q: PLAIN[name](q, *inputs[1:]), (inputs[0],), (direction,))
    outside = torch.compile(lambda q, d: torch.func.jvp(call, (q,), (d,)), backend="aot_eager")
    close(outside(inputs[0], direction)[1], expected)
    inside = torch.compile(call, backend="aot_eager")
    close(torch.func.jvp(inside, (inputs[0],), (direction,))[1], expected)


@few_quick
def test_a_graph_refuses_to_run_inside_a_dual_level(name: str) -> None:
    torch._dynamo.reset()
    inputs = tensors()
    compiled = torch.compile(lambda q: FUNCTIONS[name](q, *inputs[1:]), backend="aot_eager")
    expected = compiled(inputs[0])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[0], inputs[0])
        with pytest.raises(Exception, match=r"do not support (forward-mode derivatives|torch\.func)"):
            compiled(dual)
    assert torch.equal(compiled(inputs[0]), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_refuse_a_dual_level_by_themselves(backend: str) -> None:
    x, ops = tensors()[0], torch.ops.segkern
    where = (2, 5, 1)
    calls: list[Callable[[], Any]] = [
        lambda: ops.gaussian_blur(x, *where, [1.3], "reflect", backend),
        lambda: ops.gaussian_blur_at(x, *where, torch.ones(1), "reflect", backend),
        lambda: ops.seg_attention(x, x, x, None, *where, [1.3], None, "reflect", backend, False),
        lambda: ops.seg_attention_at(x, x, x, None, *where, torch.ones(1), None, "reflect", backend),
        lambda: ops.attention_mass(x, x, None, backend),
        lambda: ops.attention_energy(x, x, *where, [1.3], None, "reflect", backend),
        lambda: ops.coarse_queries(x, *where, [1.3], [2, 2], "reflect"),
        lambda: ops.coarse_outputs(x, 3, 6, 1, [2, 2], "reflect"),
    ]
    for call in calls:
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="do not support forward-mode derivatives"):
            call()


class Drawn:
    """A small random call of each function, determined by its number."""

    def __init__(self, number: int) -> None:
        rng = random.Random(number)
        self.generator = torch.Generator().manual_seed(number)
        self.grid = Grid(rng.randint(1, 3), rng.randint(1, 3), rng.randint(0, 1))
        batch, heads, dim = rng.randint(1, 2), rng.randint(1, 2), rng.randint(1, 3)
        tokens, keys = self.grid.stop + rng.randint(0, 1), rng.randint(1, 5)
        self.inputs = [self.normal(batch, heads, tokens, dim), self.normal(batch, heads, keys, dim)]
        self.inputs.append(self.normal(batch, heads, keys, rng.randint(1, 3)))
        kinds = [0.0, 0.8, 1.5, 4.0, math.inf]
        self.sigma = rng.choice([rng.choice(kinds), tuple(rng.choice(kinds) for _ in range(batch))])
        self.per_head = [[rng.choice(kinds) for _ in range(heads)] for _ in range(batch)]
        self.options = {"boundary": rng.choice(BOUNDARIES)}
        self.scale = {"scale": rng.choice([None, 0.4, -0.6])}
        full = (batch, heads, tokens, keys)
        shape = tuple(rng.choice((1, size)) for size in full)
        self.mask: torch.Tensor | None = None
        if (kind := rng.choice(["none", "boolean", "additive"])) == "boolean":
            self.mask = torch.rand(shape, generator=self.generator) > 0.3
        elif kind == "additive":
            self.mask = self.normal(*shape)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).requires_grad_()

    def calls(self) -> dict[str, tuple[Function, list[torch.Tensor]]]:
        """Return each function and the inputs to differentiate."""
        q, k, v = self.inputs
        options, scale, mask = self.options, self.scale, self.mask
        added = [mask] if mask is not None and mask.requires_grad else []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: torch.Tensor) -> Any:
            m = given[0] if given else mask
            return segkern.seg_attention(q, k, v, self.grid, self.sigma, attn_mask=m, **options, **scale)

        def attend_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: torch.Tensor) -> Any:
            m = given[0] if given else mask
            return segkern.seg_attention(q, k, v, self.grid, self.per_head, attn_mask=m, **options, **scale)

        def coarse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
            return segkern.seg_attention(q, k, v, self.grid, self.sigma, query_stride=2, **options, **scale)

        return {
            "attention": (attend, [q, k, v, *added]),
            "heads": (attend_heads, [q, k, v, *added]),
            "coarse": (coarse, [q, k, v]),
            "blur": (lambda q: segkern.gaussian_blur(q, self.grid, self.sigma, **options), [q]),
            "mass": (lambda q, k: segkern.attention_mass(q, k, **scale), [q, k]),
            "energy": (
                lambda q, k: segkern.attention_energy(q, k, self.grid, self.sigma, **options, **scale),
                [q, k],
            ),
        }


@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=pytest.mark.slow) for n in range(3, 60))])
def test_drawn_calls_pass_gradcheck_and_gradgradcheck(number: int) -> None:
    """Only the composed form of PyTorch's attention has second derivatives; sdpa_kernel selects it."""
    for call, inputs in Drawn(number).calls().values():
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True, check_forward_ad=True)
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
            assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_second_derivatives_outside_of_it_are_pytorchs_refusal() -> None:
    inputs = [x.requires_grad_() for x in tensors(torch.float64)]
    (grad,) = torch.autograd.grad(segkern.seg_attention(*inputs, GRID, 1.3).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward"):
        grad.sum().backward()


def twice(function: Function, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the gradients of the squared gradients."""
    grads = torch.autograd.grad(summed(function(*inputs)).square().sum(), inputs, create_graph=True, allow_unused=True)
    sums = sum(grad.square().sum() for grad in grads if grad is not None)
    return [grad for grad in torch.autograd.grad(sums, inputs, allow_unused=True) if grad is not None]


@pytest.mark.skipif(not triton_is_installed(), reason="kernels need triton")
@pytest.mark.parametrize(
    "name",
    [
        "gaussian_blur",
        *(pytest.param(name, marks=pytest.mark.robustness) for name in SECOND if name != "gaussian_blur"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_operators_have_second_derivatives(name: str) -> None:
    ours, plain = CALLS[name]
    found = twice(lambda *x: ours(*x, backend="triton"), [x.requires_grad_() for x in tensors()])
    expected = twice(plain, [x.requires_grad_() for x in tensors(torch.float64)])
    for grad, oracle in zip(found, expected, strict=True):
        assert (grad.double() - oracle).norm() <= 1e-4 * oracle.norm()


@every_call
def test_gradients_are_those_of_the_reference(ours: Function, plain: Function) -> None:
    inputs = [x.requires_grad_() for x in tensors(torch.float64)]
    grads = [
        torch.autograd.grad(summed(call(*inputs)).square().sum(), inputs, allow_unused=True) for call in (ours, plain)
    ]
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            close(found, expected, 1e-5)  # the log-sum-exp is float32

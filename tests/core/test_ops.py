# SPDX-License-Identifier: Apache-2.0
"""The operators: schemas and fakes, gradients, compilation without graph breaks."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import segkern
from segkern import Grid
from tests.core.backends import BACKENDS, every_compiler

GRID, SIGMA = Grid(3, 4, start=1), (0.0, 1.5, math.inf)

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def tensors(device: torch.device, dtype: torch.dtype = torch.float32, grad: bool = False) -> list[torch.Tensor]:
    made = [torch.randn(3, 2, 14, 8, dtype=dtype, device=device) for _ in range(3)]
    return [x.requires_grad_(grad) for x in made]


@pytest.mark.slow
def test_opcheck_attention(backend: str, device: torch.device) -> None:
    for return_lse in (False, True):
        for mask in (None, torch.randn(1, 1, 14, 14, device=device, requires_grad=True)):
            arguments = (*tensors(device, grad=True), mask, 3, 4, 1, list(SIGMA), 0.3, "reflect", backend, return_lse)
            torch.library.opcheck(torch.ops.segkern.seg_attention.default, arguments)


@pytest.mark.slow
def test_opcheck_blur(backend: str, device: torch.device) -> None:
    x = tensors(device, grad=True)[0]
    for adjoint in (False, True):
        arguments = (x, 3, 4, 1, list(SIGMA), "reflect", backend, adjoint)
        torch.library.opcheck(torch.ops.segkern.gaussian_blur.default, arguments)


@pytest.mark.one_in(2)
def test_opcheck_attention_backward(backend: str, device: torch.device) -> None:
    query, key, value = tensors(device)
    grads = torch.randn_like(query), torch.randn(3, 2, 14, device=device)
    for mask in (None, torch.randn(3, 1, 1, 14, device=device)):
        arguments = (*grads, query, key, value, mask, 3, 4, 1, list(SIGMA), 0.3, "reflect")
        torch.library.opcheck(torch.ops.segkern.seg_attention_backward.default, arguments)


def gradients(run, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    output, lse = run(*inputs)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return torch.autograd.grad((output * weights).sum() + lse.square().sum(), inputs)


@pytest.mark.parametrize("boundary", ["reflect", "circular"])
def test_gradients_equal_those_of_the_reference(backend: str, boundary: str, device: torch.device) -> None:
    inputs = tensors(device, grad=True)
    mask = torch.randn(1, 2, 14, 14, device=device, requires_grad=True)
    options = {"boundary": boundary, "return_lse": True}

    def ours(query, key, value, mask):
        return segkern.seg_attention(query, key, value, GRID, SIGMA, attn_mask=mask, backend=backend, **options)

    def reference(query, key, value, mask):
        return segkern.reference.seg_attention(query, key, value, GRID, SIGMA, attn_mask=mask, **options)

    result = gradients(ours, [*inputs, mask])
    doubled = [x.detach().double().requires_grad_() for x in (*inputs, mask)]
    for ours_grad, expected in zip(result, gradients(reference, doubled), strict=True):
        torch.testing.assert_close(ours_grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_blur_gradient_is_the_transposed_blur(backend: str, device: torch.device) -> None:
    x, y = tensors(device)[:2]
    for boundary in ("reflect", "symmetric", "circular"):
        x.requires_grad_()
        blurred = segkern.gaussian_blur(x, GRID, SIGMA, boundary=boundary, backend=backend)
        (grad,) = torch.autograd.grad((blurred * y).sum(), x)
        z = torch.randn_like(x)
        left = (grad * z).sum()  # <B^T y, z> = <y, B z>
        right = (y * segkern.gaussian_blur(z, GRID, SIGMA, boundary=boundary, backend=backend)).sum()
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@every_compiler
def test_compiles_without_graph_break(compiler: str, backend: str, device: torch.device) -> None:
    def step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sigma: float) -> torch.Tensor:
        blurred = segkern.gaussian_blur(value, GRID, 0.7, backend=backend)
        attended = segkern.seg_attention(query, key, blurred, GRID, (0.0, sigma, math.inf), backend=backend)
        return attended.transpose(1, 2).reshape(3, 14, 16) * 2

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for sigma in (1.5, 2.5, 4.0):
        inputs = tensors(device)
        torch.testing.assert_close(compiled(*inputs, sigma), step(*inputs, sigma), rtol=1e-5, atol=1e-5)


@every_compiler
def test_compiled_gradients(compiler: str, backend: str, device: torch.device) -> None:
    def loss(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return segkern.seg_attention(query, key, value, GRID, SIGMA, backend=backend).square().sum()

    inputs = tensors(device, grad=True)
    result = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend=compiler)(*inputs), inputs)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    for ours, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_shapes_are_inferred_on_fake_tensors(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key = torch.empty(2, 4, 30, 16), torch.empty(2, 4, 50, 16)
        output, lse = segkern.seg_attention(query, key, key, Grid(5, 6), 2.0, backend=backend, return_lse=True)
        assert output.shape == (2, 4, 30, 16)
        assert lse.shape == (2, 4, 30)
    real = segkern.seg_attention(
        torch.randn(2, 4, 30, 16),
        torch.randn(2, 4, 50, 16),
        torch.randn(2, 4, 50, 16),
        Grid(5, 6),
        2.0,
        backend="torch",
    )
    assert real.isfinite().all(), "tables made while tracing must not be kept"


@pytest.mark.one_in(2)
def test_compiles_once_for_all_grids(backend: str, device: torch.device) -> None:
    frames = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        frames.append(graph)
        return graph

    def step(image: torch.Tensor) -> torch.Tensor:
        grid = Grid(image.shape[2], image.shape[3])
        tokens = image.flatten(2).transpose(1, 2)[:, None]
        return segkern.seg_attention(tokens, tokens, tokens, grid, 1.3, backend=backend)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for shape in ((2, 8, 3, 5), (2, 8, 4, 9), (3, 8, 6, 3), (4, 8, 7, 5)):
        image = torch.randn(shape, device=device)
        torch.testing.assert_close(compiled(image), step(image), rtol=1e-5, atol=1e-5)
    assert len(frames) == 1, "all sizes must share one compilation"


@pytest.mark.parametrize("changes", [{"width": 60}, {"start": 20}, {"sigma": [1.0] * 3}, {"height": 0}], ids=str)
def test_operators_called_directly_check_their_arguments(backend: str, changes: dict, device: torch.device) -> None:
    x = torch.randn(2, 3, 30, 16, device=device)
    grid = {"height": 5, "width": 6, "start": 0, "sigma": [1.0, 1.0]} | changes
    with pytest.raises(ValueError, match=r"Grid|sigma"):
        torch.ops.segkern.gaussian_blur(x, *grid.values(), "reflect", backend)
    with pytest.raises(ValueError, match=r"Grid|sigma"):
        torch.ops.segkern.seg_attention(x, x, x, None, *grid.values(), 0.25, "reflect", backend, False)


def test_tables_made_under_a_callers_mode_are_ordinary_tensors(backend: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    x = torch.randn(1, 1, 22, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        segkern.seg_attention(x, x, x, Grid(2, 11), 1.7, backend=backend)
    with torch.device("meta"):
        blurred = segkern.gaussian_blur(x, Grid(11, 2), 1.7, backend="torch")
    assert blurred.isfinite().all()
    result = segkern.seg_attention(x, x, x, Grid(2, 11), 1.7, backend=backend)
    assert not isinstance(result, FakeTensor)
    assert result.isfinite().all()


@pytest.mark.one_in(2)
def test_a_tensor_of_sigmas_is_read_when_a_compiled_graph_runs(backend: str, device: torch.device) -> None:
    counter = CompileCounter()
    q, k, v = tensors(device)

    def attend(sigma: torch.Tensor) -> torch.Tensor:
        result = segkern.seg_attention(q, k, v, GRID, sigma, backend=backend)
        assert isinstance(result, torch.Tensor)
        return result

    compiled = torch.compile(attend, backend=counter, fullgraph=True)
    for sigmas in ((0.0, 1.5, math.inf), (0.0, math.inf, 0.0), (0.7, 30.0, 2.0)):
        expected = segkern.seg_attention(q, k, v, GRID, sigmas, backend=backend)
        torch.testing.assert_close(compiled(torch.tensor(sigmas, dtype=torch.float64)), expected)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match=r"got -1\.0"):
        compiled(torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64))
    operator = torch.ops.segkern.seg_attention_at
    arguments = q, k, v, None, 3, 4, 1, torch.tensor([0.0, 1.5, math.inf]), 0.3, "reflect", backend
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("sigma", "options", "quoted"),
    [
        ([1.0], {}, "one number or one per sample"),
        ([0.0, 1.0, 2.0], {"query_stride": 2}, "query_stride=2"),
    ],
    ids=str,
)
def test_what_a_tensor_of_sigmas_cannot_do_is_said(
    sigma: list[float], options: dict, quoted: str, backend: str
) -> None:
    values, given = tensors(torch.device("cpu")), torch.tensor(sigma)

    @torch.compile(backend="eager", fullgraph=True)
    def attend() -> object:
        return segkern.seg_attention(*values, GRID, given, backend=backend, **options)

    with pytest.raises(Exception, match=quoted):
        attend()

# SPDX-License-Identifier: Apache-2.0
"""Results own their memory, inputs with any layout or lazy negation are read correctly, and NaN does not spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import segkern
from segkern import Grid, reference
from tests.core.backends import BACKENDS, QUICK_BACKENDS
from tests.core.functions import FUNCTIONS, GRID, PLAIN, SHAPE, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # the interpreter warns about infinities
    pytest.mark.filterwarnings("ignore::RuntimeWarning:numpy"),
]
every_backend = pytest.mark.parametrize("backend", QUICK_BACKENDS)
every_function = pytest.mark.parametrize("name", FUNCTIONS)

# Sigmas of two samples. Each entry uses a different code path.
SIGMAS = {"plain": 0.0, "blurred": 1.3, "mean": math.inf, "plain and mean": (0.0, math.inf), "heads": [[0.0, math.inf]]}


def results(sigma: Any, inputs: list[torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """Return every tensor that the functions return for query, key and value at these sigmas."""
    q, k, v = inputs
    output, lse = segkern.seg_attention(q, k, v, GRID, sigma, return_lse=True, **options)
    masked, masked_lse = segkern.seg_attention(
        q, k, v, GRID, sigma, return_lse=True, attn_mask=torch.ones(SHAPE[2], SHAPE[2], dtype=torch.bool), **options
    )
    found = {
        "output": output,
        "log-sum-exp": lse,
        "masked output": masked,
        "masked log-sum-exp": masked_lse,
        "output alone": segkern.seg_attention(q, k, v, GRID, sigma, **options),
        "blur": segkern.gaussian_blur(q, GRID, sigma, **options),
        "blur of all tokens": segkern.gaussian_blur(q[:, :, :10], Grid(2, 5), sigma, **options),
        "output of all tokens": segkern.seg_attention(q[:, :, :10], k, v, Grid(2, 5), sigma, **options),
        "mass": segkern.attention_mass(q, k, **options),
    }
    if not isinstance(sigma, list):
        found["energy"] = segkern.attention_energy(q, k, GRID, sigma, **options)
        coarse, coarse_lse = segkern.seg_attention(q, k, v, GRID, sigma, query_stride=2, return_lse=True, **options)
        found |= {"coarse output": coarse, "coarse log-sum-exp": coarse_lse}
    return found


def addresses(x: torch.Tensor) -> torch.Tensor:
    """Return the memory address of every element."""
    place = torch.zeros(x.shape, dtype=torch.long)
    for dim, (size, stride) in enumerate(zip(x.shape, x.stride(), strict=True)):
        place += (torch.arange(size) * stride).view(-1, *(1,) * (x.dim() - dim - 1))
    return place


@every_backend
@pytest.mark.parametrize("wanted", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
def test_results_own_their_memory(sigma: Any, wanted: bool, backend: str) -> None:
    inputs = [x.requires_grad_(wanted) for x in tensors()]
    memory = {x.untyped_storage().data_ptr() for x in inputs}
    seen: set[int] = set()
    for name, result in results(sigma, inputs, backend=backend).items():
        assert addresses(result).unique().numel() == result.numel(), f"elements of {name} share memory"
        assert result.untyped_storage().data_ptr() not in memory | seen, f"{name} shares memory with another tensor"
        seen.add(result.untyped_storage().data_ptr())
        assert result.requires_grad == wanted
        before = result.detach().clone()
        result.detach()[0, 0, 0] = 7.0
        assert torch.equal(result.detach().flatten(2)[:, :, -1], before.flatten(2)[:, :, -1])


@every_backend
@pytest.mark.parametrize("sigma", SIGMAS.values(), ids=SIGMAS)
def test_results_can_be_changed_in_place(sigma: Any, backend: str) -> None:
    for name in results(sigma, tensors(), backend=backend):
        grads = []
        for change in (lambda x: x.mul_(2).add_(1), lambda x: x * 2 + 1):
            inputs = [x.requires_grad_() for x in tensors()]
            with pytorchs_refusal(name):
                changed = change(results(sigma, inputs, backend=backend)[name])
                grads.append(torch.autograd.grad(changed.square().sum(), inputs, allow_unused=True))
        for ours, expected in zip(*grads, strict=True) if len(grads) == 2 else ():
            assert (ours is None) == (expected is None)
            if ours is not None:
                torch.testing.assert_close(ours, expected)


@contextmanager
def pytorchs_refusal(name: str) -> Iterator[None]:
    """Allow PyTorch's error that its attention's output, saved for the gradient, was changed."""
    try:
        yield
    except RuntimeError as error:
        if "output" not in name or "has been modified by an inplace operation" not in str(error):
            raise


@every_backend
@every_function
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_compute_the_same_gradients(name: str, reentrant: bool, backend: str) -> None:
    grads = []
    for checkpointed in (True, False):
        inputs = [x.requires_grad_() for x in tensors()]

        def call(*inputs: torch.Tensor) -> torch.Tensor:
            return FUNCTIONS[name](*inputs, backend=backend) * 1.5

        output = checkpoint(call, *inputs, use_reentrant=reentrant) if checkpointed else call(*inputs)
        output.square().sum().backward()
        grads.append([x.grad for x in inputs if x.grad is not None])
    for ours, expected in zip(*grads, strict=True):
        assert torch.equal(ours, expected)


NEGATED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "imaginary part of a conjugate": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "a negated view": lambda x: torch._neg_view(-x),
    "a slice of one": lambda x: torch._neg_view(torch.cat([-x, x], dim=-1))[..., : x.shape[-1]],
    "a transposed one": lambda x: torch._neg_view(-x.transpose(-2, -1).contiguous()).transpose(-2, -1),
    "real part of a conjugate": lambda x: torch.complex(x, x).conj().real,
}


@every_backend
@pytest.mark.parametrize("negate", NEGATED.values(), ids=NEGATED)
def test_lazily_negated_views_are_read_as_what_they_are(negate: Callable[..., torch.Tensor], backend: str) -> None:
    check_negated(negate, backend)


@pytest.mark.skipif("triton" not in BACKENDS, reason="kernels need triton")
def test_kernels_read_a_negated_view_as_what_it_is() -> None:
    check_negated(NEGATED["a negated view"], "triton")


def check_negated(negate: Callable[..., torch.Tensor], backend: str) -> None:
    inputs = tensors()
    views = [negate(x) for x in inputs]
    for x, view in zip(inputs, views, strict=True):
        assert torch.equal(x, view)
    for name, call in FUNCTIONS.items():
        torch.testing.assert_close(
            call(*views, backend=backend).double(),
            PLAIN[name](*(x.double() for x in inputs)),
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@every_backend
@pytest.mark.parametrize("part", range(4), ids=["query", "key", "value", "mask"])
@pytest.mark.parametrize("sigma", [0.0, 1.3, math.inf], ids=str)
def test_each_of_them_by_itself(part: int, sigma: float, backend: str) -> None:
    inputs = [*tensors(), torch.randn(SHAPE[2], SHAPE[2])]
    negated = list(inputs)
    negated[part] = torch._neg_view(-inputs[part])
    assert negated[part].is_neg()
    for wanted in (False, True):
        q, k, v, mask = negated
        q = q.clone().requires_grad_() if wanted and part != 0 else q
        found = segkern.seg_attention(q, k, v, GRID, sigma, attn_mask=mask, backend=backend)
        doubled = [x.double() for x in inputs]
        oracle = reference.seg_attention(*doubled[:3], GRID, sigma, attn_mask=doubled[3])
        torch.testing.assert_close(found.double(), oracle, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_read_them_too(backend: str) -> None:
    """A graph may pass them to operators unresolved."""
    q, k, v = (torch._neg_view(-x) for x in tensors())
    compiled = torch.compile(
        lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.3, backend=backend), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(q, k, v), reference.seg_attention(*tensors(), GRID, 1.3))


UNUSUAL = {
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2, 12, 8), torch.ones(2, 10, 8)]), "nested"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(12, 8)] * 2, layout=torch.jagged).unsqueeze(1),
        "nested",
    ),
    "sparse": (lambda: torch.ones(SHAPE).to_sparse(), "sparse_coo"),
    "blocks": (lambda: torch.ones(12, 8).to_sparse_csr(), "sparse_csr"),
}


@every_function
@pytest.mark.parametrize(("make", "kind"), UNUSUAL.values(), ids=UNUSUAL)
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_tensors_without_strides_are_refused_by_name(make: Any, kind: str, name: str) -> None:
    for place in range({"gaussian_blur": 1, "attention_mass": 2, "attention_energy": 2}.get(name, 3)):
        inputs = tensors()
        inputs[place] = make()
        with pytest.raises(ValueError, match=f"(x|query|key|value) must be a dense tensor, got a {kind} one"):
            FUNCTIONS[name](*inputs)


@pytest.mark.parametrize("mask", ["nested", "sparse"])
@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_so_are_such_masks(mask: str) -> None:
    with pytest.raises(ValueError, match="attn_mask must be a dense tensor"):
        segkern.seg_attention(*tensors(), GRID, 1.3, attn_mask=UNUSUAL[mask][0]())


@every_backend
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("sigma", [0.0, 1.3, math.inf], ids=str)
def test_nan_and_infinity_stay_in_their_sample_and_head(sigma: float, bad: float, backend: str) -> None:
    """With one bad token of query, key or value, other samples and heads are unchanged."""
    clean = results(sigma, tensors(), backend=backend)
    others = torch.ones(SHAPE[:2], dtype=torch.bool)
    others[1, 0] = False
    for place in range(3):
        inputs = tensors()
        inputs[place][1, 0, 4, 3] = bad
        for name, result in results(sigma, inputs, backend=backend).items():
            assert torch.equal(result[others], clean[name][others]), name
            if place == 2 and "output" not in name:
                assert torch.equal(result, clean[name])


@every_backend
def test_nan_of_one_query_stays_in_the_sample_and_head_of_gradients(backend: str) -> None:
    others = torch.ones(SHAPE[:2], dtype=torch.bool)
    others[1, 0] = False
    for call in FUNCTIONS.values():
        grads = []
        for bad in (0.5, math.nan):
            inputs = tensors()
            inputs[0][1, 0, 4, 3] = bad
            inputs = [x.requires_grad_() for x in inputs]
            result = call(*inputs, backend=backend)
            grads.append(torch.autograd.grad(result.square().sum(), inputs, allow_unused=True))
        for clean, found in zip(*grads, strict=True):
            assert clean is None or torch.equal(found[others], clean[others])


EMPTY = {"no samples": (0, 2, 12, 8), "no heads": (2, 0, 12, 8), "neither": (0, 0, 12, 8)}
OPERATORS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "gaussian_blur": lambda x, backend: (x, 2, 5, 1, [1.3], "reflect", backend, False),
    "gaussian_blur_at": lambda x, backend: (x, 2, 5, 1, torch.ones(1), "reflect", backend, False),
    "seg_attention": lambda x, backend: (x, x, x, None, 2, 5, 1, [1.3], None, "reflect", backend, True),
    "seg_attention_at": lambda x, backend: (x, x, x, None, 2, 5, 1, torch.ones(1), None, "reflect", backend),
    "seg_attention_backward": lambda x, _: (x, x[..., 0], x, x, x, None, 2, 5, 1, [1.3], None, "reflect"),
    "attention_mass": lambda x, backend: (x, x, None, backend),
    "attention_mass_backward": lambda x, _: (x[..., 0], x, x, None),
    "attention_energy": lambda x, backend: (x, x, 2, 5, 1, [1.3], None, "reflect", backend),
    "attention_energy_backward": lambda x, _: (x[..., 0], x, x, 2, 5, 1, [1.3], None, "reflect"),
    "coarse_queries": lambda x, _: (x, 2, 5, 1, [1.3], [2, 2], "reflect", False),
    "coarse_outputs": lambda x, _: (x, 3, 7, 1, [2, 2], "reflect", False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_agree_with_their_fakes_of_nothing(name: str, backend: str) -> None:
    operator = getattr(torch.ops.segkern, name).default
    tests = ("test_schema", "test_faketensor")
    for shape in (EMPTY["no samples"], EMPTY["no heads"]):  # opcheck fails if two sizes are 0
        torch.library.opcheck(operator, OPERATORS[name](torch.ones(shape), backend), test_utils=tests)
    for sigma in (0.0, math.inf):
        if name == "seg_attention":
            x = torch.ones(EMPTY["no samples"])
            arguments = (x, x, x, None, 2, 5, 1, [sigma], None, "reflect", backend, True)
            torch.library.opcheck(operator, arguments, test_utils=tests)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@every_function
def test_gradients_of_nothing_are_nothing(name: str, compiled: bool) -> None:
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "gaussian_blur": lambda q, k, v: segkern.gaussian_blur(q, GRID, 1.3),
        "seg_attention": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.3),
        "attention_mass": lambda q, k, v: segkern.attention_mass(q, k),
        "attention_energy": lambda q, k, v: segkern.attention_energy(q, k, GRID, 1.3),
        "coarse queries": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.3, query_stride=2),
    }
    call = torch.compile(calls[name], backend="aot_eager", fullgraph=True) if compiled else calls[name]
    for shape in [EMPTY["no samples"]] if compiled else EMPTY.values():
        inputs = [torch.ones(shape, requires_grad=True) for _ in range(3)]
        result = call(*inputs)
        assert result.shape[:2] == shape[:2]
        grads = torch.autograd.grad(result.sum(), inputs, allow_unused=True)
        assert grads[0] is not None
        assert all(grad is None or grad.shape == shape for grad in grads)


def test_no_tokens_outside_a_grid_and_no_queries() -> None:
    """A grid has at least one token, so only masses and unblurred energies can have no queries."""
    none, some = torch.ones(2, 2, 0, 8), torch.ones(2, 2, 5, 8)
    assert segkern.attention_energy(none, some).shape == (2, 2, 0)
    assert torch.equal(segkern.attention_mass(none, some), torch.zeros(2, 2, 5))
    wanted = none.clone().requires_grad_()
    segkern.attention_mass(wanted, some).sum().backward()
    assert wanted.grad.shape == none.shape

# SPDX-License-Identifier: Apache-2.0
"""Compiled, exported and traced calls: other sizes and numbers are correct when the graph runs, or are refused."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import segkern
from segkern import Grid, reference
from tests.core.functions import tensors

GRID = Grid(3, 5)
DYNAMIC = {"dynamic by itself": None, "dynamic": True}
Dim = torch.export.Dim

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # from torch.export
]


def some_quick(cases: dict[str, Any], *quick: str) -> list[Any]:
    """Return parameters by name, of which only the quick ones run by default: a compilation takes about a second."""
    return [
        pytest.param(case, id=name, marks=() if name in quick else pytest.mark.slow) for name, case in cases.items()
    ]


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


class Layer(torch.nn.Module):
    """A self-attention layer for images of any size."""

    def __init__(self, sigma: Any = 1.5, function: str = "seg_attention", **options: Any) -> None:
        super().__init__()
        self.projections = torch.nn.Linear(8, 24)
        self.sigma, self.function, self.options = sigma, function, options

    def forward(self, image: torch.Tensor, sigma: torch.Tensor | None = None) -> Any:
        qkv = self.projections(image.flatten(2).transpose(1, 2)).unflatten(2, (2, 12)).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        grid, blur = Grid(image.shape[2], image.shape[3]), self.sigma if sigma is None else sigma
        if self.function == "gaussian_blur":
            return segkern.gaussian_blur(q, grid, blur, **self.options)
        if self.function == "attention_mass":
            return segkern.attention_mass(q, k, **self.options)
        if self.function == "attention_energy":
            return segkern.attention_energy(q, k, grid, blur, **self.options)
        return segkern.seg_attention(q, k, v, grid, blur, **self.options)


def assert_same(found: Any, expected: Any) -> None:
    for ours, theirs in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def saved_and_loaded(program: torch.export.ExportedProgram) -> Any:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch.export.save
        torch.export.save(program, file)
        file.seek(0)
        return torch.export.load(file).module()


# Layers whose graph serves every batch and size, including sigmas per head.
LAYERS: dict[str, Callable[[], Layer]] = {
    "blurred": lambda: Layer(1.5),
    "plain": lambda: Layer(0.0),
    "mean": lambda: Layer(math.inf),
    "log-sum-exp": lambda: Layer(1.5, return_lse=True),
    "circular": lambda: Layer(1.5, boundary="circular"),
    "scaled": lambda: Layer(1.5, scale=0.7),
    "heads": lambda: Layer([[0.0, 1.5]]),
    "coarse": lambda: Layer(1.5, query_stride=2),
    "blur": lambda: Layer(1.5, "gaussian_blur"),
    "blur by head": lambda: Layer([(0.5, math.inf)], "gaussian_blur"),
    "mass": lambda: Layer(function="attention_mass"),
    "energy": lambda: Layer(1.5, "attention_energy"),
    "energy of means": lambda: Layer(math.inf, "attention_energy"),
}


@pytest.mark.parametrize("strict", some_quick({"not strict": False, "strict": True}, "not strict"))
@pytest.mark.parametrize("make", some_quick(LAYERS, "blurred", "blur by head", "mass"))
def test_an_exported_graph_serves_every_batch_and_size(make: Callable[[], Layer], strict: bool) -> None:
    layer, image = make().eval(), torch.randn(2, 8, 4, 6)
    sizes = {0: Dim("batch", max=64), 2: Dim("height", min=3, max=64), 3: Dim("width", min=3, max=64)}
    program = torch.export.export(layer, (image,), dynamic_shapes=(sizes,), strict=strict)
    served = [program.module(), saved_and_loaded(program)] if not strict else [program.module()]
    for shape in ((2, 8, 4, 6), (1, 8, 7, 3), (5, 8, 3, 9), (3, 8, 11, 4)):
        other = torch.randn(shape)
        for module in served:
            assert_same(module(other), layer(other))


def test_a_single_sigma_is_one_in_the_graph() -> None:
    program = torch.export.export(Layer(1.5), (torch.randn(2, 8, 4, 6),))
    (node,) = [node for node in program.graph.nodes if "segkern" in str(node.target)]
    assert [1.5] in node.args
    assert_same(program.run_decompositions().module()(image := torch.randn(2, 8, 4, 6)), program.module()(image))


@pytest.mark.parametrize(
    ("sigma", "options"),
    [((0.0, 1.5), {}), ([[0.0, 1.5], [2.0, math.inf]], {}), ((1.5, math.inf), {"query_stride": 2}),
     (1.5, {"attn_mask": torch.arange(24) % 3 > 0}), (1.5, {"attn_mask": torch.linspace(-1, 1, 576).view(24, 24)})],
    ids=["per sample", "per head", "coarse per sample", "boolean mask", "additive mask"],
)  # fmt: skip
def test_what_fixes_a_size_is_exported_with_it(sigma: Any, options: dict[str, Any]) -> None:
    layer, image = Layer(sigma, **options).eval(), torch.randn(2, 8, 4, 6)
    program = torch.export.export(layer, (image,))
    other = torch.randn(2, 8, 4, 6)
    assert_same(program.module()(other), layer(other))
    assert_same(saved_and_loaded(program)(other), layer(other))


@pytest.mark.parametrize("function", ["seg_attention", "gaussian_blur", "attention_energy"])
def test_a_tensor_of_sigmas_is_an_input_of_an_exported_graph(function: str) -> None:
    layer, image = Layer(function=function).eval(), torch.randn(2, 8, 4, 6)
    batch = Dim("batch", min=2, max=64)
    program = torch.export.export(layer, (image, torch.tensor([0.0, 1.5])), dynamic_shapes=({0: batch}, {0: batch}))
    for sigmas in ([0.0, 1.5], [math.inf, 0.7], [3.0] * 5):
        sigma, other = torch.tensor(sigmas), torch.randn(len(sigmas), 8, 4, 6)
        assert_same(program.module()(other, sigma), layer(other, sigma))
    with pytest.raises(ValueError, match=r"got -1\.0"):
        program.module()(image, torch.tensor([0.0, -1.0]))


def test_gradients_through_an_exported_module() -> None:
    layer = Layer(1.5)
    sizes = {0: Dim("batch", max=64), 2: Dim("height", min=3, max=64), 3: Dim("width", min=3, max=64)}
    exported = torch.export.export(layer, (torch.randn(2, 8, 4, 6),), dynamic_shapes=(sizes,)).module()
    image = torch.randn(3, 8, 5, 3)
    found, expected = (
        torch.autograd.grad(module(image).square().sum(), list(module.parameters())) for module in (exported, layer)
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_an_ahead_of_time_package_serves_every_size(tmp_path: Any) -> None:
    layer, image = Layer(1.5).eval(), torch.randn(2, 8, 4, 6)
    sizes = {0: Dim("batch", max=64), 2: Dim("height", min=3, max=64), 3: Dim("width", min=3, max=64)}
    program = torch.export.export(layer, (image,), dynamic_shapes=(sizes,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    package = torch._inductor.aoti_load_package(path)
    for shape in ((2, 8, 4, 6), (5, 8, 3, 9)):
        assert_same(package(other := torch.randn(shape)), layer(other))


# Functions of query, key and value that torch.jit.trace records for any batch size and number of heads.
TRACEABLE: dict[str, Callable[..., torch.Tensor]] = {
    "blurred": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.5),
    "plain": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 0.0),
    "mean": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, math.inf),
    "coarse": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.5, query_stride=2),
    "masked": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.5, attn_mask=torch.arange(15) % 4 > 0),
    "biased": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.5, attn_mask=torch.arange(225.0).view(15, 15)),
    "log-sum-exp": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, 1.5, return_lse=True)[1],
    "blur": lambda q, k, v: segkern.gaussian_blur(q, GRID, 1.5),
    "mass": lambda q, k, v: segkern.attention_mass(q, k),
    "energy": lambda q, k, v: segkern.attention_energy(q, k, GRID, 1.5),
}
UNTRACEABLE: dict[str, Callable[..., torch.Tensor]] = {
    "heads": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, [[0.0, 1.5]]),
    "blur by head": lambda q, k, v: segkern.gaussian_blur(q, GRID, [[0.0, 1.5]]),
    "frames": lambda q, k, v: segkern.seg_attention(q, k, v, Grid(1, 5, frames=3), 1.5),
    "blur of frames": lambda q, k, v: segkern.gaussian_blur(q, Grid(1, 5, frames=3), 1.5),
    "coarse for some": lambda q, k, v: segkern.seg_attention(q, k, v, GRID, (1.5, math.inf), query_stride=2),
}


def draw(batch: int = 2, heads: int = 2) -> list[torch.Tensor]:
    return [torch.randn(batch, heads, 15, 8) for _ in range(3)]


def jit_trace(function: Callable[..., torch.Tensor], check: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.trace(function, tuple(draw()), check_trace=check)


@pytest.mark.parametrize("function", TRACEABLE.values(), ids=TRACEABLE)
def test_a_jit_traced_call_is_right_for_other_batches(function: Callable[..., torch.Tensor]) -> None:
    for check in (False, True):
        traced = jit_trace(function, check)
        for batch, heads in ((2, 2), (1, 2), (3, 2), (5, 1)):
            inputs = draw(batch, heads)
            assert_same(traced(*inputs), function(*inputs))
    assert_same(function(*(inputs := draw())), function(*inputs))


@pytest.mark.parametrize("function", UNTRACEABLE.values(), ids=UNTRACEABLE)
def test_what_jit_trace_would_record_for_one_size_is_refused(function: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"torch\.jit\.trace cannot record .*use torch\.export or torch\.compile"):
        jit_trace(function)


def test_a_traced_call_of_one_sigma_per_sample_refuses_other_batches() -> None:
    for function in (
        lambda q, k, v: segkern.seg_attention(q, k, v, GRID, (0.0, math.inf)),
        lambda q, k, v: segkern.gaussian_blur(q, GRID, (0.0, 1.5)),
        lambda q, k, v: segkern.attention_energy(q, k, GRID, (0.0, 1.5)),
    ):
        traced = jit_trace(function)
        assert_same(traced(*(inputs := draw())), function(*inputs))
        with pytest.raises(RuntimeError, match="sigma must be one number or one per sample: got 2 for a batch of 4"):
            traced(*draw(4))


def test_tensors_in_a_sequence_of_sigmas_are_read_when_a_traced_call_runs() -> None:
    for function in (
        lambda q, a, b: segkern.seg_attention(q, q, q, GRID, [a, b]),
        lambda q, a, b: segkern.gaussian_blur(q, GRID, (a, b)),
        lambda q, a, b: segkern.attention_energy(q, q, GRID, [a, b]),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            given = draw()[0], torch.tensor(0.5), torch.tensor(2.0)
            traced = torch.jit.trace(function, given, check_trace=False)
        others = draw()[0], torch.tensor(3.0), torch.tensor(0.0)
        assert_same(traced(*others), function(*others))


def test_sizes_that_jit_trace_follows_make_no_grid() -> None:
    def attend(image: torch.Tensor) -> torch.Tensor:
        tokens = image.flatten(2).transpose(1, 2)[:, None]
        return segkern.seg_attention(tokens, tokens, tokens, Grid(image.shape[2], image.shape[3]), 1.5)

    with pytest.raises(ValueError, match=r"Grid\.height must be an integer"):
        jit_trace(lambda q, k, v: attend(q.transpose(1, 2)[:, :, :, None]))


def test_fx_and_script_refuse_by_name() -> None:
    class Attend(torch.nn.Module):
        def __init__(self, function: Callable[..., torch.Tensor]) -> None:
            super().__init__()
            self.function = function

        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return self.function(q, k, v)

    for function in (*TRACEABLE.values(), *UNTRACEABLE.values()):
        with pytest.raises(ValueError, match=r"must be a tensor .*got Proxy"):
            torch.fx.symbolic_trace(Attend(function))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with pytest.raises(Exception, match="Compiled functions can't take variable number of arguments"):
            torch.jit.script(segkern.seg_attention)


@pytest.mark.parametrize("mode", some_quick({mode: mode for mode in ("real", "fake", "symbolic")}, "real"))
def test_make_fx_records_right_graphs(mode: str) -> None:
    for function in (*TRACEABLE.values(), *UNTRACEABLE.values()):
        traced = make_fx(function, tracing_mode=mode)(*draw())
        assert_same(traced(*(inputs := draw())), function(*inputs))
    if mode == "symbolic":
        for name in ("blurred", "blur", "mass", "energy"):
            traced = make_fx(TRACEABLE[name], tracing_mode=mode)(*draw())
            assert_same(traced(*(inputs := draw(4, 3))), TRACEABLE[name](*inputs))


# Functions of a query and a number that changes from call to call.
CHANGING: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "attention": lambda q, s: segkern.seg_attention(q, q, q, GRID, s),
    "blur": lambda q, s: segkern.gaussian_blur(q, GRID, s),
    "energy": lambda q, s: segkern.attention_energy(q, q, GRID, s),
    "coarse": lambda q, s: segkern.seg_attention(q, q, q, GRID, s, query_stride=2),
    "per sample": lambda q, s: segkern.seg_attention(q, q, q, GRID, (0.0, s)),
    "per head": lambda q, s: segkern.seg_attention(q, q, q, GRID, [[0.0, s]]),
    "frames": lambda q, s: segkern.seg_attention(q, q, q, Grid(1, 5, frames=3), s),
    "scale": lambda q, s: segkern.seg_attention(q, q, q, GRID, 1.5, scale=s),
    "scale of masses": lambda q, s: segkern.attention_mass(q, q, scale=s),
    "scale of energies": lambda q, s: segkern.attention_energy(q, q, GRID, 1.5, scale=s),
    "both": lambda q, s: segkern.seg_attention(q, q, q, GRID, s, scale=s),
    "energies": lambda q, s: segkern.energy.energies(q, q, GRID, s),
}
NUMBERS = (1.5, 2.5, 4.0, 0.0, 3, math.inf)


@pytest.mark.parametrize("dynamic", some_quick(DYNAMIC | {"static": False}, "dynamic by itself"))
@pytest.mark.parametrize("name", some_quick(dict(zip(CHANGING, CHANGING, strict=True)), "blur"))
def test_numbers_may_change_under_fullgraph(name: str, dynamic: bool | None) -> None:
    function, q = CHANGING[name], draw()[0]
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
    for number in NUMBERS[:-1] if "scale" in name or name == "both" else NUMBERS:
        assert_same(compiled(q, number), function(q, number))


@pytest.mark.slow
def test_a_number_of_a_module_may_change() -> None:
    layer, image = Layer(1.5), torch.randn(2, 8, 4, 6)
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
        for layer.sigma in (1.5, 2.5, 3.0, (0.0, 2.0), 0.7):
            assert_same(compiled(image), layer(image))


def check_no_stale_number(name: str, backend: str, dynamic: bool | None, wanted: bool) -> None:
    def function(q: torch.Tensor, s: float) -> torch.Tensor:
        return CHANGING[name](q * s, s + 0.1)

    compiled = torch.compile(function, backend=backend, dynamic=dynamic)
    for number in (0.5, 1.5, 2.5, 4.0, 0.9):
        x = draw()[0].requires_grad_(wanted)
        result = compiled(x, number)
        assert_same(result.detach(), function(x.detach(), number))
        if wanted:
            (grad,) = torch.autograd.grad(result.sum(), x)
            (expected,) = torch.autograd.grad(function(x, number).sum(), x)
            assert (grad - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("name", some_quick(dict(zip(CHANGING, CHANGING, strict=True)), "energy"))
def test_a_number_that_also_multiplies_a_tensor_is_not_stale(name: str) -> None:
    check_no_stale_number(name, "aot_eager", None, wanted=name in ("attention", "blur"))


def test_nor_is_it_with_inductor() -> None:
    """pytorch/pytorch#197889: from the third value on, Inductor uses an old one."""
    check_no_stale_number("blur", "inductor", None, wanted=False)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("dynamic", DYNAMIC.values(), ids=DYNAMIC)
@pytest.mark.parametrize("name", CHANGING)
def test_nor_is_any_with_inductor(name: str, dynamic: bool | None, wanted: bool) -> None:
    check_no_stale_number(name, "inductor", dynamic, wanted)


# Functions of an image and one boolean per token.
SIZED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {}


def sized(function: Callable[[torch.Tensor, Grid, torch.Tensor], torch.Tensor]) -> None:
    """Register a function of tokens, their grid and one boolean per token."""

    def of_image(image: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        tokens = image.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
        return function(tokens, Grid(image.shape[2], image.shape[3]), keep)

    SIZED[function.__name__] = of_image


@sized
def mask_of_rows(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.seg_attention(x, x, x, grid, 1.5, attn_mask=torch.ones(grid.tokens, grid.tokens).bool().tril())


@sized
def mask_of_keys(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.seg_attention(x, x, x, grid, 1.5, attn_mask=keep[:, None, None])


@sized
def additive_mask(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.seg_attention(x, x, x, grid, (0.0, 1.5), attn_mask=keep[:, None, None].float() * 3)


@sized
def text_before(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    x = torch.cat([x.new_ones(*x.shape[:2], 5, x.shape[3]), x], dim=2)
    mask = torch.nn.functional.pad(keep, (5, 0), value=True)[:, None, None]
    return segkern.seg_attention(x, x, x, Grid(grid.height, grid.width, 5), math.inf, attn_mask=mask)


@sized
def heads(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.seg_attention(x, x, x, grid, [[0.0, 1.5], [2.0, math.inf]], attn_mask=keep[:, None, None])


@sized
def blur_by_head(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.gaussian_blur(x, grid, [[0.0, 1.5], [2.0, math.inf]])


@sized
def stride(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.seg_attention(x, x, x, grid, (1.5, 0.0), query_stride=(2, 3))


@sized
def frames(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.seg_attention(x, x, x, Grid(1, grid.width, frames=grid.height), 1.5)


@sized
def energy(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.attention_energy(x, x, grid, (1.5, math.inf))


@sized
def mass(x: torch.Tensor, grid: Grid, keep: torch.Tensor) -> torch.Tensor:
    return segkern.attention_mass(x, x)


@pytest.mark.parametrize("dynamic", some_quick(DYNAMIC, "dynamic"))
@pytest.mark.parametrize("function", some_quick(SIZED, "blur_by_head"))
def test_sizes_may_change_under_fullgraph(function: Callable[..., torch.Tensor], dynamic: bool | None) -> None:
    counter = CompileCounter()
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    for height, width in ((4, 6), (6, 5), (8, 3), (5, 7)):
        image, keep = torch.randn(2, 8, height, width), torch.rand(2, height * width) > 0.3
        assert_same(compiled(image, keep), function(image, keep))
    assert counter.frame_count <= (1 if dynamic else 2)


BATCHES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "one": lambda q, n: segkern.seg_attention(q, q, q, GRID, 1.5),
    "one for each head": lambda q, n: segkern.seg_attention(q, q, q, GRID, [[0.0, 1.5]]),
    "of a blur for each head": lambda q, n: segkern.gaussian_blur(q, GRID, [[0.0, 1.5]]),
    "one per sample and head": lambda q, n: segkern.seg_attention(q, q, q, GRID, [[0.0, 1.5]] * n),
    "some samples with heads": lambda q, n: segkern.gaussian_blur(q, GRID, [(0.0, 1.5), *[1.0] * (n - 1)]),
    "one per sample": lambda q, n: segkern.seg_attention(q, q, q, GRID, (0.0, *[1.5] * (n - 1))),
    "energies": lambda q, n: segkern.attention_energy(q, q, GRID, [0.7] * n),
    "coarse": lambda q, n: segkern.seg_attention(q, q, q, GRID, [1.5] * n, query_stride=2),
}


@pytest.mark.parametrize("dynamic", some_quick(DYNAMIC, "dynamic by itself"))
@pytest.mark.parametrize("function", some_quick(BATCHES, "one for each head"))
def test_batches_may_change_under_fullgraph(function: Callable[..., torch.Tensor], dynamic: bool | None) -> None:
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=dynamic)
    for batch in (2, 3, 4, 1):
        q = draw(batch)[0]
        assert_same(compiled(q, batch), function(q, batch))


def test_one_graph_serves_every_batch() -> None:
    counter = CompileCounter()
    compiled = torch.compile(Layer(1.5), backend=counter, fullgraph=True, dynamic=True)
    for batch in range(2, 8):
        compiled(torch.randn(batch, 8, 3, 5))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_call_is_that_of_the_reference() -> None:
    q, k, v = tensors(torch.float64)
    compiled = torch.compile(segkern.seg_attention, backend="aot_eager", fullgraph=True, dynamic=True)
    for sigma in (1.5, (0.0, math.inf), [[0.0, 2.0]]):
        found = compiled(q, k, v, Grid(3, 4), sigma)
        torch.testing.assert_close(found, reference.seg_attention(q, k, v, Grid(3, 4), sigma), rtol=1e-10, atol=1e-12)


def test_a_new_process_loads_an_exported_program_after_the_operators_are_registered(tmp_path: Path) -> None:
    layer, image, path = Layer().eval(), torch.randn(1, 8, 3, 5), tmp_path / "layer.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from torch.export.save
        torch.export.save(torch.export.export(layer, (image,)), path)
    code = f"import torch, segkern.api; print(torch.export.load({str(path)!r}).module()(torch.zeros(1, 8, 3, 5)).shape)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.stdout == f"{layer(image).shape}\n", process.stderr

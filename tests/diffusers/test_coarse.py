# SPDX-License-Identifier: Apache-2.0
"""Guidance on few query rows: the same result, where each layer may leave out rows, and what is said about it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from test_diffusers_lifecycle import State
from test_diffusers_processor import LAYERS, make, spied
from test_diffusers_report import problems_warned
from torch._dynamo.testing import CompileCounter

import segkern
from segkern import Grid
from segkern.core.gaussian import BOUNDARIES
from segkern.integrations.diffusers import SEG, SEGAttnProcessor, guide
from segkern.integrations.diffusers.runtime.calibration import FORWARDS, MARGIN
from tests.diffusers.diffusers_tools import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.test_compile import smaller_pipeline, wrapped

LARGE = (1, 64, 64)  # latents whose first layer, d0, has 32x32 tokens


def spelled(attn: Any, x: torch.Tensor, sigmas: list[float], grid: Grid, **options: Any) -> torch.Tensor:
    """The layer with its projections done first, on every row, and coarse attention after them."""
    residual = x
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    output = segkern.seg_attention(q, k, v, grid, sigmas, scale=attn.scale, **options)
    output = attn.to_out[0](output.transpose(1, 2).flatten(2))
    return (output + residual if attn.residual_connection else output) / attn.rescale_output_factor


@pytest.mark.parametrize("kind", LAYERS)
@settings(max_examples=25)
@given(
    st.lists(st.sampled_from([0.0, 0.6, 2.0, 9.0, math.inf]), min_size=1, max_size=4),
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 0, 0, 1])),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from(BOUNDARIES),
    st.booleans(),
    st.booleans(),
)
@torch.no_grad()
def test_projecting_the_points_is_projecting_first_and_sampling_then(
    kind: str,
    sigmas: list[float],
    grid: tuple[int, int, int],
    stride: tuple[int, int],
    boundary: str,
    fused: bool,
    masked: bool,
) -> None:
    attn, where = make(kind).double(), Grid(*grid)
    x = torch.randn(len(sigmas), where.stop, 32, dtype=torch.float64)
    bias = torch.randn(len(sigmas), 1, where.stop, dtype=torch.float64) if masked else None
    mask = None if bias is None else bias[:, None]
    expected = spelled(attn, x, sigmas, where, attn_mask=mask, boundary=boundary, query_stride=stride)
    if fused:
        attn.fuse_projections()
    attn.set_processor(SEGAttnProcessor(sigmas, where, boundary, query_stride=stride))
    assert relative(attn(x, attention_mask=bias), expected) < 1e-12


@pytest.mark.parametrize("fused", [False, True], ids=["projections", "fused"])
@torch.no_grad()
def test_perturbed_samples_spend_the_rows_of_their_points(fused: bool) -> None:
    attn, x = make(), torch.randn(5, 9 * 13, 32)
    if fused:
        attn.fuse_projections()
    attn.set_processor(SEGAttnProcessor((0, 0, 2.0, 3.0, math.inf), Grid(9, 13), query_stride=(4, 3)))
    with spied(attn) as seen:
        attn(x)
    assert seen["attention"] == [(2, 2, 117, 16), (2, 2, 3 * 5, 16), (1, 2, 1, 16)]
    assert {shape[2] for shape in seen["keys"]} == {117}
    assert seen["to_out.0"] == [(2, 117, 32), (2, 15, 32), (1, 1, 32)]
    if not fused:
        assert seen["to_q"] == seen["to_out.0"]
        assert seen["to_k"] == seen["to_v"] == [(5, 117, 32)]


@torch.no_grad()
def test_normed_queries_are_projected_before_they_are_sampled() -> None:
    attn, x = make("qk_rms_norm"), torch.randn(2, 63, 32)
    attn.set_processor(SEGAttnProcessor((0, 2.0), Grid(7, 9), query_stride=2))
    with spied(attn) as seen:
        attn(x)
    assert seen["to_q"] == [(2, 63, 32)]
    assert seen["attention"] == [(1, 2, 63, 16), (1, 2, 4 * 5, 16)]


@torch.no_grad()
def test_masks_with_rows_of_their_own_take_every_row() -> None:
    attn, x, bias = make(), torch.randn(3, 63, 32), torch.randn(3, 63, 63)
    outputs = []
    for stride in (1, 2):
        attn.set_processor(SEGAttnProcessor((0, 2.0, math.inf), Grid(7, 9), query_stride=stride))
        outputs.append(attn(x, attention_mask=bias))
    assert torch.equal(*outputs)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The strides whose error was estimated, call by call."""
    strides, real = [], segkern.coarse_error

    def spy(query: Any, key: Any, value: Any, grid: Grid, sigma: Any, stride: Any, **options: Any) -> torch.Tensor:
        strides.append(stride)
        return real(query, key, value, grid, sigma, stride, **options)

    monkeypatch.setattr("segkern.integrations.diffusers.runtime.query_rows.coarse_error", spy)
    return strides


def sharpen(attn: Attention) -> None:
    """A few directions decide the attention, and decide it sharply."""
    with torch.no_grad():
        attn.to_q.weight.mul_(60)
        attn.to_k.weight.mul_(10)


@pytest.mark.parametrize("adversarial", [False, True], ids=["smooth", "adversarial"])
def test_auto_leaves_out_rows_where_that_holds_the_tolerance(adversarial: bool) -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise(*LARGE)
    if adversarial:
        sharpen(pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1)
    spec = {"sigma": 4.0, "layers": "d0"}
    arguments = {"latents": latents, "num_inference_steps": 5, "guidance_scale": 1.0}
    with guide(pipe, SEG(**spec, query_stride="auto")) as guidance:
        found = run(pipe, **arguments)
    with guide(pipe, SEG(**spec)):
        exact = run(pipe, **arguments)
    (layer,) = guidance.report().layers
    if adversarial:
        assert (layer.query_stride, layer.error) == ((1, 1), None)
        assert torch.equal(found, exact)
    else:
        assert layer.query_stride[0] > 1
        assert 0 < MARGIN * layer.error <= 2**-8
        assert 0 < relative(found, exact) < 2**-8


def test_the_choice_is_made_once_for_each_image_size(tried: list[tuple[int, int]]) -> None:
    pipe, large, small = tiny_pipeline(), noise(*LARGE), noise(1, 40, 48)
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 2}
    once = [(2, 2), (3, 3)]  # no stride above three quarters of sigma
    with guide(pipe, SEG(sigma=4.0, layers="d0", query_stride="auto")) as guidance:
        run(pipe, latents=large, **arguments)
        assert tried == 2 * once
        assert guidance.report().layers[0].query_stride is None, "nothing is chosen yet"
        run(pipe, latents=large, **arguments)
        assert tried == FORWARDS * once
        chosen = guidance.report().layers[0]
        run(pipe, latents=large, **arguments)
        assert tried == FORWARDS * once
        run(pipe, latents=small, **{**arguments, "num_inference_steps": 4})
        assert tried == 2 * FORWARDS * once
        run(pipe, latents=large, **arguments)
        assert tried == 2 * FORWARDS * once
        again = guidance.report().layers[0]
    assert (again.query_stride, again.error) == (chosen.query_stride, chosen.error)


def test_the_device_is_waited_for_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, waits, forwards, real = tiny_pipeline(own_unet=True), [], [], torch.Tensor.tolist

    def spy(x: torch.Tensor) -> Any:
        if "calibration" in sys._getframe(1).f_code.co_filename:
            waits.append(len(forwards))
        return real(x)

    monkeypatch.setattr(torch.Tensor, "tolist", spy)
    pipe.unet.register_forward_pre_hook(lambda *_: forwards.append(None))
    with guide(pipe, SEG(sigma=4.0, layers=["d0", "d1", "mid"], query_stride="auto")):
        run(pipe, latents=noise(), num_inference_steps=FORWARDS + 3)
    assert (len(forwards), waits) == (FORWARDS + 3, [FORWARDS])


def test_a_sigma_narrower_than_every_stride_is_not_tried(tried: list[tuple[int, int]]) -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(sigma=2.0, layers="d0", query_stride="auto")) as guidance:
        found = run(pipe, latents=noise(*LARGE), num_inference_steps=1)
    with guide(pipe, SEG(sigma=2.0, layers="d0")):
        assert torch.equal(run(pipe, latents=noise(*LARGE), num_inference_steps=1), found)
    assert tried == []
    assert [(row.query_stride, row.error) for row in guidance.report().layers] == [((1, 1), None)]


def test_forwards_that_estimate_compute_every_row() -> None:
    pipe, latents = tiny_pipeline(), noise(*LARGE)
    with guide(pipe, SEG(sigma=4.0, layers="d0", query_stride="auto")):
        found = run(pipe, latents=latents, num_inference_steps=FORWARDS)
    with guide(pipe, SEG(sigma=4.0, layers="d0")):
        assert torch.equal(run(pipe, latents=latents, num_inference_steps=FORWARDS), found)


@pytest.mark.parametrize("sigma", [0.0, math.inf], ids=str)
@pytest.mark.filterwarnings("ignore:SEG:UserWarning")
def test_no_blur_and_the_mean_query_take_no_notice(sigma: float, tried: list[tuple[int, int]]) -> None:
    pipe, found = tiny_pipeline(), []
    for stride in (1, 3, "auto"):
        with guide(pipe, SEG(sigma=sigma, query_stride=stride)) as guidance:
            found.append(run(pipe, latents=noise()))
        assert {(row.query_stride, row.error) for row in guidance.report().layers} == {(None, None)}
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert tried == []


@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 5.0], ids=["without_cfg", "cfg"])
def test_several_guidances_share_a_layer_each_with_rows_of_its_own(guidance_scale: float) -> None:
    pipe, latents = tiny_pipeline(), noise(*LARGE)
    arguments = {"latents": latents, "num_inference_steps": 4, "guidance_scale": guidance_scale}
    layers = ["d0", "m0"]
    specs = [
        {"sigma": 4.0, "layers": "d0", "query_stride": "auto"},
        {"scale": 1.0, "sigma": 5.0, "layers": layers, "query_stride": (2, 3)},
        {"scale": 1.0, "layers": layers},
        {"scale": 0.5, "sigma": 3.0, "layers": "d0"},
    ]
    with guide(pipe, *(SEG(**{**spec, "query_stride": 1}) for spec in specs)):
        exact = run(pipe, **arguments)
    found = []
    for share in (True, False):
        with guide(pipe, *(SEG(**spec) for spec in specs), share=share) as guidance:
            found.append(run(pipe, **arguments))
    assert relative(*found) < PIPELINE_TOLERANCE
    assert 1e-7 < relative(found[0], exact) < 2e-3
    rows = {(row.spec, row.layer): row for row in guidance.report().layers}
    assert rows[0, "d0"].query_stride[0] > 1
    assert rows[1, "d0"].query_stride == rows[1, "m0"].query_stride == (2, 3)
    assert 0 < rows[1, "d0"].error < 0.01
    assert {rows[key].query_stride for key in ((2, "d0"), (2, "m0"), (3, "d0"))} == {None}


@pytest.mark.filterwarnings("ignore:SEG:UserWarning")
def test_only_perturbed_samples_of_the_guidance_leave_out_rows() -> None:
    pipe, layer = tiny_pipeline(), "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    with guide(pipe, SEG(sigma=4.0, layers="d0", query_stride=4), SEG(sigma=3.0, layers="d0")):
        run(pipe, latents=noise(), num_inference_steps=FORWARDS)
        with spied(pipe.unet.get_submodule(layer)) as seen:
            run(pipe, ["a", "b"], latents=noise(2), num_inference_steps=1)
    assert seen["to_out.0"] == [(4, 64, 32), (2, 9, 32), (2, 64, 32)]
    assert seen["to_q"] == [(4, 64, 32), (2, 9, 32)], "where every row is wanted, the conditional queries are there"
    assert seen["to_k"] == [(4, 64, 32)], "both branches have just joined: their keys are the conditional ones"


@pytest.mark.filterwarnings("ignore:SEG:UserWarning")
def test_leaving_the_context_puts_back_the_very_objects() -> None:
    pipe = tiny_pipeline()
    plain = run(pipe, latents=noise())
    state = State(pipe)
    with guide(pipe, SEG(sigma=2.0, query_stride="auto"), SEG(sigma=2.0, query_stride=2)) as guidance:
        run(pipe, latents=noise(), num_inference_steps=1)
        kept = next(iter(guidance._layers)).processor
    state.assert_same(pipe)
    assert (kept.errors, kept.moved) == ((), None)
    assert torch.equal(run(pipe, latents=noise()), plain)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("stride", [2, "auto"], ids=str)
@pytest.mark.slow
def test_a_compiled_denoiser_settles(stride: Any) -> None:
    pipe, latents, counter = smaller_pipeline(), noise(1, 24, 24), CompileCounter()
    spec = SEG(sigma=4.0, layers="m0", query_stride=stride, tolerance=0.5)
    steps = FORWARDS + 2
    with guide(pipe, spec) as guidance:
        expected = run(pipe, latents=latents, num_inference_steps=steps)
    eager = guidance.report().layers[0]
    assert eager.query_stride[0] > 1
    wrapped(pipe, counter)
    with guide(pipe, spec) as guidance:
        assert relative(run(pipe, latents=latents, num_inference_steps=steps), expected) < PIPELINE_TOLERANCE
        compiled = counter.frame_count
        run(pipe, latents=latents, num_inference_steps=steps)
    layer = guidance.report().layers[0]
    assert layer.query_stride == eager.query_stride
    assert layer.error == pytest.approx(eager.error, rel=1e-3)
    assert counter.frame_count == compiled, "it is compiled again although every choice is made"


def test_the_report_says_stride_and_error() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(sigma=4.0, layers="d0", query_stride=(2, 3)), SEG(layers="d0")) as guidance:
        run(pipe, latents=noise(*LARGE), num_inference_steps=1)
    report = guidance.report()
    strided, plain = report.layers
    assert (strided.query_stride, plain.query_stride, plain.error) == ((2, 3), None, None)
    words = [line.split() for line in str(report).splitlines() if line.split()[:1] == ["d0"]]
    assert [line[3:5] for line in words] == [["2x3", f"{strided.error:.1e}"], ["-", "-"]]
    values = report.to_dict()["layers"]
    assert (values[0]["query_stride"], values[0]["error"]) == ((2, 3), strided.error)
    assert (values[1]["query_stride"], values[1]["error"]) == (None, None)


def test_a_stride_that_loses_the_output_is_a_problem() -> None:
    pipe = tiny_pipeline(own_unet=True)
    sharpen(pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1)
    with problems_warned() as caught, guide(pipe, SEG(sigma=1.0, layers="d0", query_stride=8)) as guidance:
        run(pipe, latents=noise(*LARGE), num_inference_steps=1)
        report = guidance.report()
    assert report.layers[0].error == math.inf
    assert len(caught) == 2, "one with the report, one on leaving"
    assert all("does not tell the rows it leaves out at d0" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("wrong", [0, 1.5, True, (2,), (2, 0), "wide", None], ids=str)
def test_strides_that_say_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"SEG\.query_stride must be 'auto' or a stride") as refusal:
        SEG(query_stride=wrong)
    assert repr(wrong) in str(refusal.value)
    with pytest.raises(ValueError, match="query_stride") as refusal:
        SEGAttnProcessor(1.0, query_stride=wrong)
    assert repr(wrong) in str(refusal.value)


@pytest.mark.parametrize("wrong", [0, -0.1, math.nan, math.inf, True, "small", None], ids=str)
def test_tolerances_that_say_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"SEG\.tolerance must be a positive number") as refusal:
        SEG(tolerance=wrong)
    assert repr(wrong) in str(refusal.value)


def test_a_spec_stays_what_it_was_when_its_callers_list_changes() -> None:
    stride = [2, 3]
    spec = SEG(query_stride=stride)
    stride[0] = 5
    assert spec.query_stride == (2, 3)
    assert hash(spec) == hash(SEG(query_stride=(2, 3)))

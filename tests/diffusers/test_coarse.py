# SPDX-License-Identifier: Apache-2.0
"""Guidance on few query rows: the same result where no layer leaves out rows, and the rows that are spent."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import segkern
from segkern import Grid
from segkern.core.gaussian import BOUNDARIES
from segkern.integrations.diffusers import SEG, SEGAttnProcessor, guide
from tests.diffusers.diffusers_tools import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.test_compile import smaller_pipeline, wrapped
from tests.diffusers.test_lifecycle import State
from tests.diffusers.test_processor import LAYERS, make, spied

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


@pytest.mark.parametrize("sigma", [0.0, math.inf], ids=str)
@pytest.mark.filterwarnings("ignore:SEG:UserWarning")
def test_no_blur_and_the_mean_query_take_no_notice(sigma: float) -> None:
    pipe, outputs = tiny_pipeline(), []
    for stride in (1, 3):
        with guide(pipe, SEG(sigma=sigma, query_stride=stride)):
            outputs.append(run(pipe, latents=noise()))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("guidance_scale", [pytest.param(1.0, marks=pytest.mark.slow), 5.0], ids=["without_cfg", "cfg"])
def test_several_guidances_share_a_layer_each_with_rows_of_its_own(guidance_scale: float) -> None:
    pipe, latents = tiny_pipeline(), noise(*LARGE)
    arguments = {"latents": latents, "num_inference_steps": 4, "guidance_scale": guidance_scale}
    layers = ["d0", "m0"]
    specs = [
        {"sigma": 4.0, "layers": "d0", "query_stride": 3},
        {"scale": 1.0, "sigma": 5.0, "layers": layers, "query_stride": (2, 3)},
        {"scale": 1.0, "layers": layers},
        {"scale": 0.5, "sigma": 3.0, "layers": "d0"},
    ]
    with guide(pipe, *(SEG(**{**spec, "query_stride": 1}) for spec in specs)):
        exact = run(pipe, **arguments)
    outputs = []
    for share in (True, False):
        with guide(pipe, *(SEG(**spec) for spec in specs), share=share):
            outputs.append(run(pipe, **arguments))
    assert relative(*outputs) < PIPELINE_TOLERANCE
    assert 1e-7 < relative(outputs[0], exact) < 2e-3


@pytest.mark.filterwarnings("ignore:SEG:UserWarning")
def test_only_perturbed_samples_of_the_guidance_leave_out_rows() -> None:
    pipe, layer = tiny_pipeline(), "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    with guide(pipe, SEG(sigma=4.0, layers="d0", query_stride=4), SEG(sigma=3.0, layers="d0")):
        run(pipe, latents=noise(), num_inference_steps=1)
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
    with guide(pipe, SEG(sigma=2.0, query_stride=2)) as guidance:
        run(pipe, latents=noise(), num_inference_steps=1)
        kept = next(iter(guidance._layers)).processor
    state.assert_same(pipe)
    assert kept.moved is None
    assert torch.equal(run(pipe, latents=noise()), plain)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.slow
def test_a_compiled_denoiser_settles() -> None:
    pipe, latents, counter = smaller_pipeline(), noise(1, 24, 24), CompileCounter()
    spec = SEG(sigma=4.0, layers="m0", query_stride=2)
    with guide(pipe, spec):
        expected = run(pipe, latents=latents, num_inference_steps=3)
    wrapped(pipe, counter)
    with guide(pipe, spec):
        assert relative(run(pipe, latents=latents, num_inference_steps=3), expected) < PIPELINE_TOLERANCE
        compiled = counter.frame_count
        run(pipe, latents=latents, num_inference_steps=3)
    assert counter.frame_count == compiled, "it is compiled again although nothing changed"


@pytest.mark.parametrize("wrong", [0, 1.5, True, (2,), (2, 0), "wide", None], ids=str)
def test_strides_that_say_nothing_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"SEG\.query_stride must be") as refusal:
        SEG(query_stride=wrong)
    assert repr(wrong) in str(refusal.value)
    with pytest.raises(ValueError, match="query_stride") as refusal:
        SEGAttnProcessor(1.0, query_stride=wrong)
    assert repr(wrong) in str(refusal.value)


def test_a_spec_stays_what_it_was_when_its_callers_list_changes() -> None:
    stride = [2, 3]
    spec = SEG(query_stride=stride)
    stride[0] = 5
    assert spec.query_stride == (2, 3)
    assert hash(spec) == hash(SEG(query_stride=(2, 3)))

# SPDX-License-Identifier: Apache-2.0
"""A guided layer performs diffusers' steps with blurred queries, and no more work than the method needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st

import segkern
from segkern import Grid
from segkern.core.gaussian import BOUNDARIES
from segkern.integrations.diffusers import SEGAttnProcessor
from tests.diffusers.probes import shapes_seen
from tests.diffusers.slow_guidance import Place, dense_attention
from tests.diffusers.small_pipelines import relative

LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"bias": True},
    "group_norm": {"norm_num_groups": 4},
    "residual": {"residual_connection": True, "rescale_output_factor": 1.5},
    "qk_layer_norm": {"qk_norm": "layer_norm"},
    "qk_rms_norm": {"qk_norm": "rms_norm"},
    "unscaled": {"scale_qk": False},
}


def make(kind: str = "plain", seed: int = 0, **more: Any) -> Attention:
    torch.manual_seed(seed)
    return Attention(query_dim=32, heads=2, dim_head=16, **LAYERS[kind], **more).eval()


def by_steps(attn: Any, x: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Perform diffusers' steps one by one with this attention function."""
    residual, shape = x, x.shape
    if x.ndim == 4:
        x = x.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
    q, k, v = (p(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v))
    if attn.norm_q is not None:
        q, k = attn.norm_q(q), attn.norm_k(k)
    x = attn.to_out[0](attend(q, k, v).transpose(1, 2).flatten(2))
    if len(shape) == 4:
        x = x.transpose(1, 2).reshape(shape)
    return (x + residual if attn.residual_connection else x) / attn.rescale_output_factor


def blurred(
    attn: Any, x: torch.Tensor, sigmas: list[float], height: int, width: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the layer with attention by dense float64 matrices."""
    place = Place(height, width)
    return by_steps(attn, x, lambda q, k, v: dense_attention(q, k, v, sigmas, place, mask, attn.scale))


sigmas = st.sampled_from([0.0, 0.6, 2.0, 9.0, math.inf])


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(list(LAYERS)),
    st.lists(sigmas, min_size=1, max_size=4),
    st.integers(1, 9),
    st.integers(1, 9),
    st.booleans(),
    st.booleans(),
)
@torch.no_grad()
def test_the_layer_is_diffusers_layer_with_blurred_queries(
    kind: str, sigmas: list[float], height: int, width: int, image: bool, fused: bool
) -> None:
    attn = make(kind)
    x = torch.randn(len(sigmas), height * width, 32, generator=torch.Generator().manual_seed(1))
    if image:
        x = x.transpose(1, 2).reshape(len(sigmas), 32, height, width)
    expected = blurred(attn, x, sigmas, height, width)
    if fused:
        attn.fuse_projections()
    attn.set_processor(SEGAttnProcessor(sigmas, None if image else Grid(height, width)))
    assert relative(attn(x), expected) < 2e-6


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_without_blur_it_is_the_stock_layer(kind: str) -> None:
    attn, x = make(kind), torch.randn(2, 15, 32)
    stock = attn(x)
    attn.set_processor(SEGAttnProcessor(0.0, Grid(3, 5)))
    assert relative(attn(x), stock) < 1e-6


@pytest.mark.parametrize("sigma", [2.0, math.inf], ids=str)
@pytest.mark.parametrize("rows", [1, 15], ids=["bias_for_keys", "bias_per_query"])
@torch.no_grad()
def test_a_mask_hides_keys_from_blurred_queries(rows: int, sigma: float) -> None:
    attn, x = make(), torch.randn(3, 15, 32)
    bias = torch.where(torch.rand(3, rows, 15) < 0.3, -10000.0, 0.0)
    sigmas = [0.0, sigma, sigma]
    attn.set_processor(SEGAttnProcessor(sigmas, Grid(3, 5)))
    assert relative(attn(x, attention_mask=bias), blurred(attn, x, sigmas, 3, 5, bias[:, None].double())) < 2e-6


@pytest.mark.parametrize("fused", [False, True], ids=["projections", "fused"])
@torch.no_grad()
def test_at_infinity_perturbed_samples_spend_one_query_row(fused: bool) -> None:
    attn, x = make(), torch.randn(5, 63, 32)
    if fused:
        attn.fuse_projections()
    attn.set_processor(SEGAttnProcessor((0, 0, 0, math.inf, math.inf), Grid(7, 9)))
    with shapes_seen(attn) as seen:
        attn(x)
    assert seen["attention"] == [(3, 2, 63, 16), (2, 2, 1, 16)]
    assert seen["keys"] == [(3, 2, 63, 16), (2, 2, 63, 16)]
    assert seen["to_out.0"] == [(3, 63, 32), (2, 1, 32)]
    if not fused:
        assert seen["to_q"] == [(3, 63, 32), (2, 1, 32)]
        assert seen["to_k"] == seen["to_v"] == [(5, 63, 32)]


@torch.no_grad()
def test_a_projection_with_a_hook_is_called_and_not_bypassed() -> None:
    attn, x = make(), torch.randn(3, 63, 32)
    attn.fuse_projections()
    sigmas = [0.0, 0.0, math.inf]
    attn.set_processor(SEGAttnProcessor(sigmas, Grid(7, 9)))
    attn.to_qkv.register_forward_hook(lambda module, args, output: 2 * output)
    for linear in (attn.to_q, attn.to_k, attn.to_v):
        linear.weight.mul_(2)
    assert relative(attn(x), blurred(attn, x, sigmas, 7, 9)) < 2e-6


@torch.no_grad()
def test_tokens_outside_the_grid_are_not_blurred() -> None:
    attn, x = make(), torch.randn(1, 20, 32)
    stock = attn(x)
    attn.set_processor(SEGAttnProcessor(math.inf, Grid(3, 5, start=2)))
    output = attn(x)
    outside = [*range(2), *range(17, 20)]
    assert relative(output[:, outside], stock[:, outside]) < 1e-6
    assert relative(output[:, 2:17], output[:, 2:3].expand(-1, 15, -1)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sigma", [2.0, math.inf], ids=str)
@torch.no_grad()
def test_half_precision_stays_as_close_as_the_stock_layer(dtype: torch.dtype, sigma: float) -> None:
    attn, x = make().to(dtype), torch.randn(3, 63, 32).to(dtype)
    exact = make()
    exact.load_state_dict(attn.state_dict())
    expected = blurred(exact, x.float(), [0.0, 0.0, sigma], 7, 9)
    stock_error = relative(attn(x), exact(x.float()))
    attn.set_processor(SEGAttnProcessor((0, 0, sigma), Grid(7, 9)))
    output = attn(x)
    assert output.dtype == dtype
    assert relative(output, expected) < 2 * stock_error


def test_gradients_flow_through_the_mean_token() -> None:
    attn, x = make(), torch.randn(2, 15, 32, requires_grad=True)
    attn.set_processor(SEGAttnProcessor((0, math.inf), Grid(3, 5)))
    (grad,) = torch.autograd.grad(attn(x).square().sum(), x)
    (expected,) = torch.autograd.grad(blurred(attn, x, [0.0, math.inf], 3, 5).square().sum(), x)
    assert relative(grad, expected) < 1e-5


@settings(max_examples=60)
@given(
    st.sampled_from(list(LAYERS)),
    st.lists(sigmas, min_size=1, max_size=4),
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
    options: dict[str, Any] = {"attn_mask": mask, "boundary": boundary, "query_stride": stride, "scale": attn.scale}
    expected = by_steps(attn, x, lambda q, k, v: segkern.seg_attention(q, k, v, where, sigmas, **options))
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
    with shapes_seen(attn) as seen:
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
    with shapes_seen(attn) as seen:
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


@pytest.mark.parametrize(
    "arguments, quoted",
    [
        ({"sigma": -1.0}, "-1.0"),
        ({"sigma": math.nan}, "nan"),
        ({"sigma": (0.0, -2.0)}, "-2.0"),
        ({"sigma": 1.0, "grid": (3, 5)}, r"\(3, 5\)"),
        ({"sigma": 1.0, "boundary": "zero"}, "'zero'"),
        ({"sigma": 1.0, "backend": "cuda"}, "'cuda'"),
    ],
    ids=str,
)
def test_the_processor_quotes_what_does_not_fit(arguments: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        SEGAttnProcessor(**arguments)


@pytest.mark.parametrize(
    "processor, shape, quoted",
    [
        (SEGAttnProcessor(1.0), (2, 15, 32), "15 tokens needs their grid"),
        (SEGAttnProcessor(1.0, Grid(4, 4)), (2, 15, 32), "only 15 tokens"),
        (SEGAttnProcessor(1.0, Grid(4, 4)), (2, 32, 3, 5), "3 x 5"),
        (SEGAttnProcessor((0.0, 1.0, 1.0), Grid(3, 5)), (2, 15, 32), "batch of 2"),
    ],
    ids=["no_grid", "grid_too_large", "another_grid", "too_many_sigmas"],
)
def test_the_layer_quotes_tokens_that_do_not_fit(processor: Any, shape: tuple[int, ...], quoted: str) -> None:
    attn = make()
    attn.set_processor(processor)
    with pytest.raises(ValueError, match=quoted):
        attn(torch.randn(shape))


def test_cross_attention_is_refused() -> None:
    attn = make(cross_attention_dim=8)
    assert isinstance(attn.processor, AttnProcessor2_0)
    attn.set_processor(SEGAttnProcessor(1.0, Grid(3, 5)))
    with pytest.raises(ValueError, match=r"encoder_hidden_states.*\(2, 7, 8\)"):
        attn(torch.randn(2, 15, 32), encoder_hidden_states=torch.randn(2, 7, 8))

# SPDX-License-Identifier: Apache-2.0
"""The stock pipeline reproduces the numbers of the official implementation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors import safe_open

from segkern import Grid
from segkern.integrations.diffusers import SEG, SEGAttnProcessor, StableDiffusionXLSEGPipeline, guide
from tests.compatibility import proves
from tests.diffusers.small_pipelines import GOLDEN, PIPELINE_TOLERANCE, golden_cases, relative, tiny_pipeline

CASES = golden_cases()
IDS = [
    f"case{i}-{'_'.join(case.get('seg_applied_layers_index') or case['seg_applied_layers'])}"
    for i, case in enumerate(CASES)
]


def split(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the stock pipeline's arguments of a case, and its SEG arguments."""
    stock = {k: v for k, v in case.items() if not k.startswith("seg_") and k not in ("output", "unguided")}
    return {**stock, "output_type": "latent"}, {k: v for k, v in case.items() if k.startswith("seg_")}


def proved(case: dict[str, Any]) -> pytest.MarkDecorator:
    return proves(guidance="SEG at infinity" if case["seg_blur_sigma"] > 9999 else "SEG")


@pytest.mark.one_in(4)
@proves(model="Stable Diffusion XL", task="text to image")
@pytest.mark.parametrize("share", [True, False], ids=["shared", "not_shared"])
@pytest.mark.parametrize("case", [pytest.param(case, marks=proved(case)) for case in CASES], ids=IDS)
def test_guide_reproduces_the_official_latents(case: dict[str, Any], share: bool) -> None:
    """Compares with latents of the official implementation, within the tolerance of float32."""
    stock, seg = split(case)
    sigma = math.inf if seg["seg_blur_sigma"] > 9999 else seg["seg_blur_sigma"]
    layers = seg.get("seg_applied_layers_index") or seg["seg_applied_layers"]
    pipe = tiny_pipeline()
    with guide(pipe, SEG(seg["seg_scale"], sigma, layers), share=share):
        output = pipe(**stock).images
    assert relative(output, case["output"]) < PIPELINE_TOLERANCE
    assert relative(case["unguided"], case["output"]) > 100 * PIPELINE_TOLERANCE, "the case does not detect guidance"


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_official_arguments_reproduce_the_official_latents(case: dict[str, Any]) -> None:
    stock, seg = split(case)
    output = tiny_pipeline(StableDiffusionXLSEGPipeline)(**stock, **seg).images
    assert relative(output, case["output"]) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_after_guidance_the_pipeline_is_the_stock_one(case: dict[str, Any]) -> None:
    stock, _ = split(case)
    pipe = tiny_pipeline()
    with guide(pipe, SEG(layers=["down", "mid", "up"])):
        pipe(**{**stock, "num_inference_steps": 1})
    assert relative(pipe(**stock).images, case["unguided"]) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("index", range(5))
def test_processor_reproduces_the_official_layer(index: int) -> None:
    with safe_open(GOLDEN / "official_processor.safetensors", "pt") as file:
        case = {k.split(".", 1)[1]: file.get_tensor(k) for k in file.keys() if k.startswith(f"{index}.")}  # noqa: SIM118
    hidden_states, heads = case["hidden_states"], int(case["heads"])
    batch, tokens, channels = hidden_states.shape
    attn = Attention(query_dim=channels, heads=heads, dim_head=channels // heads)
    attn.load_state_dict({k.removeprefix("module."): v for k, v in case.items() if k.startswith("module.")})
    sigma = math.inf if case["sigma"] > 9999 else float(case["sigma"])
    parts = (0.0, 0.0, sigma) if case["do_cfg"] else (0.0, sigma)
    sigmas = [s for s in parts for _ in range(batch // len(parts))]
    side = math.isqrt(tokens)
    attn.set_processor(SEGAttnProcessor(sigmas, Grid(side, side)))
    with torch.no_grad():
        output = attn(hidden_states)
    assert (output - case["output"]).abs().max() < 1e-5 * case["output"].abs().max()

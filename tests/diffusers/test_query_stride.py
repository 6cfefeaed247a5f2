# SPDX-License-Identifier: Apache-2.0
"""Guidance with few query rows in a pipeline: same results with shared branches, and each spec skips its own rows."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, SEGAttnProcessor, guide
from tests.diffusers.probes import shapes_seen
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline

LARGE = (1, 64, 64)  # latents whose first layer, d0, has 32x32 tokens


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
    pipe = tiny_pipeline()
    arguments = {"latents": noise(*LARGE), "num_inference_steps": 2, "guidance_scale": guidance_scale}
    layers = ["d0", "m0"]
    specs = [
        {"sigma": 4.0, "layers": "d0", "query_stride": 2},
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


def test_only_perturbed_samples_of_the_guidance_leave_out_rows() -> None:
    pipe, layer = tiny_pipeline(), "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    with (
        guide(pipe, SEG(sigma=4.0, layers="d0", query_stride=4), SEG(sigma=3.0, layers="d0")),
        shapes_seen(pipe.unet.get_submodule(layer)) as seen,
    ):
        run(pipe, ["a", "b"], latents=noise(2), num_inference_steps=1)
    assert seen["to_out.0"] == [(4, 64, 32), (2, 9, 32), (2, 64, 32)]
    assert seen["to_q"] == [(4, 64, 32), (2, 9, 32)], "if every row is needed, the conditional queries are used"
    assert seen["to_k"] == [(4, 64, 32)], "both branches have just joined, so their keys are the conditional ones"


@pytest.mark.parametrize("wrong", [0, 1.5, True, (2,), (2, 0), "wide", None], ids=str)
def test_strides_that_say_nothing_are_refused(wrong: Any) -> None:
    for make in (SEG, lambda **options: SEGAttnProcessor(1.0, **options)):
        with pytest.raises(ValueError, match="query_stride") as refusal:
            make(query_stride=wrong)
        assert repr(wrong) in str(refusal.value)

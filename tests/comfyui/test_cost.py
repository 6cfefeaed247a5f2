# SPDX-License-Identifier: Apache-2.0
"""Operations of a step of Stable Diffusion XL: a perturbed forward pass costs what comes after its first layer."""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from segkern_pack.guidance import add_guidance
from torch.utils.flop_counter import FlopCounterMode

from .comparison import SPECS, unshared

XL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
META = torch.device("meta")  # shapes without values


def conditioning() -> list[dict[str, Any]]:
    """Return conditioning as a sampler prepares it."""
    text, pooled = torch.empty(1, 77, 2048, device=META), torch.empty(1, 2816, device=META)
    return [
        {
            "model_conds": {"c_crossattn": comfy.conds.CONDCrossAttn(text), "y": comfy.conds.CONDRegular(pooled)},
            "uuid": object(),
        }
    ]


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI checks free memory before it joins conditionings and before it splits attention."""

    def free(device: Any, torch_free_too: bool = False) -> Any:
        return (1 << 50, 1 << 50) if torch_free_too else 1 << 50

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)


def operations(guided: Any) -> int:
    """Return the operations of the first step at 1024 x 1024 pixels, which also measures the effect on layers."""
    guided.model.current_patcher = guided
    x, sigma = torch.empty(1, 4, 128, 128, device=META), torch.empty(1, device=META)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        comfy.samplers.sampling_function(
            guided.model, x, sigma, conditioning(), conditioning(), 5.0, model_options=guided.model_options
        )
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def model() -> Any:
    """The real Stable Diffusion XL, without weights."""
    description = comfy.supported_models.SDXL(dict(XL))
    description.set_inference_dtype(torch.float32, None)
    description.custom_operations = None
    return comfy.model_patcher.ModelPatcher(description.get_model({}, "", device=META).to(META), META, META)


def test_a_perturbed_forward_costs_what_comes_after_its_first_layer(model: Any) -> None:
    alone = operations(model)
    middle = add_guidance(model, SPECS["seg inf"], "mid")
    assert 1.32 < operations(middle) / alone < 1.345
    assert 1.49 < operations(unshared(middle)) / alone < 1.505
    assert 1.03 < operations(add_guidance(model, SPECS["pag"], "output.5")) / alone < 1.06

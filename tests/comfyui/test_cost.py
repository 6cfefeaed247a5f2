# SPDX-License-Identifier: Apache-2.0
"""Operations of a step of Stable Diffusion XL: a perturbed forward pass costs what comes after its first layer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from segkern_pack.guidance import add_guidance, describe, guidances_of
from torch.utils.flop_counter import FlopCounterMode

from segkern.integrations.specs import PAG, TPG

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


def free_memory(device: Any, torch_free_too: bool = False) -> Any:
    """ComfyUI checks free memory before it joins conditionings and before it splits attention."""
    return (1 << 50, 1 << 50) if torch_free_too else 1 << 50


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)


def operations(guided: Any, cfg: float = 5.0) -> int:
    """Return the operations of a step at 1024 x 1024 pixels after the first, which also measures guidance's effect."""
    guided.model.current_patcher = guided
    x = torch.empty(1, 4, 128, 128, device=META)
    for _ in range(2):
        sigma = torch.empty(1, device=META)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            comfy.samplers.sampling_function(
                guided.model, x, sigma, conditioning(), conditioning(), cfg, model_options=guided.model_options
            )
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def model() -> Any:
    """The real Stable Diffusion XL, without weights."""
    description = comfy.supported_models.SDXL(dict(XL))
    description.set_inference_dtype(torch.float32, None)
    description.custom_operations = None
    return comfy.model_patcher.ModelPatcher(description.get_model({}, "", device=META).to(META), META, META)


@pytest.fixture(scope="module")
def alone(model: Any) -> int:
    """The operations of classifier-free guidance alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.model_management, "get_free_memory", free_memory)
        return operations(model)


def documented() -> dict[str, tuple[float, float]]:
    """Return the ratios in docs/cost.md, with and without sharing, by layers."""
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (\d\.\d\d) \| (\d\.\d\d) \|$", page.partition("### ComfyUI")[2], re.MULTILINE)
    return {layers: (float(shared), float(full)) for layers, shared, full in rows}


def test_the_default_blocks_of_tpg_are_those_of_its_authors(model: Any) -> None:
    described = describe(model.model.diffusion_model)
    assert described.default_for(TPG()) == "d6-23"
    assert described.default_for(PAG()) == "mid"
    (guidance,) = guidances_of(add_guidance(model, TPG(), "").model_options)
    assert [layer.name for layer in guidance.layers] == [f"d{number}" for number in range(6, 24)]


def test_the_documented_costs_are_those_that_are_counted(model: Any, alone: int) -> None:
    """A perturbed forward pass costs the blocks from its first layer on."""
    counted = {}
    for layers in documented():
        guided = add_guidance(model, SPECS["seg inf"], layers)
        counted[layers] = tuple(round(operations(run) / alone, 2) for run in (guided, unshared(guided)))
    assert set(counted) == {"down", "mid", "up", "output.5"}
    assert counted == documented()


@pytest.mark.parametrize("layers, spec", [("up", "seg 10"), ("mid", "pag")])
def test_finite_blur_and_pag_cost_about_as_much_as_an_infinite_blur(
    model: Any, alone: int, layers: str, spec: str
) -> None:
    assert abs(operations(add_guidance(model, SPECS[spec], layers)) / alone - documented()[layers][0]) < 0.04


def test_the_documented_cost_without_cfg(model: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "cost.md").read_text(encoding="utf-8")
    words = re.search(r"Without CFG, `mid` needs (\S+) times .* and a full extra forward pass (\S+) times", page)
    assert words is not None
    guided, plain = add_guidance(model, SPECS["seg inf"], "mid"), operations(model, 1.0)
    assert [f"{operations(run, 1.0) / plain:.2f}" for run in (guided, unshared(guided))] == list(words.groups())

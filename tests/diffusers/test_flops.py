# SPDX-License-Identifier: Apache-2.0
"""The cost of guidance in floating-point operations, counted without data on Stable Diffusion XL's configuration."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import sdxl, steps
from benchmarks.sdxl import SDXL
from benchmarks.steps import Way
from segkern.integrations.diffusers import list_layers
from segkern.ops import flops  # noqa: F401  the counter knows our operators by it
from tests.project import benchmark_tools  # noqa: F401  benchmarks/ is no installed package

CFG, PLAIN = Way("", "plain", True), Way("", "plain", False)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return sdxl.pipeline(sdxl.denoiser(SDXL, "meta", torch.float16))


@pytest.fixture(scope="module")
def parts(pipe: Any) -> dict[str, int]:
    """Return the operations of one sample by module."""
    with FlopCounterMode(display=False) as counter:
        sdxl.forward(pipe, SDXL, 1.0)
    name = type(pipe.unet).__name__
    return {
        module.removeprefix(name).removeprefix("."): sum(counts.values())
        for module, counts in counter.get_flop_counts().items()
    }


@functools.lru_cache
def guided(pipe: Any, layers: str, sigma: float, cfg: bool = True, share: bool = True) -> float:
    return steps.count(pipe, SDXL, Way("", "segkern", cfg, sigma, (layers,), share=share))


@functools.lru_cache
def plain(pipe: Any, cfg: bool = True) -> float:
    return steps.count(pipe, SDXL, CFG if cfg else PLAIN)


@pytest.mark.slow
def test_the_configuration_is_sdxls(pipe: Any) -> None:
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == 2_567_463_684
    assert plain(pipe, cfg=False) == pytest.approx(6.76e12, rel=1e-3)
    assert plain(pipe) == 2 * plain(pipe, cfg=False)
    assert [layer.part for layer in list_layers(pipe)].count("up") == 36


@pytest.mark.parametrize(
    ("sigma", "cfg", "most"),
    [
        (10.0, True, 1.345),
        pytest.param(10.0, False, 1.69, marks=pytest.mark.slow),
        pytest.param(math.inf, True, 1.333, marks=pytest.mark.slow),
        pytest.param(math.inf, False, 1.666, marks=pytest.mark.slow),
    ],
)
def test_guidance_of_the_middle_costs_a_third_of_cfg(pipe: Any, sigma: float, cfg: bool, most: float) -> None:
    assert 1 < guided(pipe, "mid", sigma, cfg) / plain(pipe, cfg) <= most


@pytest.mark.slow
def test_without_sharing_a_branch_costs_a_forward(pipe: Any) -> None:
    assert guided(pipe, "mid", 1.0, share=False) / plain(pipe) == pytest.approx(1.5, abs=1e-3)


# Names of modules that a branch need not run, by the layer at which it starts.
_ENTRY = ["conv_in", "time_embedding", "add_embedding"]
_DOWN = [*_ENTRY, "down_blocks.0", "down_blocks.1", "down_blocks.2"]
BEFORE = {
    "m0": [*_DOWN, "mid_block.resnets.0"],
    "m5": [*_DOWN, "mid_block.resnets.0", *(f"mid_block.attentions.0.transformer_blocks.{i}" for i in range(5))],
    "u0": [*_DOWN, "mid_block", "up_blocks.0.resnets.0"],
    "u13": [
        *_DOWN,
        "mid_block",
        *(f"up_blocks.0.{part}" for part in ("resnets.0", "attentions.0", "resnets.1")),
        *(f"up_blocks.0.attentions.1.transformer_blocks.{i}" for i in range(3)),
    ],
    "d5": [
        *(name for name in _DOWN if name != "down_blocks.2"),
        "down_blocks.2.resnets.0",
        "down_blocks.2.attentions.0.transformer_blocks.0",
    ],
}


@pytest.mark.parametrize(("layer", "cfg"), [*((layer, True) for layer in BEFORE), ("m5", False)])
@pytest.mark.slow
def test_a_branch_costs_what_comes_after_its_first_layers_inputs(
    layer: str, cfg: bool, pipe: Any, parts: dict[str, int]
) -> None:
    """Checks the bound for each branch: everything from the first perturbed attention on, with a finite blur."""
    (first,) = [info for info in list_layers(pipe) if info.name == layer]
    projections = sum(parts[f"{first.module}.{name}"] for name in ("to_q", "to_k", "to_v"))
    bound = parts[""] - sum(parts[name] for name in BEFORE[layer]) - projections
    # The time embedding is the pipeline's, but every resnet projects it when it runs.
    extra = guided(pipe, layer, 3.0, cfg) - plain(pipe, cfg)
    (located,) = [info for info in list_layers(pipe, 1024, 1024) if info.name == layer]
    assert located.grid is not None
    channels = located.heads * located.head_dim
    blur = 2 * channels * located.grid.tokens * (located.grid.height + located.grid.width)
    assert extra == bound + blur


@pytest.mark.slow
def test_at_infinity_layers_project_one_query_row(pipe: Any, parts: dict[str, int]) -> None:
    finite, infinite = (guided(pipe, "mid", sigma) for sigma in (10.0, math.inf))
    layers = [layer for layer in list_layers(pipe, 1024, 1024) if layer.part == "mid"]
    saved = 0
    for layer in layers:
        assert layer.grid is not None
        tokens, channels = layer.grid.tokens, layer.heads * layer.head_dim
        rows = tokens - 1
        saved += 2 * rows * channels * channels * 2 + 4 * rows * tokens * channels
        saved += 2 * channels * tokens * (layer.grid.height + layer.grid.width)
    first = layers[0]
    saved -= parts[f"{first.module}.to_q"]  # shared with a finite sigma; a separate single row with infinite sigma
    assert finite - infinite == pytest.approx(saved, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [True, False], ids=["CFG", "without CFG"])
def test_identity_attention_saves_the_attention_and_later_layers_queries_and_keys(
    cfg: bool, pipe: Any, parts: dict[str, int]
) -> None:
    """Compared with a blur in the same layers. Queries and keys of the first layer are shared in both cases."""
    blurred = guided(pipe, "mid", 10.0, cfg)
    identity = steps.count(pipe, SDXL, Way("", "segkern", cfg, layers=("mid",), family="PAG"))
    saved = 0
    for number, layer in enumerate(layer for layer in list_layers(pipe, 1024, 1024) if layer.part == "mid"):
        assert layer.grid is not None
        tokens, channels = layer.grid.tokens, layer.heads * layer.head_dim
        saved += 4 * tokens * tokens * channels + 2 * channels * tokens * (layer.grid.height + layer.grid.width)
        saved += 0 if number == 0 else parts[f"{layer.module}.to_q"] + parts[f"{layer.module}.to_k"]
    assert blurred - identity == saved

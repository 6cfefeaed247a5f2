# SPDX-License-Identifier: Apache-2.0
"""A branch joins at its first layer's transformer block, for every layer, and the prediction does not change."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from segkern.integrations.diffusers import SEG, guide, list_layers
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline


def deep_unet() -> Any:
    """Return a UNet with two transformer blocks in most transformers and two transformers in every block."""
    torch.manual_seed(0)
    config = {
        **tiny_pipeline().unet.config,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel.from_config(config).eval()


UNET = deep_unet()
LAYERS = [layer.name for layer in list_layers(UNET)]


@contextmanager
def batch_sizes(unet: Any) -> Iterator[dict[str, set[int]]]:
    """Collect the numbers of samples with which resnets and transformer blocks run."""
    seen: dict[str, set[int]] = {}

    def watch(name: str, module: Any) -> Any:
        def note(module: Any, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            seen.setdefault(name, set()).add(len(out))

        return module.register_forward_hook(note)

    parts = [(n, m) for n, m in unet.named_modules() if n.split(".")[-2:-1] in (["resnets"], ["transformer_blocks"])]
    handles = [watch(name, module) for name, module in parts]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# The first of each part, the second of two in a transformer and of two transformers, and the last of all.
@pytest.mark.parametrize("layer", ["d0", "d3", "m1", "u0", LAYERS[-1]])
def test_what_comes_before_the_first_layer_runs_on_the_pipelines_own_batch(layer: str) -> None:
    pipe, latents = tiny_pipeline(unet=UNET), noise(1, 8, 12)
    module = next(info.module for info in list_layers(pipe) if info.name == layer)
    spec = SEG(2.0, 1.0, layer)
    with guide(pipe, spec), batch_sizes(UNET) as seen:
        shared = run(pipe, latents=latents, num_inference_steps=1)
    order = list(seen)  # execution order
    first = order.index(module.removesuffix(".attn1"))
    assert [seen[name] for name in order[:first]] == [{2}] * first
    assert [seen[name] for name in order[first:]] == [{3}] * (len(order) - first)
    with guide(pipe, spec, share=False):
        whole = run(pipe, latents=latents, num_inference_steps=1)
    assert relative(shared, whole) < PIPELINE_TOLERANCE
    assert relative(shared, run(pipe, latents=latents, num_inference_steps=1)) > 1e-5


specs = st.builds(
    SEG,
    scale=st.sampled_from([-1.0, 0.5, 2.0]),
    sigma=st.sampled_from([0.7, 2.0, math.inf]),
    layers=st.lists(st.sampled_from(LAYERS), min_size=1, max_size=3),
)


@settings(max_examples=8)
@given(st.lists(specs, min_size=1, max_size=3), st.sampled_from([1.0, 4.0]), st.integers(1, 2), st.booleans())
def test_any_guidances_share_what_they_can(chosen: list[SEG], scale: float, images: int, freeu: bool) -> None:
    pipe = tiny_pipeline(unet=UNET)
    arguments: dict[str, Any] = {"latents": noise(images, 8, 12), "guidance_scale": scale, "num_inference_steps": 1}
    arguments["prompt"] = ["a lake", "a fox"][:images]
    if freeu:
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.3, b2=1.4)
    try:
        outputs = []
        for share in (True, False):
            with guide(pipe, *chosen, share=share):
                outputs.append(run(pipe, **arguments))
    finally:
        pipe.disable_freeu()
    assert relative(*outputs) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("layer", ["m1", "u4"])
def test_a_controlnet_runs_once_for_all_branches(layer: str) -> None:
    controlnet = ControlNetModel.from_unet(UNET, conditioning_channels=3).eval()
    controlnet.controlnet_cond_embedding = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)  # the tiny VAE's factor
    for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.2)  # a new ControlNet's residuals are zero
    pipe = tiny_pipeline(StableDiffusionXLControlNetPipeline, unet=UNET, controlnet=controlnet)
    sizes: list[int] = []
    handle = controlnet.register_forward_hook(lambda m, args, out: sizes.append(len(out[1])))
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    call = {"image": image, "latents": noise(1, 16, 24), "num_inference_steps": 1, "guidance_scale": 4.0}
    call |= {"height": 32, "width": 48, "output_type": "latent"}
    outputs = []
    for share in (True, False):
        with guide(pipe, SEG(2.0, 1.0, layer), share=share):
            outputs.append(pipe("a red fox", **call).images)
    plain = pipe("a red fox", **call).images
    handle.remove()
    assert sizes == [2, 2, 2]
    assert relative(*outputs) < PIPELINE_TOLERANCE
    assert relative(outputs[0], plain) > 1e-5


def test_blocks_that_are_not_known_are_joined_as_a_whole() -> None:
    """A subclass may run its parts in another order."""
    unet = deep_unet()
    unet.mid_block.__class__ = type("Other", (type(unet.mid_block),), {})
    pipe, latents = tiny_pipeline(unet=unet), noise()
    outputs = []
    for share in (True, False):
        with guide(pipe, SEG(2.0, 1.0, "m1"), share=share), batch_sizes(unet) as seen:
            outputs.append(run(pipe, latents=latents, num_inference_steps=1))
        assert seen["mid_block.resnets.0"] == {3}
    assert seen["down_blocks.0.resnets.0"] == {3}
    assert relative(*outputs) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("sigma", [1.0, math.inf], ids=str)
def test_up_blocks_of_other_types_get_skip_connections_of_the_whole_batch(sigma: float) -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(
        {**UNET.config, "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("AttnUpBlock2D",)}
    )
    pipe, latents = tiny_pipeline(unet=unet.eval()), noise(1, 8, 12)
    outputs = []
    for share in (True, False):
        with guide(pipe, SEG(2.0, sigma, "m1"), share=share), batch_sizes(unet) as seen:
            outputs.append(run(pipe, latents=latents, num_inference_steps=1))
    assert seen["up_blocks.2.resnets.0"] == {3}
    assert relative(*outputs) < PIPELINE_TOLERANCE
    assert relative(outputs[0], run(pipe, latents=latents, num_inference_steps=1)) > 1e-5

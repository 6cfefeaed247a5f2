# SPDX-License-Identifier: Apache-2.0
"""Layers are found by official names, module names and globs. Specs refuse invalid names."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from segkern import Grid
from segkern.integrations.diffusers import PAG, SEG, LayerInfo, guide, list_layers
from segkern.integrations.diffusers.models.layers import select_layers
from tests.diffusers.small_pipelines import noise, run, tiny_pipeline
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_task_cases import TASKS
from tests.diffusers.unet_image_cases import IMAGES
from tests.diffusers.unet_video_cases import MOTION

MID = "mid_block.attentions.0.transformer_blocks"


def selected(layers: str | list[str]) -> list[str]:
    return [layer.name for layer in select_layers(list_layers(tiny_pipeline()), layers)]


def test_layers_are_counted_per_part_in_module_order() -> None:
    layers = list_layers(tiny_pipeline())
    assert [layer.name for layer in layers] == [
        *(f"d{i}" for i in range(6)),
        *(f"m{i}" for i in range(2)),
        *(f"u{i}" for i in range(9)),
    ]
    assert layers[7] == LayerInfo("m1", f"{MID}.1.attn1", "mid", heads=2, head_dim=16, grid=None, comfyui="m0.1")


BUILT: dict[str, Callable[[], Any]] = {
    **{name: model.build for name, model in MODELS.items()},
    **{name: task.build for name, task in TASKS.items()},
    **{name: partial(case.build, case) for name, case in {**IMAGES, **MOTION}.items()},
}


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", BUILT)
def test_guide_takes_every_layer_that_is_listed(name: str) -> None:
    pipe = BUILT[name]()
    names = [layer.name for layer in list_layers(pipe)]
    assert names
    guide(pipe, SEG(layers=names)).remove()


def test_layers_that_attend_to_text_are_not_listed() -> None:
    """In blocks with only cross-attention, as in Stable Diffusion's upscalers, ``attn1`` attends to text."""
    config = {**tiny_pipeline().unet.config, "only_cross_attention": [False, True, False]}
    pipe = tiny_pipeline(unet=UNet2DConditionModel.from_config(config).eval())
    every = {name for name, _ in pipe.unet.named_modules() if name.endswith(".attn1")}
    layers = list_layers(pipe)
    left_out = every - {layer.module for layer in layers}
    assert left_out
    assert all(pipe.unet.get_submodule(name).is_cross_attention for name in left_out)
    of_up = [layer.name for layer in layers if layer.part == "up"]
    assert of_up == [f"u{i}" for i in range(len(of_up))]
    with guide(pipe, SEG(layers=[layer.name for layer in layers])) as guidance:
        run(pipe, latents=noise())
    assert all(layer.fired == 3 for layer in guidance.report().layers)


def test_a_layer_that_was_changed_is_listed_and_refused_with_its_reason() -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.get_submodule(f"{MID}.0.attn1").set_processor(IPAdapterAttnProcessor2_0(8, 8))
    assert "m0" in [layer.name for layer in list_layers(pipe)]
    with pytest.raises(ValueError, match=r"m0 .*IPAdapterAttnProcessor2_0, which is not standard self-attention"):
        guide(pipe, SEG())


def test_sdxl_has_the_official_layers() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    layers = {layer.name: layer for layer in list_layers(unet)}
    counts = {part: sum(layer.part == part for layer in layers.values()) for part in ("down", "mid", "up")}
    assert counts == {"down": 24, "mid": 10, "up": 36}
    assert {layer.head_dim for layer in layers.values()} == {64}
    assert [layers[name].heads for name in ("d3", "d4", "m0", "u29", "u30")] == [10, 20, 20, 20, 10]


@pytest.mark.parametrize(
    "layers, names",
    [
        ("mid", ["m0", "m1"]),
        (["up", "d1"], ["d1", *(f"u{i}" for i in range(9))]),
        ("d4", ["d4"]),
        ("u2-4", ["u2", "u3", "u4"]),
        ("u2-u4", ["u2", "u3", "u4"]),
        (["m0", "m0", "mid"], ["m0", "m1"]),
        ("mid_block", ["m0", "m1"]),
        (f"{MID}.1", ["m1"]),
        (f"{MID}.1.attn1", ["m1"]),
        ("down_blocks.1", ["d0", "d1"]),
        ("*.transformer_blocks.1.*", ["d3", "d5", "m1", "u1", "u3", "u5"]),
        ("up_blocks.[1-9].*", ["u6", "u7", "u8"]),
    ],
    ids=str,
)
def test_names_select_layers_in_execution_order(layers: str | list[str], names: list[str]) -> None:
    assert selected(layers) == names


@settings(max_examples=8)
@given(st.integers(3, 40), st.integers(3, 40))
def test_listed_grids_are_those_of_the_run(height: int, width: int) -> None:
    pipe = tiny_pipeline()
    seen: dict[str, Grid] = {}
    handles = []
    for name, module in pipe.unet.named_modules():
        if isinstance(module, Transformer2DModel):

            def note(module: Any, args: Any, name: str = name) -> None:
                seen[name] = Grid(*args[0].shape[2:])

            handles.append(module.register_forward_pre_hook(note))
    pipe.vae_scale_factor = 8  # like SDXL's, so that latents of any size correspond to whole pixels
    run(pipe, latents=noise(1, height, width), num_inference_steps=1, guidance_scale=1.0)
    for handle in handles:
        handle.remove()
    for layer in list_layers(pipe, 8 * height, 8 * width):
        assert layer.grid == seen[layer.module.split(".transformer_blocks")[0]], layer


@pytest.mark.parametrize(
    "arguments, quoted",
    [
        ((torch.nn.Linear(1, 1),), "Linear"),
        (("unet",), "str"),
        ((tiny_pipeline(), 64), "width=None"),
        ((tiny_pipeline().unet, 64, 64), "bare UNet2DConditionModel"),
    ],
    ids=["module", "string", "height_alone", "pixels_without_vae"],
)
def test_list_layers_says_what_it_cannot_list(arguments: tuple[Any, ...], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        list_layers(*arguments)


@pytest.mark.parametrize(
    "arguments, quoted",
    [
        ({"scale": math.nan}, "nan"),
        ({"scale": math.inf}, "inf"),
        ({"scale": "3"}, "'3'"),
        ({"sigma": -1.0}, "-1.0"),
        ({"sigma": math.nan}, "nan"),
        ({"sigma": (0.0, -1.0)}, r"\(0.0, -1.0\)"),
        ({"start": -0.1}, "start=-0.1"),
        ({"stop": 1.1}, "stop=1.1"),
        ({"start": 0.5, "stop": 0.5}, "start=0.5, stop=0.5"),
        ({"start": math.nan}, "start=nan"),
        ({"boundary": "zero"}, "'zero'"),
        ({"backend": "cuda"}, "'cuda'"),
        ({"layers": []}, r"\[\]"),
        ({"layers": [4, -1]}, r"\[4, -1\]"),
        ({"layers": 4.0}, "4.0"),
        ({"layers": True}, "True"),
        ({"layers": range(4, 4)}, r"range\(4, 4\)"),
        ({"layers": [range(0, 9, 2)]}, r"range\(0, 9, 2\)"),
    ],
    ids=str,
)
def test_a_spec_quotes_what_does_not_fit(arguments: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        SEG(**arguments)


def test_an_adaptive_scale_is_no_negative_number() -> None:
    with pytest.raises(ValueError, match=r"PAG.adaptive_scale must be 0 or a positive number, got -1.0"):
        PAG(adaptive_scale=-1.0)


def test_a_spec_does_not_change_with_the_list_it_was_made_from() -> None:
    layers, stride = ["mid"], [2, 3]
    spec = SEG(sigma=4.0, layers=layers, query_stride=stride)
    layers.append("up")
    stride[0] = 5
    assert (spec.layers, spec.query_stride) == (("mid",), (2, 3))
    assert hash(spec) == hash(SEG(sigma=4.0, layers=["mid"], query_stride=(2, 3)))


@pytest.mark.parametrize(
    "spec, fraction, active",
    [
        (SEG(), 0.0, True),
        (SEG(), 0.999, True),
        (SEG(start=0.25, stop=0.75), 0.25, True),
        (SEG(start=0.25, stop=0.75), 0.75, False),
        (SEG(start=0.25), 0.2, False),
        (SEG(scale=0.0), 0.5, False),
        (SEG(sigma=0.0), 0.5, False),
        (SEG(scale=-1.0), 0.5, True),
    ],
    ids=str,
)
def test_a_spec_acts_from_start_until_before_stop_unless_it_does_nothing(
    spec: SEG, fraction: float, active: bool
) -> None:
    assert spec.active(fraction) is active

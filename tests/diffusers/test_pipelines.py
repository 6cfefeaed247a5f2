# SPDX-License-Identifier: Apache-2.0
"""Other pipelines are guided too: other tasks, residuals from outside, offloading, official scripts."""

from __future__ import annotations

import inspect
import math
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)

from segkern.integrations.diffusers import SEG, StableDiffusionXLSEGPipeline, guide
from tests.compatibility import proves
from tests.diffusers.probes import batches_seen
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.unet_cases import ip_adapter_weights

SIZE = 64  # pixels; the latents are 32 x 32


def guided_both_ways(pipe: Any, specs: list[SEG], **arguments: Any) -> tuple[torch.Tensor, dict[str, set[int]]]:
    """Latents guided with shared branches, checked against every branch in full, and the batches seen."""
    defaults = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}

    def once() -> torch.Tensor:
        return pipe("a red fox", generator=torch.manual_seed(0), **{**defaults, **arguments}).images

    outputs = []
    with guide(pipe, *specs):
        seen = batches_seen(pipe, lambda: outputs.append(once()))
    with guide(pipe, *specs, share=False):
        outputs.append(once())
    assert relative(outputs[0], outputs[1]) < PIPELINE_TOLERANCE
    assert relative(once(), outputs[0]) > 1e-3, "the case would not notice guidance"
    return outputs[0], seen


def image(channels: int = 3) -> torch.Tensor:
    return torch.rand(1, channels, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


@proves(model="Stable Diffusion XL", task="image to image", guidance="SEG at infinity")
def test_image_to_image() -> None:
    """Shared branches against every branch in full."""
    _, seen = guided_both_ways(
        tiny_pipeline(StableDiffusionXLImg2ImgPipeline),
        [SEG()],
        image=image(),
        strength=0.7,
        num_inference_steps=5,
    )
    assert (seen["down_blocks.2"], seen["up_blocks.0"]) == ({2}, {3})


def test_image_to_image_counts_the_steps_it_takes() -> None:
    pipe = tiny_pipeline(StableDiffusionXLImg2ImgPipeline)
    with guide(pipe, SEG(start=0.5)) as guidance:
        pipe("a", image=image(), strength=0.4, num_inference_steps=10, output_type="latent")
    report = guidance.report()
    assert (report.forwards, report.layers[0].fired) == (4, 2)


@proves(model="Stable Diffusion XL", task="inpainting", guidance="SEG")
def test_inpainting() -> None:
    """Shared branches against every branch in full."""
    mask = torch.zeros(1, 1, SIZE, SIZE)
    mask[:, :, 16:48, 8:40] = 1.0
    _, seen = guided_both_ways(
        tiny_pipeline(StableDiffusionXLInpaintPipeline),
        [SEG(sigma=2.0)],
        image=image(),
        mask_image=mask,
        height=SIZE,
        width=SIZE,
        strength=0.9,
    )
    assert (seen["down_blocks.2"], seen["up_blocks.0"]) == ({2}, {3})


def _controlled() -> Any:
    torch.manual_seed(0)
    unet = tiny_pipeline().unet
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
    # Its pixels are reduced 8 times before they meet the latents, here only 2 times.
    controlnet.controlnet_cond_embedding = torch.nn.Conv2d(3, 16, 3, stride=2, padding=1)
    for block in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]:
        torch.nn.init.normal_(block.weight, std=0.2)  # a new ControlNet's residuals are zero
    return tiny_pipeline(StableDiffusionXLControlNetPipeline, controlnet=controlnet.eval())


INFINITE, FINITE = proves(guidance="SEG at infinity"), proves(guidance="SEG")


@proves(model="Stable Diffusion XL", task="ControlNet")
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0], ids=["without_cfg", "cfg"])
@pytest.mark.parametrize(
    "specs, down, mid",
    [
        pytest.param([SEG()], 0, 1, marks=INFINITE),
        pytest.param([SEG(layers="up")], 0, 0, marks=INFINITE),
        pytest.param([SEG(layers="up"), SEG(sigma=2.0, layers="mid")], 0, 1, marks=FINITE),
        pytest.param([SEG(layers="d0")], 1, 1, marks=INFINITE),
        pytest.param([SEG(layers="mid"), SEG(sigma=2.0, layers="d2")], 2, 2, marks=FINITE),
    ],
    ids=["mid", "up", "up_and_mid", "down", "mid_and_down"],
)
def test_controlnet_residuals_meet_the_batch_they_are_added_to(
    specs: list[SEG], down: int, mid: int, guidance_scale: float
) -> None:
    """Shared branches against every branch in full; the control image makes a difference."""
    pipe = _controlled()
    plain = 1 if guidance_scale == 1.0 else 2
    output, seen = guided_both_ways(pipe, specs, image=image(), guidance_scale=guidance_scale)
    assert seen["down_blocks.0"] == {plain + down}
    assert seen["mid_block"] == {plain + mid}
    assert seen["up_blocks.2"] == {plain + len(specs)}
    with guide(pipe, *specs):
        uncontrolled = pipe(
            "a red fox",
            image=image(),
            controlnet_conditioning_scale=0.0,
            generator=torch.manual_seed(0),
            num_inference_steps=3,
            guidance_scale=guidance_scale,
            output_type="latent",
        ).images
    assert relative(output, uncontrolled) > 1e-3, "the residuals must matter"


def test_controlnet_in_guess_mode() -> None:
    guided_both_ways(_controlled(), [SEG()], image=image(), guess_mode=True)


def _adapted() -> Any:
    torch.manual_seed(0)
    adapter = T2IAdapter(channels=[16, 32, 32, 32], downscale_factor=4, adapter_type="full_adapter_xl").eval()
    return tiny_pipeline(StableDiffusionXLAdapterPipeline, adapter=adapter)


@proves(model="Stable Diffusion XL", task="T2I-Adapter", guidance="SEG at infinity")
@pytest.mark.parametrize("layers", ["d2", "mid", "up"])
def test_t2i_adapter_residuals_are_added_to_every_branch(layers: str) -> None:
    """Shared branches against every branch in full; the control image makes a difference."""
    pipe = _adapted()
    arguments = {"image": image(), "height": SIZE, "width": SIZE}
    output, seen = guided_both_ways(pipe, [SEG(layers=layers)], **arguments)
    assert seen["conv_in"] == {3}
    with guide(pipe, SEG(layers=layers)):
        without = pipe(
            "a red fox",
            **arguments,
            adapter_conditioning_scale=0.0,
            generator=torch.manual_seed(0),
            num_inference_steps=3,
            guidance_scale=5.0,
            output_type="latent",
        ).images
    assert relative(output, without) > 1e-3, "the residuals must matter"


def test_steps_without_the_t2i_adapter_share_again() -> None:
    _, seen = guided_both_ways(
        _adapted(), [SEG()], image=image(), height=SIZE, width=SIZE, adapter_conditioning_factor=0.4
    )
    assert seen["conv_in"] == {2, 3}


@proves(model="Stable Diffusion XL", task="IP-Adapter", guidance="SEG at infinity")
@pytest.mark.parametrize("layers", ["d2", "mid"])
def test_ip_adapter_tokens_reach_every_branch(layers: str) -> None:
    """Shared branches against every branch in full; the image prompt makes a difference."""
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    embeds = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))  # unconditional and conditional
    arguments = {"height": SIZE, "width": SIZE, "num_images_per_prompt": 2}
    output, seen = guided_both_ways(pipe, [SEG(layers=layers)], **arguments, ip_adapter_image_embeds=[embeds])
    assert (seen["down_blocks.1"], seen["up_blocks.0"]) == ({4}, {6})
    other, _ = guided_both_ways(pipe, [SEG(layers=layers)], **arguments, ip_adapter_image_embeds=[-embeds])
    assert relative(output, other) > 1e-3, "the image must matter"


def test_loading_an_ip_adapter_while_guided() -> None:
    pipe = tiny_pipeline(own_unet=True)
    arguments = {
        "latents": noise(),
        "ip_adapter_image_embeds": [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(1))],
    }
    guidance = guide(pipe, SEG())
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])
    output = run(pipe, **arguments)
    guidance.remove()
    with guide(pipe, SEG()):
        assert relative(run(pipe, **arguments), output) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("how", ["whole_models", "module_by_module"])
def test_offloading(how: str) -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
    if how == "whole_models":
        _, hook = accelerate.cpu_offload_with_hook(pipe.unet, execution_device="cpu")
    else:
        accelerate.cpu_offload(pipe.unet, execution_device="cpu")
        assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
    with guide(pipe, SEG()) as guidance:
        assert torch.equal(run(pipe, latents=latents), expected)
        pipe.fuse_qkv_projections() if how == "whole_models" else None
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    assert guidance.report().layers[0].fired == 6
    if how == "whole_models":
        hook.remove()


def test_freeu_and_guidance_go_together() -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    guided_both_ways(pipe, [SEG(sigma=2.0)], height=SIZE, width=SIZE)


def official(seg: dict[str, Any]) -> torch.Tensor:
    return run(tiny_pipeline(StableDiffusionXLSEGPipeline), latents=noise(), **seg)


def ours(*specs: SEG) -> torch.Tensor:
    pipe = tiny_pipeline()
    if not specs:
        return run(pipe, latents=noise())
    with guide(pipe, *specs):
        return run(pipe, latents=noise())


@pytest.mark.parametrize(
    "seg, specs",
    [
        ({}, [SEG(3.0, math.inf, "mid")]),
        ({"seg_blur_sigma": 9999.1}, [SEG()]),
        ({"seg_blur_sigma": 9999.0}, [SEG(sigma=9999.0)]),
        (
            {"seg_scale": 2.0, "seg_blur_sigma": 1.0, "seg_applied_layers": ["down", "up"]},
            [SEG(2.0, 1.0, ["down", "up"])],
        ),
        ({"seg_applied_layers_index": ["d4", "m0", "u2"]}, [SEG(layers=["d4", "m0", "u2"])]),
        ({"seg_applied_layers_index": [], "seg_applied_layers": ["up"]}, [SEG(layers="up")]),
        ({"seg_applied_layers": "mid"}, [SEG()]),
        ({"seg_scale": 0.0}, []),
        ({"seg_scale": -1.0}, []),
        ({"seg_applied_layers": []}, []),
        ({"seg_applied_layers": None, "seg_applied_layers_index": None}, []),
    ],
    ids=str,
)
def test_official_arguments_mean_what_they_meant(seg: dict[str, Any], specs: list[SEG]) -> None:
    assert torch.equal(official(seg), ours(*specs))


@pytest.mark.parametrize(
    "seg, quoted",
    [
        ({"seg_applied_layers": ["middle"]}, "'middle'"),
        ({"seg_applied_layers_index": ["u99"]}, "'u99'"),
        ({"seg_blur_sigma": -1.0}, "-1.0"),
        ({"seg_scale": math.nan}, "nan"),
    ],
    ids=str,
)
def test_official_arguments_that_do_not_fit_are_quoted(seg: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        official(seg)


def test_the_official_pipeline_is_the_stock_one_with_more_arguments() -> None:
    stock = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    seg = inspect.signature(StableDiffusionXLSEGPipeline.__call__).parameters
    added = {"seg_scale", "seg_blur_sigma", "seg_applied_layers", "seg_applied_layers_index"}
    assert list(stock) == [name for name in seg if name not in added]
    assert added == set(seg) - set(stock)
    assert "a red fox" in (StableDiffusionXLSEGPipeline.__doc__ or "")


def test_the_official_pipeline_takes_positional_arguments_and_returns_tuples() -> None:
    pipe = tiny_pipeline(StableDiffusionXLSEGPipeline)
    processors = dict(pipe.unet.attn_processors)
    arguments = {"latents": noise(), "num_inference_steps": 3, "output_type": "latent"}
    as_tuple = pipe("a red fox", None, 32, 32, **arguments, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], pipe(prompt="a red fox", height=32, width=32, **arguments).images)
    assert all(pipe.unet.attn_processors[name] is processors[name] for name in processors)


def test_the_official_pipeline_is_made_from_a_stock_one() -> None:
    pipe = StableDiffusionXLSEGPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe, latents=noise()), ours(SEG()))

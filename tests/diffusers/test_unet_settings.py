# SPDX-License-Identifier: Apache-2.0
"""UNet tasks with more than one call: other sizes, LoRA, videos; and refused settings."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import lru_cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, SLG, TPG, guide, list_layers
from tests.diffusers.probes import batches_seen, hooks_of
from tests.diffusers.slow_guidance import Perturbed, self_attentions, unet_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.unet_cases import Case, run
from tests.diffusers.unet_image_cases import IMAGES
from tests.diffusers.unet_video_cases import MOTION


@lru_cache(maxsize=8)
def built(name: str) -> tuple[Case, Any]:
    case = {**IMAGES, **MOTION}[name]
    return case, case.build(case)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_the_size_changes_between_calls(name: str) -> None:
    """One guidance object serves all sizes."""
    case, pipe = built(name)
    sizes = ((8, 12), (12, 8), (12, 20))
    modules = self_attentions(pipe.unet, ("mid_block.*",))
    with guide(pipe, SEG(2.0, 1.5)):
        guided = [run(replace(case, size=size), pipe, True) for size in (*sizes, (8, 12))]
    for size, output in zip(sizes, guided, strict=False):
        resized = replace(case, size=size)
        slow = unet_run(pipe, [Perturbed(2.0, 1.5, modules)], lambda case=resized: run(case, pipe, True), size, True)
        assert relative(output, slow) < PIPELINE_TOLERANCE
    assert torch.equal(guided[3], guided[0])


def test_a_second_pass_at_a_higher_resolution() -> None:
    """The image-to-image pipeline shares the UNet of the text-to-image pipeline; each is guided separately."""
    case, first = built("sd1")
    second = StableDiffusionImg2ImgPipeline.from_pipe(first)
    second.set_progress_bar_config(disable=True)
    larger = replace(IMAGES["sd1-image"], size=(16, 24))
    with guide(first, SEG(2.0, 1.5)):
        small = run(case, first, True)
        enlarged = torch.nn.functional.interpolate(small, scale_factor=2.0)
        with guide(second, SEG(2.0)):
            beside = run(larger, second, True, image=enlarged)
            assert torch.equal(run(case, first, True), small)
        plain = run(larger, second, True, image=enlarged)
    assert torch.equal(run(larger, second, True, image=enlarged), plain)
    slow = [Perturbed(2.0, math.inf, self_attentions(second.unet, ("mid_block.*",)))]
    expected = unet_run(second, slow, lambda: run(larger, second, True, image=enlarged), larger.size, True)
    assert relative(beside, expected) < PIPELINE_TOLERANCE
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE


@pytest.mark.parametrize("fused", [False, True], ids=["beside", "fused"])
def test_low_rank_adapters_of_peft(fused: bool) -> None:
    peft = pytest.importorskip("peft", reason="diffusers loads LoRA through peft")
    case = IMAGES["sd1"]
    pipe = case.build(case)
    plain = run(case, pipe, True)
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    if fused:
        pipe.unet.fuse_lora()
    modules = self_attentions(pipe.unet, ("*",))
    adapted = run(case, pipe, True)
    assert relative(adapted, plain) > 10 * PIPELINE_TOLERANCE
    expected = unet_run(pipe, [Perturbed(2.0, 1.5, modules)], lambda: run(case, pipe, True), case.size, True)
    with guide(pipe, SEG(2.0, 1.5, ["down", "mid", "up"])):
        assert relative(run(case, pipe, True), expected) < PIPELINE_TOLERANCE
    assert torch.equal(run(case, pipe, True), adapted)


@pytest.mark.parametrize(("layers", "down", "mid"), [("up", 0, 0), ("mid", 0, 1), ("d0", 1, 1)])
def test_control_residuals_meet_the_batch_they_are_added_to(layers: str, down: int, mid: int) -> None:
    case, pipe = built("sdxl-controlnet")
    with guide(pipe, SEG(layers=layers)):
        seen = batches_seen(pipe, lambda: run(case, pipe, True))
    assert seen["down_blocks.1"] == {(2 + down) * case.samples}
    assert seen["mid_block"] == {(2 + mid) * case.samples}
    assert seen["up_blocks.1"] == {3 * case.samples}


def test_steps_without_the_t2i_adapter_share_again() -> None:
    case, pipe = built("sdxl-adapter")
    with guide(pipe, SEG(layers="up")):
        seen = batches_seen(pipe, lambda: run(case, pipe, True))
    assert seen["conv_in"] == {2 * case.samples, 3 * case.samples}


def test_image_to_image_counts_the_steps_it_takes() -> None:
    case, pipe = built("sdxl-image")
    with guide(pipe, SEG(start=0.5)) as guidance:
        run(case, pipe, True, strength=0.4, num_inference_steps=10)
    report = guidance.report()
    assert (report.forwards, report.layers[0].fired) == (4, 2)


def test_layers_of_videos_are_those_over_the_image() -> None:
    case, pipe = built("animatediff")
    layers = list_layers(pipe, *case.pixels)
    assert {layer.module for layer in layers} == set(self_attentions(pipe.unet, ("*",)))
    assert [layer.name for layer in layers] == ["d0", "m0", "u0", "u1"]
    assert [(layer.grid.height, layer.grid.width) for layer in layers if layer.grid] == [
        (8, 12),
        (4, 6),
        *[(8, 12)] * 2,
    ]
    assert not any("motion_modules" in layer.module for layer in layers)
    with pytest.raises(ValueError, match="unknown layer"):
        guide(pipe, SEG(layers="*.motion_modules.*"))


def test_each_video_has_its_sigma() -> None:
    """One number per sample applies to all of its frames."""
    case, pipe = built("animatediff")
    outputs = []
    for sigma in ((0.5, 2.0), 0.5, 2.0):
        with guide(pipe, SEG(2.0, sigma, "mid")):
            outputs.append(run(case, pipe, True))
    both, first, second = outputs
    assert relative(both[0], first[0]) < PIPELINE_TOLERANCE
    assert relative(both[1], second[1]) < PIPELINE_TOLERANCE
    assert relative(first, second) > PIPELINE_TOLERANCE


@pytest.mark.parametrize(
    "spec",
    [SEG(2.0, 1.5, "up", query_stride=2), SEG(2.0, 1.5, reuse=2, stop=0.9)],
    ids=str,
)
def test_other_options_for_videos(spec: Any) -> None:
    case, pipe = built("animatediff")
    plain = run(case, pipe, True, num_inference_steps=3)
    outputs = []
    for share in (True, False):
        with guide(pipe, spec, share=share):
            outputs.append(run(case, pipe, True, num_inference_steps=3))
    assert relative(outputs[0], outputs[1]) < PIPELINE_TOLERANCE
    assert relative(outputs[0], plain) > 10 * PIPELINE_TOLERANCE


def test_free_init_runs_the_loop_several_times() -> None:
    """Every pass of FreeInit is a run with its own first and last step."""
    case = MOTION["animatediff"]
    pipe = case.build(case)
    pipe.enable_free_init(num_iters=2, method="gaussian")
    modules = self_attentions(pipe.unet, ("mid_block.*",))
    expected = unet_run(pipe, [Perturbed(2.0, 1.5, modules)], lambda: run(case, pipe, True), case.size, True)
    with guide(pipe, SEG(2.0, 1.5)) as active:
        assert relative(run(case, pipe, True), expected) < PIPELINE_TOLERANCE
    assert active.report().layers[0].fired == 2 * case.steps
    with guide(pipe, SEG(2.0, 1.5, stop=0.5)) as active:
        run(case, pipe, True)
    assert active.report().layers[0].fired == 2


@pytest.mark.parametrize(
    ("spec", "quoted"),
    [
        (SAG(), r"SAG needs a UNet2DConditionModel; a UNetMotionModel supports SEG\(...\) and PAG\(...\)"),
        (SLG(), "SLG needs a UNet2DConditionModel or a transformer; a UNetMotionModel supports SEG"),
        (TPG(), "TPG needs a UNet2DConditionModel or a transformer; a UNetMotionModel supports SEG"),
        (CFG(), "CFG needs a UNet2DConditionModel"),
        (PAG(layers="d7"), "unknown layer 'd7'; valid names are 'down' .d0., 'mid' .m0., 'up' .u0 to u1."),
    ],
    ids=["sag", "slg", "tpg", "cfg", "layer"],
)
def test_what_a_video_cannot_have_is_refused(spec: Any, quoted: str) -> None:
    _, pipe = built("animatediff")
    processors = dict(pipe.unet.attn_processors)
    with pytest.raises(ValueError, match=quoted):
        guide(pipe, spec)
    assert hooks_of(pipe.unet) == 0
    assert all(pipe.unet.attn_processors[name] is processors[name] for name in processors)


def test_pieces_of_a_batch_are_refused() -> None:
    case = MOTION["animatediff-free-noise"]
    pipe = case.build(case)
    pipe.enable_free_noise_split_inference(spatial_split_size=4, temporal_split_size=2)
    with pytest.raises(ValueError, match=r"m0 \(mid_block.*processes the batch in pieces"):
        guide(pipe, SEG())
    assert hooks_of(pipe.unet) == 0


def _upscaler() -> UNet2DConditionModel:
    """Return the UNet of Stable Diffusion's latent upscaler, whose blocks have no transformers."""
    return UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 32),
        time_cond_proj_dim=8,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=32,
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
    )


def _bare(name: str, model: Any) -> Any:
    """Return a pipeline with only a denoiser, without other components of its class."""
    kind: Any = getattr(diffusers, name)
    pipe = kind.__new__(kind)
    pipe.register_modules(unet=model)
    return pipe


def test_models_without_such_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="this UNet2DConditionModel: it has no self-attention layers over image"):
        guide(_bare("StableDiffusionLatentUpscalePipeline", _upscaler()), SEG())
    assert list_layers(_upscaler()) == []


def test_other_models_are_refused_by_name() -> None:
    names = inspect.signature(diffusers.UNet3DConditionModel.__init__).parameters
    options = {"block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    options |= {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
    options |= {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")}
    model = diffusers.UNet3DConditionModel(**{name: value for name, value in options.items() if name in names})
    with pytest.raises(ValueError, match="got TextToVideoSDPipeline with a UNet3DConditionModel"):
        guide(_bare("TextToVideoSDPipeline", model), SEG())


def test_models_without_a_middle_say_so() -> None:
    """SSD-1B has no attention in the middle, and the smallest BK-SDM has no mid block."""
    for name, up in (("ssd-1b", "u0 to u3"), ("bk-sdm-tiny", "u0 to u1")):
        _, pipe = built(name)
        with pytest.raises(ValueError, match=f"unknown layer 'mid'; valid names are 'down' .*, 'up' .{up}."):
            guide(pipe, SEG())
        assert hooks_of(pipe.unet) == 0

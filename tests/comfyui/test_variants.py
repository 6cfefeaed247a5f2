# SPDX-License-Identifier: Apache-2.0
"""Related models, and conditionings with their own weights, positions and images."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.hooks
import comfy.model_patcher
import pytest
import torch
from segkern_pack.guidance import add_guidance

from .comparison import SPECS, UNET_LAYERS, compare, independent, small
from .small_models import CONFIGS, CPU, conditioning, latents, make_model, relative, sample
from .test_workflows import same

SPEC = SPECS["seg 1.5"]


def noise(*shape: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def equal(model: Any, name: str, choice: str, layers: list[Any], text: int | None = None, **options: Any) -> None:
    """Compare guidance of a model that is built like a small model of this name."""
    ours = add_guidance(model, SPEC, choice)
    reference = independent(name, layers, SPEC, **({} if text is None else {"text": text}))
    options = {"noise": latents(name, 9, 14, 2), **options}
    compare(model, name, ours, reference.on(model, name), 1e-9 if name in UNET_LAYERS else 1e-5, **options)


def both(name: str, **extra: Any) -> dict[str, Any]:
    return {"positive": conditioning(name, 2, **extra), "negative": conditioning(name, 3, **extra)}


def hooked(name: str, seed: int, weight: str) -> list[list[Any]]:
    """Return a conditioning with its own LoRA, which is weaker in the second half."""
    shape = small(name).model.state_dict()[weight].shape
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hook.weights, hook.need_weight_init = {weight: ("diff", (0.3 * noise(*shape, seed=seed),))}, False
    hook.hook_keyframe = comfy.hooks.HookKeyframeGroup()
    hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
    hook.hook_keyframe.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.5))
    group = comfy.hooks.HookGroup()
    group.add(hook)
    return conditioning(name, seed, hooks=group)


@pytest.mark.parametrize(
    "name, layers, weight",
    [
        ("sdxl", "mid", "diffusion_model.input_blocks.3.1.proj_in.weight"),
        ("flux", "1,4", "diffusion_model.double_blocks.0.img_attn.qkv.weight"),
    ],
)
def test_conditionings_with_weights_of_their_own(name: str, layers: str, weight: str) -> None:
    plain = conditioning(name, 8)
    options = {"positive": hooked(name, 2, weight) + plain, "negative": hooked(name, 5, weight), "steps": 4}
    other = {"positive": conditioning(name, 2) + plain, "negative": conditioning(name, 5), "steps": 4}
    assert relative(same(name, layers, **options), same(name, layers, **other)) > 1e-3


class Positions(torch.nn.Module):
    """Like GLIGEN: a layer in every transformer, selected by the transformer's number."""

    def set_position(self, shape: Any, weight: float, device: Any) -> Any:
        return lambda x, extra: x + 0.05 * weight * (1 + extra["transformer_index"]) * x.tanh()


@pytest.mark.parametrize("layers", ["mid", "u1.1, d0.1"])
def test_positions_of_objects(layers: str) -> None:
    gligen = comfy.model_patcher.ModelPatcher(Positions(), CPU, CPU)
    given = {
        "positive": conditioning("sdxl", 2, gligen=("position", gligen, 1.0)),
        "negative": conditioning("sdxl", 3, gligen=("position", gligen, 0.3)),
    }
    assert relative(same("sdxl", layers, **given), same("sdxl", layers)) > 1e-3


def test_models_for_inpainting() -> None:
    mask = torch.zeros(2, 1, 72, 112)
    mask[..., 50:] = 1.0
    extra = {"concat_latent_image": noise(2, 4, 9, 14), "concat_mask": mask}
    equal(make_model("sdxl", in_channels=9), "sdxl", "mid", UNET_LAYERS["sdxl"]["mid"], **both("sdxl", **extra))


def test_flux_for_inpainting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "fill", ("FluxInpaint", CONFIGS["flux"][1] | {"in_channels": 96}))
    mask = torch.zeros(2, 1, 72, 112)
    mask[..., 50:] = 1.0
    extra = {"concat_latent_image": noise(2, 16, 9, 14), "concat_mask": mask}
    equal(make_model("fill", torch.float32), "flux", "1,4", [1, 4], **both("flux", **extra))


def test_a_video_that_begins_with_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIGS, "i2v", ("WAN21_I2V", CONFIGS["wan"][1] | {"in_dim": 36, "model_type": "i2v"}))
    mask = torch.ones(2, 1, 3, 9, 14)
    mask[:, :, :1] = 0.0
    extra = {
        "concat_latent_image": noise(2, 16, 3, 9, 14),
        "concat_mask": mask,
        "clip_vision_output": SimpleNamespace(penultimate_hidden_states=noise(1, 257, 1280)),
    }
    equal(make_model("i2v", torch.float32), "wan", "1", [1], **both("wan", **extra))


def test_frames_of_wan_that_are_added_are_refused() -> None:
    guided = add_guidance(small("wan"), SPEC, "1")
    positive = conditioning("wan", 2, time_dim_concat=noise(1, 16, 1, 9, 14))
    message = (
        "cannot locate the image tokens: Wan has 140 tokens, 0 of them before an image of 3 x 5 x 7 .* adds tokens"
    )
    with pytest.raises(ValueError, match=message):
        compare(small("wan"), "wan", guided, guided, 1e-5, noise=latents("wan", 9, 14, 2), positive=positive)


def test_layers_of_an_image_are_frames_of_qwen() -> None:
    equal(small("qwen"), "qwen", "1", [1], noise=noise(1, 16, 3, 9, 14))


def test_references_of_z_image_are_before_the_image() -> None:
    model = make_model("lumina", torch.float32, pad_tokens_multiple=8)
    references = both("lumina", reference_latents=[noise(1, 16, 6, 8)])
    equal(model, "lumina", "1", [1], text=8 + 8 + 16, **references)  # two texts and a reference, each padded


def test_one_guided_model_in_two_sizes() -> None:
    guided = add_guidance(small("sdxl"), SPEC, "mid")
    first = sample(guided, "sdxl", noise=latents("sdxl", 8, 8, 1))
    sample(guided, "sdxl", noise=latents("sdxl", 16, 10, 1), denoise=0.5)
    assert torch.equal(sample(guided, "sdxl", noise=latents("sdxl", 8, 8, 1)), first)

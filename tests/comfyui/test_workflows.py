# SPDX-License-Identifier: Apache-2.0
"""Guidance in many workflows equals a third full forward pass with the same nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.controlnet
import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from segkern_pack.guidance import add_guidance, guidances_of

from .comparison import SPECS, TRANSFORMER_LAYERS, UNET_LAYERS, compare, independent, small
from .small_models import conditioning, forwards, latents, relative, sample

LAYERS = {**UNET_LAYERS, **TRANSFORMER_LAYERS}
Guide = Callable[[Any], Any]
Arrange = Callable[[Any, Guide], Any]


def plain(model: Any, guide: Guide) -> Any:
    return guide(model)


def same(
    name: str, layers: str, spec: str = "seg 1.5", arrange: Arrange = plain, window: tuple[float, float] = (0.0, 1.0),
    full: bool = False, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """Assert that a workflow's latents equal those of the independent guidance, and return them."""
    model, asked = small(name), SPECS[spec]
    ours = arrange(model, lambda given: add_guidance(given, asked, layers))
    reference = independent(name, LAYERS[name][layers], asked, window=window)
    other = arrange(model, lambda given: reference.on(given, name))
    exact = 1e-10 if name in UNET_LAYERS else 1e-5
    latent = compare(model, name, ours, other, exact, **{"noise": latents(name, 9, 14, 2), **options})
    report = guidances_of(ours.model_options)[0].report
    assert report.acted > 0
    assert bool(report.full) == full, report.full
    return latent


EITHER = pytest.mark.parametrize("name, layers", [("sdxl", "mid"), ("flux", "1,4")])


@EITHER
def test_without_classifier_free_guidance(name: str, layers: str) -> None:
    assert relative(same(name, layers, cfg=1.0), same(name, layers, cfg=5.0)) > 1e-3


@EITHER
def test_three_pictures_at_once(name: str, layers: str) -> None:
    same(name, layers, noise=latents(name, 9, 14, 3))


@pytest.mark.parametrize(
    "name, layers", [("sdxl", "mid"), ("sd15", "up"), ("flux", "1,4"), ("sd3", "1-2"), ("wan", "1")]
)
def test_conditionings_in_separate_calls(name: str, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    joint = same(name, layers)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *given: 0)
    with forwards(small(name)) as outputs:
        split = same(name, layers)
    assert len(outputs) == 3 * 6  # from three runs with two evaluations
    assert relative(split, joint) < 2e-5


def area(height: int, width: int, y: int, x: int) -> dict[str, Any]:
    return {"area": (height, width, y, x), "strength": 1.2, "set_area_to_bounds": False}


@EITHER
@pytest.mark.parametrize("memory", ["joint", "separate"])
@pytest.mark.parametrize("kind", ["areas", "equal areas", "masks", "times"])
def test_several_conditionings(name: str, layers: str, kind: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if memory == "separate":
        monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *given: 0)
    mask = torch.rand(1, 9, 14, generator=torch.Generator().manual_seed(7))
    every: dict[str, list[dict[str, Any]]] = {
        "areas": [area(9, 6, 0, 0), area(7, 9, 2, 5), {}],
        "equal areas": [area(6, 8, 0, 0), area(6, 8, 3, 6), {}],
        "masks": [{"mask": mask, "mask_strength": 0.8}, {"mask": 1 - mask}, {}],
        "times": [{"start_percent": 0.0, "end_percent": 0.4}, {"start_percent": 0.4, "end_percent": 1.0}, {}],
    }
    extras = every[kind]
    positive = [entry for seed, extra in enumerate(extras) for entry in conditioning(name, 20 + seed, **extra)]
    same(name, layers, positive=positive)
    same(name, layers, positive=positive, negative=positive)


@EITHER
def test_the_same_conditioning_as_positive_and_negative(name: str, layers: str) -> None:
    same(name, layers, positive=conditioning(name, 2), negative=conditioning(name, 2))
    both = conditioning(name, 2)
    same(name, layers, positive=both, negative=both)


def test_conditionings_of_different_lengths() -> None:
    same("sdxl", "mid", positive=conditioning("sdxl", 2, tokens=10), negative=conditioning("sdxl", 3, tokens=5))
    same("flux", "1,4", negative=conditioning("flux", 3, tokens=9))


class Control(comfy.controlnet.ControlBase):
    """Residuals that depend on the latents; ComfyUI adds them in place."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def copy(self) -> Control:
        return Control(self.name)

    def get_control(
        self, x: torch.Tensor, t: torch.Tensor, cond: Any, batched: int, options: Any
    ) -> dict[str, list[torch.Tensor | None]]:
        generator = torch.Generator().manual_seed(5)
        dtype = small(self.name).model.get_dtype()

        def like(*shape: int) -> torch.Tensor:
            noise = torch.randn((1, *shape[1:]), generator=generator)
            return (noise * x.mean(dim=tuple(range(1, x.ndim))).reshape(-1, *[1] * (len(shape) - 1))).to(dtype)

        batch, tokens = x.shape[0], -(-x.shape[-2] // 2) * -(-x.shape[-1] // 2)
        if self.name in TRANSFORMER_LAYERS:
            width = 256 if self.name == "sd3" else 64
            parts: list[torch.Tensor | None] = [like(batch, tokens, width) for _ in range(3)]
            return {"input": list(parts), "middle": [], "output": parts[:2]}
        channels, sizes = (32, 32, 32, 64), (1, 1, 2, 2)
        residuals: list[torch.Tensor | None] = [
            like(batch, c, -(-x.shape[2] // s), -(-x.shape[3] // s)) for c, s in zip(channels, sizes, strict=True)
        ]
        return {"input": residuals[::-1], "middle": [like(*residuals[-1].shape)], "output": list(residuals)}


@pytest.mark.parametrize(
    "name, layers",
    [("sdxl", "mid"), ("sd15", "up"), ("sd15", "down"), ("flux", "1,4"), ("flux", "5"), ("sd3", "1-2"), ("qwen", "1")],
)
def test_controlnet(name: str, layers: str) -> None:
    control = Control(name)
    extra = {"control": control, "control_apply_to_uncond": True}
    controlled = same(name, layers, positive=conditioning(name, 2, **extra))
    assert relative(controlled, same(name, layers)) > 1e-3


def with_attention_patches(model: Any, guide: Guide) -> Any:
    """Nodes like IP-Adapter: more keys, another cross-attention, a weight by the number of the transformer."""
    model = model.clone()

    def more_keys(n: torch.Tensor, context: torch.Tensor, value: torch.Tensor, extra: Any) -> tuple[torch.Tensor, ...]:
        more = torch.cat((context, 0.5 * context[:, :3]), dim=1)
        return n, more, torch.cat((value, value[:, :3]), dim=1)

    def by_number(out: torch.Tensor, extra: Any) -> torch.Tensor:
        return out * (1.0 + 0.1 * extra["transformer_index"])

    model.set_model_attn1_patch(more_keys)
    model.set_model_attn2_output_patch(by_number)
    return guide(model)


def after(arrange: Callable[[Any], Any]) -> Arrange:
    return lambda model, guide: arrange(guide(model))


def before(arrange: Callable[[Any], Any]) -> Arrange:
    return lambda model, guide: guide(arrange(model))


@pytest.mark.parametrize("name, layers", [("sdxl", "mid"), ("sd15", "up"), ("sd15", "input.3, output.2")])
def test_patches_of_attention(name: str, layers: str) -> None:
    assert relative(same(name, layers, arrange=with_attention_patches), same(name, layers)) > 1e-3


def test_identity_attention_cannot_have_more_keys() -> None:
    guided = with_attention_patches(small("sdxl"), lambda model: add_guidance(model, SPECS["pag"], "mid"))
    with pytest.raises(ValueError, match="PAG cannot act in a layer with 28 queries and 31 values"):
        sample(guided, "sdxl", steps=1, noise=latents("sdxl", 8, 14, 1))


def replaced_attention(model: Any) -> Any:
    """Another node's replacement of all self-attentions of a block."""
    model = model.clone()

    def flatter(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Any) -> torch.Tensor:
        return 0.7 * comfy.ldm.modules.attention.optimized_attention(q, k * 0.5, v, options["n_heads"])

    model.set_model_attn1_replace(flatter, "middle", 0)
    return model


def overridden_attention(model: Any) -> Any:
    """Another node's attention function, like SageAttention's."""
    model = model.clone()

    def override(function: Any, q: Any, k: Any, v: Any, heads: int, *given: Any, **keywords: Any) -> torch.Tensor:
        return 0.7 * function(q, k * 0.5, v, heads, *given, **keywords)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


@pytest.mark.parametrize("node", [replaced_attention])
@pytest.mark.parametrize("order", [before, after])
def test_other_replacements_of_attention_are_called_on(node: Any, order: Any) -> None:
    assert relative(same("sdxl", "mid", arrange=order(node)), same("sdxl", "mid")) > 1e-3

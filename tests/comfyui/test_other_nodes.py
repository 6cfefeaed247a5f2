# SPDX-License-Identifier: Apache-2.0
"""Guidance with other nodes of ComfyUI or like those of other packs: supported with equal results, or refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import comfy.context_windows
import comfy.ldm.modules.attention
import comfy.patcher_extension
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_hypertile import HyperTile
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT, SkipLayerGuidanceDiTSimple
from comfy_extras.nodes_tomesd import TomePatchModel
from segkern_pack.guidance import add_guidance

from segkern.integrations.specs import SEG

from .comparison import SPECS, small, unshared
from .small_models import latents, relative, sample
from .test_workflows import after, before, same

Node = Callable[[Any], Any]
ORDER = pytest.mark.parametrize("order", [before, after])


def node(kind: Any, **inputs: Any) -> Node:
    """Return a ComfyUI node as a function of the model."""

    def patched(model: Any) -> Any:
        run = kind.execute if hasattr(kind, "execute") else kind().patch
        return run(model, **inputs)[0]

    patched.__name__ = kind.__name__
    return patched


FREEU = node(FreeU, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
FREEU_2 = node(FreeU_V2, b1=1.3, b2=1.4, s1=0.9, s2=0.2)
SHRINK = node(
    PatchModelAddDownscale, block_number=3, downscale_factor=2.0, start_percent=0.0, end_percent=0.9,
    downscale_after_skip=True, downscale_method="bicubic", upscale_method="bicubic",
)  # fmt: skip
SHRINK_BEFORE_SKIP = node(
    PatchModelAddDownscale, block_number=1, downscale_factor=1.5, start_percent=0.0, end_percent=0.4,
    downscale_after_skip=False, downscale_method="bilinear", upscale_method="nearest-exact",
)  # fmt: skip
THEIR_PAG = node(PerturbedAttentionGuidance, scale=1.5)
THEIR_SAG = node(SelfAttentionGuidance, scale=0.7, blur_sigma=2.0)
RESCALE = node(RescaleCFG, multiplier=0.7)
SKIP = node(
    SkipLayerGuidanceDiT, double_layers="1", single_layers="1", scale=1.5, start_percent=0.0, end_percent=1.0,
    rescaling_scale=0.3,
)  # fmt: skip
SKIP_NEGATIVE = node(
    SkipLayerGuidanceDiTSimple, double_layers="1", single_layers="1", start_percent=0.0, end_percent=1.0
)
PROJECTED = node(APG, eta=0.5, norm_threshold=5.0, momentum=0.0)


@cache
def alone(name: str, layers: str, **options: Any) -> torch.Tensor:
    """Return latents without the other node."""
    guided = add_guidance(small(name), SPECS["seg 1.5"], layers)
    return sample(guided, name, **{"steps": 2, "noise": latents(name, 9, 14, 2), **options})


@pytest.mark.parametrize(
    "other, layers, order",
    [
        *((other, "mid", before) for other in (FREEU_2, SHRINK, THEIR_SAG, RESCALE, PROJECTED)),
        *((other, "mid", after) for other in (FREEU, SHRINK_BEFORE_SKIP, THEIR_SAG, RESCALE, PROJECTED)),
        *((other, "up", before) for other in (FREEU, SHRINK, SHRINK_BEFORE_SKIP)),
        (FREEU_2, "u1.1, d0.1", after),
    ],
)  # fmt: skip
def test_nodes_on_unets(other: Node, layers: str, order: Any) -> None:
    noise = latents("sdxl", 16, 12, 2)
    assert relative(same("sdxl", layers, arrange=order(other), noise=noise), alone("sdxl", layers, noise=noise)) > 1e-4


@ORDER
def test_comfyuis_perturbed_attention_guidance(order: Any) -> None:
    same("sdxl", "mid", arrange=order(THEIR_PAG))
    model = small("sd15")
    ours = add_guidance(model, SPECS["pag"], "mid")
    theirs = node(PerturbedAttentionGuidance, scale=SPECS["pag"].scale)(model)
    assert relative(*(sample(guided, "sd15") for guided in (ours, theirs))) < 2e-5


@ORDER
@pytest.mark.parametrize("name, layers", [("sd3", "1-2"), ("flux", "1,4")])
def test_skipped_layers(name: str, layers: str, order: Any) -> None:
    assert relative(same(name, layers, arrange=order(SKIP)), alone(name, layers)) > 1e-4


def test_skipped_layers_of_the_negative() -> None:
    assert relative(same("sd3", "1-2", arrange=before(SKIP_NEGATIVE)), alone("sd3", "1-2")) > 1e-4
    assert relative(same("sd3", "1-2", arrange=after(SKIP_NEGATIVE), full=True), alone("sd3", "1-2")) > 1e-4


def layer_patch(model: Any) -> Any:
    """A node that runs other code instead of a class of layers, like caches and fused layers."""
    model = model.clone()

    def transformer(layer: Any, x: torch.Tensor, emb: Any, context: Any, options: Any, *given: Any) -> torch.Tensor:
        return 0.9 * layer(x, context, options)

    patches = model.model_options["transformer_options"].setdefault("patches", {})
    patches.setdefault("forward_timestep_embed_patch", []).append((SpatialTransformer, transformer))
    return model


def changed_blocks(model: Any) -> Any:
    """Patches before and after blocks that change activations in place."""
    model = model.clone()

    def scaled(h: torch.Tensor, options: Any) -> torch.Tensor:
        h *= 1.0 + 0.05 * options["block"][1]
        return h

    def both(h: torch.Tensor, skip: torch.Tensor, options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        h *= 1.1
        skip *= 0.9
        return h, skip

    model.set_model_input_block_patch(scaled)
    model.set_model_input_block_patch_after_skip(scaled)
    model.set_model_output_block_patch(both)
    return model


def own_post_cfg(model: Any) -> Any:
    model = model.clone()
    model.set_model_sampler_post_cfg_function(lambda given: given["denoised"] + 0.1 * given["cond_denoised"].tanh())
    return model


def own_calc(model: Any) -> Any:
    """A node that computes conditionings one by one."""
    model = model.clone()

    def calc(given: dict[str, Any]) -> list[torch.Tensor]:
        rest = given["input"], given["sigma"], given["model_options"]
        return [0.95 * comfy.samplers.calc_cond_batch(given["model"], [cond], *rest)[0] for cond in given["conds"]]

    model.set_model_sampler_calc_cond_batch_function(calc)
    return model


@ORDER
@pytest.mark.parametrize("layers", ["mid", "up"])
@pytest.mark.parametrize("other", [layer_patch, changed_blocks, own_post_cfg])
def test_hooks_of_unets(layers: str, other: Node, order: Any) -> None:
    assert relative(same("sdxl", layers, arrange=order(other)), alone("sdxl", layers)) > 1e-4


def block_replacement(model: Any) -> Any:
    """A node that replaces blocks and changes their outputs in place."""
    model = model.clone()

    def replaced(given: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        out = extra["original_block"](given)
        out["img"] *= 1.05
        return out

    for number in range(3):
        for kind in ("double_block", "single_block"):
            model.set_model_patch_replace(replaced, "dit", kind, number)
    return model


def attention_override(model: Any) -> Any:
    """A custom attention function, like SageAttention's."""
    model = model.clone()

    def override(function: Any, q: Any, k: Any, v: Any, heads: int, *given: Any, **keywords: Any) -> torch.Tensor:
        return 0.9 * function(q, k, v, heads, *given, **keywords)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def after_double_blocks(model: Any) -> Any:
    """Patches after blocks, like ControlNets for Qwen and Wan."""
    model = model.clone()

    def patch(given: dict[str, Any]) -> dict[str, Any]:
        given["img"] *= 1.0 + 0.02 * given["block_index"]
        return given

    model.set_model_patch(patch, "double_block")
    return model


@ORDER
@pytest.mark.parametrize(
    "name, layers, other",
    [
        ("flux", "1,4", block_replacement),
        ("flux", "5", block_replacement),
        ("sd3", "1-2", block_replacement),
        ("qwen", "1", block_replacement),
        ("wan", "1", block_replacement),
        ("qwen", "1", after_double_blocks),
        ("wan", "0,2", after_double_blocks),
    ],
)
def test_hooks_of_transformers(name: str, layers: str, other: Node, order: Any) -> None:
    assert relative(same(name, layers, arrange=order(other)), alone(name, layers)) > 1e-4


@ORDER
@pytest.mark.parametrize(
    "name, layers", [("sdxl", "mid"), ("flux", "1,4"), ("sd3", "1-2"), ("qwen", "1"), ("wan", "1")]
)
def test_another_attention_function(name: str, layers: str, order: Any) -> None:
    """It also computes perturbed layers; the independent guidance calls it only for the others."""
    model, asked = small(name), SPECS["seg 1.5"]
    ours = order(attention_override)(model, lambda given: add_guidance(given, asked, layers))
    shared = sample(ours, name)
    assert relative(shared, sample(unshared(ours), name)) < 2e-5


def test_another_computation_of_predictions() -> None:
    assert relative(same("sdxl", "mid", arrange=before(own_calc)), alone("sdxl", "mid")) > 1e-4
    assert relative(same("sdxl", "mid", arrange=after(own_calc), full=True), alone("sdxl", "mid")) > 1e-4


def test_merged_tokens_are_refused() -> None:
    noise = latents("sd15", 16, 16, 1)
    for other in (
        node(HyperTile, tile_size=32, swap_size=1, max_depth=0, scale_depth=False),
        node(TomePatchModel, ratio=0.5),
    ):
        for order in (before, after):
            guided = order(other)(small("sd15"), lambda model: add_guidance(model, SPECS["seg 1.5"], "d0"))
            message = "input.1.0 has .* queries for 16 x 16 positions, because another node merges .* remove that node"
            with pytest.raises(ValueError, match=message):
                sample(guided, "sd15", steps=1, noise=noise)


def tiled(tiles_at_once: int) -> Node:
    """A node that evaluates overlapping tiles, one by one or as a batch, like Tiled Diffusion."""

    def patched(model: Any) -> Any:
        model = model.clone()

        def wrapper(apply: Any, given: dict[str, Any]) -> torch.Tensor:
            x, c, t = given["input"], given["c"], given["timestep"]
            out, count = torch.zeros_like(x), torch.zeros_like(x)
            starts = [0, 4, 8]
            for first in range(0, len(starts), tiles_at_once):
                chosen = starts[first : first + tiles_at_once]
                n = len(chosen)
                again = {k: v.repeat(n, *[1] * (v.ndim - 1)) if torch.is_tensor(v) else v for k, v in c.items()}
                tiles = apply(torch.cat([x[..., s : s + 8] for s in chosen]), t.repeat(n), **again)
                for s, tile in zip(chosen, tiles.chunk(n), strict=True):
                    out[..., s : s + 8] += tile
                    count[..., s : s + 8] += 1
            return out / count

        model.set_model_unet_function_wrapper(wrapper)
        return model

    return patched


@ORDER
@pytest.mark.parametrize("at_once", [1, 3])
@pytest.mark.parametrize("name, layers", [("sdxl", "mid"), ("flux", "1,4"), ("sd3", "1-2")])
def test_tiles_are_computed_in_full(name: str, layers: str, at_once: int, order: Any) -> None:
    noise = latents(name, 8, 16, 2)
    same(name, layers, arrange=order(tiled(at_once)), noise=noise, full=True, cfg=1.0 if order is after else 4.0)


@ORDER
def test_context_windows_are_computed_in_full(order: Any) -> None:
    def windows(model: Any) -> Any:
        model = model.clone()
        model.model_options["context_handler"] = comfy.context_windows.IndexListContextHandler(
            context_schedule=comfy.context_windows.get_matching_context_schedule("standard_static"),
            fuse_method=comfy.context_windows.get_matching_fuse_method("pyramid"),
            context_length=2, context_overlap=1, dim=2,
        )  # fmt: skip
        return model

    noise = latents("wan", 9, 14, 1)  # ComfyUI's windows support one video
    latent = same("wan", "1", arrange=order(windows), full=True, noise=noise)
    assert relative(latent, alone("wan", "1", noise=noise)) > 1e-4


def test_another_wrapper_may_name_the_options() -> None:
    def by_keyword(executor, x, t, c_concat, c_crossattn, control, transformer_options, **conditions):
        return executor(
            x, t, c_concat=c_concat, c_crossattn=c_crossattn, control=control,
            transformer_options=transformer_options, **conditions,
        )  # fmt: skip

    model = small("flux")
    guided = add_guidance(model, SEG(scale=2.0), "1")
    wrapped = model.clone()
    wrapped.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "other", by_keyword)
    with_other = add_guidance(wrapped, SEG(scale=2.0), "1")
    assert torch.equal(sample(with_other, "flux", steps=2), sample(guided, "flux", steps=2))

# SPDX-License-Identifier: Apache-2.0
"""Guidance whose blur has no effect does not change latents, whatever other nodes do to predictions, or is refused."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY, apply_torch_compile_factory
from comfy_extras.nodes_apg import APG
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_custom_sampler import Guider_DualModel
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_eps import EpsilonScaling
from comfy_extras.nodes_fresca import FreSca
from comfy_extras.nodes_mahiro import Mahiro
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_tcfg import TCFG
from segkern_pack.guidance import add_guidance

from segkern.integrations.specs import SEG

from .comparison import small
from .small_models import conditioning, latents, relative, sample
from .test_other_nodes import ORDER, Node, node

NOTHING = SEG(scale=3.0, sigma=0.05)  # a blur of one tap
WHOLE_RUN = {"start_percent": 0.0, "end_percent": 1.0, "verbose": False}
LAYERS = {"sdxl": "mid", "flux": "1,4", "lumina": "1"}
CHANGES_CONDITIONAL = (
    node(APG, eta=0.5, norm_threshold=5.0, momentum=0.3),
    node(FreSca, scale_low=1.0, scale_high=1.5, freq_cutoff=2),
)
OTHERS = (
    node(TCFG),
    node(Mahiro),
    node(CFGZeroStar),
    node(CFGNorm, strength=1.0, pre_cfg=False),
    node(EpsilonScaling, scaling_factor=1.05),
    node(LazyCacheNode, reuse_threshold=0.5, **WHOLE_RUN),
)


@cache
def alone(name: str, other: Node, cfg: float) -> torch.Tensor:
    return sample(other(small(name)), name, cfg=cfg, noise=latents(name, 9, 14, 2))


@ORDER
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize(
    "name, other",
    [
        *((name, other) for name in LAYERS for other in CHANGES_CONDITIONAL),
        *(("sdxl", other) for other in OTHERS),
    ],
)
def test_nodes_that_change_predictions(name: str, other: Node, cfg: float, order: Any) -> None:
    guided = order(other)(small(name), lambda model: add_guidance(model, NOTHING, LAYERS[name]))
    latent = sample(guided, name, cfg=cfg, noise=latents(name, 9, 14, 2))
    assert relative(latent, alone(name, other, cfg)) < 2e-5


@ORDER
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(
    "other, message",
    [
        (node(EasyCacheNode, reuse_threshold=0.5, **WHOLE_RUN), "does not work with EasyCache, .*; use LazyCache"),
        (node(NAGuidance, nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5), "with Normalized Attention .*; remove one"),
    ],
)
def test_nodes_that_are_refused(name: str, other: Node, message: str, order: Any) -> None:
    guided = order(other)(small(name), lambda model: add_guidance(model, NOTHING, LAYERS[name]))
    with pytest.raises(ValueError, match=message):
        sample(guided, name, steps=1, noise=latents(name, 9, 14, 2))


@ORDER
def test_compiled_transformers_are_refused(order: Any) -> None:
    def compiled(model: Any) -> Any:
        model = model.clone()
        wrapper = apply_torch_compile_factory({"diffusion_model": model.model.diffusion_model})  # compiling takes long
        model.add_wrapper_with_key("apply_model", COMPILE_KEY, wrapper)
        return model

    guided = order(compiled)(small("flux"), lambda model: add_guidance(model, NOTHING, "1"))
    with pytest.raises(ValueError, match=r"with TorchCompileModel on a transformer, .*; remove that node"):
        sample(guided, "flux", steps=1)
    guided = order(compiled)(small("sdxl"), lambda model: add_guidance(model, NOTHING, "mid"))
    assert sample(guided, "sdxl", steps=1).isfinite().all()


def test_a_guider_without_post_cfg_functions_is_refused() -> None:
    noise = latents("sdxl", 9, 14, 1)
    for cfg in (1.0, 3.0):
        guider = Guider_DualModel(add_guidance(small("sdxl"), NOTHING, "mid"), small("sdxl"))
        guider.set_conds(conditioning("sdxl", 2), conditioning("sdxl", 3))
        guider.set_cfg(cfg)
        sigmas = comfy.samplers.calculate_sigmas(small("sdxl").get_model_object("model_sampling"), "simple", 2)
        given = (noise, torch.zeros_like(noise), comfy.samplers.sampler_object("euler"), sigmas)
        if cfg == 1.0:
            with pytest.raises(RuntimeError, match=r"not applied: this guider .* use another guider"):
                guider.sample(*given, disable_pbar=True, seed=1)
        else:
            assert guider.sample(*given, disable_pbar=True, seed=1).isfinite().all()

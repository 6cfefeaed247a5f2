# SPDX-License-Identifier: Apache-2.0
"""Images of a batch do not depend on each other, even if the lengths of their prompts differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.transformer_cases import MODELS, run


def image_of(given: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the arguments for one image of a batch, without the padding of its prompts."""
    single = {
        name: value[index : index + 1] for name, value in given.items() if isinstance(value, (list, torch.Tensor))
    }
    for prefix in ("", "negative_"):
        mask = single.get(f"{prefix}prompt_embeds_mask")
        if mask is not None:
            single[f"{prefix}prompt_embeds"] = single[f"{prefix}prompt_embeds"][:, : int(mask.sum())]
            single[f"{prefix}prompt_embeds_mask"] = mask[:, : int(mask.sum())]
    return single


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", ["qwen-image", "z-image", "flux", "sd3", "pixart-sigma", "hunyuan-dit"])
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
def test_an_image_is_the_same_in_every_batch(cfg: bool, name: str) -> None:
    model = MODELS[name]
    pipe, given = model.build(), model.call(6, 4, 3, cfg)
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    with guide(pipe, SEG(layers=model.layers)):
        together = run(model, pipe, samples=3, cfg=cfg, generator=generators)
        for index in range(3):
            generator = torch.Generator().manual_seed(index)
            alone = run(model, pipe, samples=3, cfg=cfg, **image_of(given, index), generator=generator)
            assert relative(together[index], alone[0]) < PIPELINE_TOLERANCE
    assert relative(together[0], together[1]) > 0.1

# SPDX-License-Identifier: Apache-2.0
"""Features of diffusers' pipelines under ``guide``: tasks without a text, wrong settings, other ways to call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImageVariationPipeline, StableDiffusionPanoramaPipeline, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from segkern.integrations.diffusers import PAG, SEG, guide
from tests.diffusers import transformer_cases
from tests.diffusers.slow_guidance import Perturbed, self_attentions, unet_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline, tiny_sd
from tests.diffusers.unet_cases import scheduler, unet

SIZE = (16, 16)
MID = ("mid_block.*",)


def check_against_the_slow_way(pipe: Any, draw: Callable[[], torch.Tensor], *, cfg: bool) -> None:
    """Compare SEG and PAG at the default layers with the slow computation."""
    modules = self_attentions(pipe.unet, MID)
    plain = draw()
    for spec, entry in ((SEG(scale=2.0, sigma=1.5), 1.5), (PAG(scale=2.0), None)):
        expected = unet_run(pipe, [Perturbed(2.0, entry, modules)], draw, SIZE, cfg)
        assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE  # the effect is large enough to be measured
        with guide(pipe, spec):
            assert relative(draw(), expected) < PIPELINE_TOLERANCE
    assert torch.equal(draw(), plain)


def variation_pipeline() -> Any:
    """Return an image variation pipeline: an image embedding replaces the prompt, and zeros replace none."""
    torch.manual_seed(2)
    sizes = {"hidden_size": 24, "projection_dim": 24, "intermediate_size": 16, "num_attention_heads": 2}
    config = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, num_hidden_layers=1)
    pipe = StableDiffusionImageVariationPipeline(
        vae=tiny_pipeline().components["vae"],
        image_encoder=CLIPVisionModelWithProjection(config).eval(),
        unet=unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(crop_size=16, size=16),
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("scale", [5.0, 1.0], ids=["cfg", "no-cfg"])
def test_an_image_in_place_of_a_prompt(images: int, scale: float) -> None:
    """The unconditional half has zero embeddings; the pipeline does not indicate this."""
    pipe = variation_pipeline()
    pictures = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")][:images]

    def draw() -> torch.Tensor:
        options = {"height": SIZE[0] * pipe.vae_scale_factor, "width": SIZE[1] * pipe.vae_scale_factor}
        return pipe(
            pictures,
            guidance_scale=scale,
            num_inference_steps=2,
            latents=noise(images),
            output_type="latent",
            **options,
        ).images

    check_against_the_slow_way(pipe, draw, cfg=scale > 1.0)


def test_a_property_that_is_always_false() -> None:
    """diffusers' panorama pipeline is set to run without classifier-free guidance, so the texts of its batch decide."""
    pipe = tiny_sd(StableDiffusionPanoramaPipeline)
    factor = pipe.vae_scale_factor
    size = {"height": 16 * factor, "width": 16 * factor}

    def draw() -> torch.Tensor:
        given = {"latents": noise(), "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "np"}
        return torch.from_numpy(pipe("a red fox", **size, **given).images)

    assert not pipe.do_classifier_free_guidance
    check_against_the_slow_way(pipe, draw, cfg=True)


def test_a_constructor_that_guides(monkeypatch: pytest.MonkeyPatch) -> None:
    """``type(pipe)(...)`` initialises the new pipeline once, even if its ``__init__`` calls ``guide``."""
    original, made = StableDiffusionXLPipeline.__init__, []

    @functools.wraps(original)
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(guide(self, SEG(scale=2.0)))

    monkeypatch.setattr(StableDiffusionXLPipeline, "__init__", initialise)
    pipe = tiny_pipeline(own_unet=True)
    try:
        again = type(pipe)(**pipe.components)
        assert len(made) == 2
        again.set_progress_bar_config(disable=True)
        assert torch.equal(run(again, latents=noise()), run(pipe, latents=noise()))
    finally:
        for guidance in made:
            guidance.remove()


def test_a_measured_prediction_whose_scale_is_not_known() -> None:
    """Qwen-Image rescales to its conditional prediction. If called without the instance's class, its scale is unknown.

    The second of the first step's two calls is refused, before the step. Without a negative prompt it is guided.
    """
    model = transformer_cases.MODELS["qwen-image"]
    pipe = model.build()
    given = {"height": 96, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    steps: list[int] = []

    def note(pipe: Any, step: int, timestep: Any, tensors: Any) -> Any:
        steps.append(step)
        return tensors

    call = type(pipe).__call__

    def draw(cfg: bool) -> torch.Tensor:
        generator = torch.Generator().manual_seed(5)
        return call(pipe, **model.call(6, 4, 1, cfg), **given, generator=generator, callback_on_step_end=note).images

    with guide(pipe, SEG(scale=2.0)) as guidance:
        with pytest.raises(ValueError, match="needs the true_cfg_scale"):
            draw(cfg=True)
        assert not steps
        guided = draw(cfg=False)
        assert guidance.report().forwards > 0
        assert torch.equal(
            guided, pipe(**model.call(6, 4, 1, False), **given, generator=torch.Generator().manual_seed(5)).images
        )

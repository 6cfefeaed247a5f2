# SPDX-License-Identifier: Apache-2.0
"""Guidance belongs to one pipeline: not to others that share its denoiser, and not to copies."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.probes import hooks_of
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline


@pytest.mark.parametrize("ran_before", [False, True], ids=["before any run", "after a run"])
def test_another_pipeline_with_the_same_denoiser_runs_unguided(ran_before: bool) -> None:
    guided, other = tiny_pipeline(), tiny_pipeline()
    assert guided.unet is other.unet
    arguments = {"prompt": ["a fox", "a lake"], "latents": noise(batch=2), "guidance_scale": 1.0}
    plain = run(other, **arguments)
    with guide(guided, SEG()):
        if ran_before:
            run(guided, latents=noise())
        beside = run(other, **arguments)
        with_guidance = run(guided, **arguments)
    assert torch.equal(beside, plain)
    assert relative(with_guidance, plain) > 1e-3


def test_a_pipeline_made_from_a_guided_one_can_be_guided_itself() -> None:
    pipe = tiny_pipeline()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"prompt": "a fox", "image": image, "strength": 0.8, "num_inference_steps": 4, "output_type": "latent"}

    def draw(img2img: StableDiffusionXLImg2ImgPipeline) -> torch.Tensor:
        img2img.set_progress_bar_config(disable=True)
        return img2img(**arguments, generator=torch.Generator().manual_seed(1)).images

    plain = draw(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe))
    guidance = guide(pipe, SEG())
    beside = draw(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe))
    with pytest.warns(UserWarning, match="ran for other pipelines only"):
        guidance.remove()
    assert torch.equal(beside, plain)
    img2img = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    with guide(img2img, SEG()):
        assert relative(draw(img2img), plain) > 1e-3


def test_a_copy_of_a_guided_denoiser_is_plain_and_can_be_guided() -> None:
    pipe = tiny_pipeline(own_unet=True)
    plain = run(pipe, latents=noise())
    with guide(pipe, SEG()):
        copied = tiny_pipeline(unet=copy.deepcopy(pipe.unet))
        guided = run(pipe, latents=noise())
        assert torch.equal(run(copied, latents=noise()), plain)
        with guide(copied, SEG()):
            assert relative(run(copied, latents=noise()), guided) < PIPELINE_TOLERANCE
    assert torch.equal(run(copied, latents=noise()), plain)
    assert torch.equal(run(pipe, latents=noise()), plain)
    assert not hooks_of(pipe.unet)


def test_a_denoiser_replaced_while_guided_is_reported() -> None:
    pipe = tiny_pipeline(own_unet=True)
    guidance = guide(pipe, SEG())
    mine = pipe.unet
    pipe.unet = copy.deepcopy(mine)
    run(pipe, latents=noise())
    with pytest.warns(UserWarning, match="given another unet while guided"):
        guidance.remove()
    assert not hooks_of(mine)


def test_reports_keep_no_autograd_graph() -> None:
    pipe = tiny_pipeline(own_unet=True)
    with guide(pipe, SEG()) as guidance:
        run(pipe, latents=noise())  # the pipeline's state, which the call below needs
        batch, states = 2, torch.randn(2, 77, pipe.unet.config.cross_attention_dim)
        width = pipe.text_encoder_2.config.projection_dim
        conditions = {"text_embeds": torch.randn(2, width), "time_ids": torch.zeros(2, 6)}
        sample = noise(batch=batch).requires_grad_()
        with torch.enable_grad():
            pipe.unet(sample, 10, encoder_hidden_states=states, added_cond_kwargs=conditions)
        totals = [total for _, total in guidance._recorder._sums.values()]
    assert totals
    assert not any(total.requires_grad for total in totals)

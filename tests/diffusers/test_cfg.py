# SPDX-License-Identifier: Apache-2.0
"""The ``CFG`` spec equals the pipeline's own classifier-free guidance."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import CFG, PAG, SEG, guide
from tests.compatibility import proves
from tests.diffusers.probes import batches_seen
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline, tiny_sd

MODELS = {"SDXL": tiny_pipeline, "SD 1": tiny_sd}


PROVED = [
    pytest.param("SDXL", marks=proves(model="Stable Diffusion XL")),
    pytest.param("SD 1", marks=proves(model="Stable Diffusion 1")),
]


@pytest.mark.one_in(3)
@proves(task="text to image", guidance="CFG")
@pytest.mark.parametrize("others", [(), (SEG(sigma=2.0), PAG(scale=1.0, layers="up"))], ids=["alone", "with others"])
@pytest.mark.parametrize("negative", ["", "a blurry photograph"], ids=["no negative prompt", "negative prompt"])
@pytest.mark.parametrize("model", PROVED)
def test_it_is_the_pipelines_own(model: str, negative: str, others: tuple[Any, ...]) -> None:
    """Compares with latents of the pipeline's own classifier-free guidance."""
    pipe = MODELS[model]()
    arguments = {"latents": noise(2, 8, 12), "num_images_per_prompt": 2}
    with guide(pipe, *others, CFG(scale=4.0, negative_prompt=negative)) as guidance:
        ours = run(pipe, guidance_scale=1.0, **arguments)
    assert guidance.report().layers[-1].layer == "text"
    negatives = {"negative_prompt": negative} if negative else {}
    with guide(pipe, *others) if others else nullcontext():
        expected = run(pipe, guidance_scale=5.0, **negatives, **arguments)
    assert relative(ours, expected) < PIPELINE_TOLERANCE
    assert relative(ours, run(pipe, guidance_scale=1.0, **arguments)) > 1e-3


def test_embeddings_serve_as_a_negative_prompt() -> None:
    pipe = tiny_pipeline()
    _, embeds, _, pooled = pipe.encode_prompt(
        "x", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt="grey"
    )
    spec = CFG(scale=3.0, negative_prompt_embeds=embeds, negative_pooled_prompt_embeds=pooled)
    with guide(pipe, spec):
        ours = run(pipe, latents=noise(1, 8, 12), guidance_scale=1.0)
    expected = run(pipe, latents=noise(1, 8, 12), guidance_scale=4.0, negative_prompt="grey")
    assert relative(ours, expected) < PIPELINE_TOLERANCE
    with pytest.raises(ValueError, match="CFG also needs negative_pooled_prompt_embeds"):
        guide(pipe, CFG(negative_prompt_embeds=embeds))
    with (
        pytest.raises(ValueError, match=r"CFG.negative_prompt_embeds of shape .* does not match the prompt's"),
        guide(pipe, CFG(negative_prompt_embeds=embeds[:, :5], negative_pooled_prompt_embeds=pooled)),
    ):
        run(pipe, latents=noise(1, 8, 12), guidance_scale=1.0)


def test_its_branch_joins_at_the_input_and_the_others_where_they_differ() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(sigma=2.0, layers="mid"), CFG()):
        seen = batches_seen(pipe, lambda: run(pipe, latents=noise(1, 8, 12), guidance_scale=1.0, num_inference_steps=1))
    assert seen["conv_in"] == {2}
    assert seen["mid_block"] == {3}
    assert seen["conv_out"] == {3}


def test_it_is_refused_where_the_pipeline_does_it_itself() -> None:
    pipe = tiny_pipeline()
    with pytest.raises(ValueError, match="already applies classifier-free guidance"), guide(pipe, CFG()):
        run(pipe, latents=noise(1, 8, 12), guidance_scale=5.0)
    with pytest.raises(ValueError, match=r"guide supports only one CFG"):
        guide(pipe, CFG(), CFG())


def test_without_a_text_encoder_embeddings_are_asked_for() -> None:
    pipe = tiny_pipeline()
    pipe.text_encoder = pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match="has no text encoder; pass negative_prompt_embeds"):
        guide(pipe, CFG())


def test_a_part_of_the_run() -> None:
    """Guides only the first half. The second half equals an unguided run from the latents of the first half."""
    pipe = tiny_sd()
    middle: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        middle.append(values["latents"])
        return values

    options = {"num_inference_steps": 4, "guidance_scale": 1.0, "callback_on_step_end": keep}
    with guide(pipe, CFG(scale=4.0, stop=0.5)):
        run(pipe, latents=noise(1, 8, 12), **options)
    ours, middle = middle, []
    run(pipe, latents=noise(1, 8, 12), **(options | {"guidance_scale": 5.0}))
    for step in range(2):
        assert relative(ours[step], middle[step]) < PIPELINE_TOLERANCE
    assert relative(ours[3], middle[3]) > 1e-3

# SPDX-License-Identifier: Apache-2.0
"""Denoiser calls that look the same are distinguished by texts and settings, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from segkern.integrations.diffusers.runtime.layout import BatchLayout, CallKind
from segkern.integrations.diffusers.runtime.pipeline_class import unwatch, watch
from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun
from segkern.integrations.diffusers.runtime.run_text import TextKind
from tests.diffusers.transformer_cases import MODELS

PROMPT, NEGATIVE = torch.randn(2, 1, 5, 8, generator=torch.Generator().manual_seed(0))
LATENTS = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
STEP = torch.tensor(500.0)


class Pipeline:
    """A custom pipeline."""

    do_classifier_free_guidance_now: bool | None = None

    @property
    def do_classifier_free_guidance(self) -> bool:
        if self.do_classifier_free_guidance_now is None:
            raise AttributeError
        return self.do_classifier_free_guidance_now

    def __call__(self) -> None:
        """Do nothing."""

    def encode_prompt(self, prompt: str, negative_prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        return NEGATIVE, PROMPT  # in a non-standard order


def layout(pipe: Any, is_stock: bool = False, **arguments: Any) -> BatchLayout:
    return BatchLayout(PipelineRun(pipe, arguments, is_stock=is_stock), "Pipeline")


def test_a_third_call_is_refused() -> None:
    calls = layout(Pipeline(), prompt_embeds=PROMPT, negative_prompt_embeds=NEGATIVE)
    assert calls.of_call(LATENTS, PROMPT, STEP).kind is CallKind.PROMPT
    assert calls.of_call(LATENTS, NEGATIVE, STEP).kind is CallKind.NEGATIVE
    with pytest.raises(ValueError, match="three times at one timestep"):
        calls.of_call(LATENTS, PROMPT, STEP.clone())


@pytest.mark.parametrize("is_stock", [True, False])
def test_prompts_that_may_hold_the_negative_prompt_too(is_stock: bool) -> None:
    both, twice = torch.cat([NEGATIVE, PROMPT]), torch.cat([LATENTS] * 2)
    calls = layout(Pipeline(), is_stock, prompt_embeds=both)
    if is_stock:  # two images with the same initial noise
        assert calls.of_call(twice, both, STEP).kind is CallKind.PROMPT
    else:
        with pytest.raises(ValueError, match="whether they are two equal images"):
            calls.of_call(twice, both, STEP)


def test_a_batch_is_looked_at_again_where_guidance_was_turned_off() -> None:
    pipe = Pipeline()
    pipe.do_classifier_free_guidance_now = True
    calls = layout(pipe, prompt_embeds=PROMPT, negative_prompt_embeds=NEGATIVE)
    twice = torch.cat([LATENTS] * 2)
    assert calls.of_call(twice, torch.cat([NEGATIVE, PROMPT]), STEP).kind is CallKind.BATCH
    pipe.do_classifier_free_guidance_now = False
    with pytest.raises(ValueError, match="is set to run without classifier-free guidance"):
        calls.of_call(twice, torch.cat([PROMPT, PROMPT]), STEP)


def test_the_order_of_texts_of_an_encode_prompt_of_ones_own_is_not_known() -> None:
    pipe = Pipeline()
    watch(pipe)
    with PipelineRun(pipe, {}) as run:
        pipe.encode_prompt("a fox", negative_prompt="a boat")
        assert run.text.kinds(PROMPT) == run.text.kinds(NEGATIVE) == (TextKind.UNKNOWN,)
    unwatch(pipe)
    assert type(pipe) is Pipeline


def test_skip_layer_guidance_is_refused_where_its_arguments_are_not_seen() -> None:
    model = MODELS["sd3"]
    pipe = model.build()
    given = model.call(4, 4, 1, True) | {"height": 4 * model.factor, "width": 4 * model.factor}
    call = type(pipe).__call__
    given |= {"num_inference_steps": 3, "skip_guidance_layers": [0], "skip_layer_guidance_stop": 1.0}
    with guide(pipe, SEG(layers=model.layers)), pytest.raises(ValueError, match="uses skip-layer guidance"):
        call(pipe, **given, output_type="latent")

# SPDX-License-Identifier: Apache-2.0
"""A guided pipeline keeps its class, signature, copies, callbacks and memory use."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.callbacks import MultiPipelineCallbacks, SDXLCFGCutoffCallback

from segkern.integrations.diffusers import PAG, SEG, guide
from tests.diffusers.slow_guidance import conditions, looped_run, perturbed_attention, self_attentions, unet_places
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline

SPEC = SEG(3.0, 1.0)


@lru_cache
def slow() -> torch.Tensor:
    return looped_run(tiny_pipeline(), [SPEC], latents=noise())


class Meta(type):
    """A user's metaclass."""


class WithSlots(StableDiffusionXLPipeline, metaclass=Meta):
    __slots__ = ("extra",)


def test_what_is_asked_of_a_guided_pipeline(tmp_path: Path) -> None:
    pipe = tiny_pipeline(own_unet=True)
    original, plain = type(pipe), run(pipe, latents=noise())
    with guide(pipe, SPEC):
        assert type(pipe).__name__ == original.__name__
        assert isinstance(pipe, original)
        assert inspect.signature(type(pipe).__call__) == inspect.signature(original.__call__)
        assert type(original.from_pipe(pipe)) is type(type(pipe).from_pipe(pipe)) is original
        copied = copy.deepcopy(pipe)
        assert type(copied) is original
        assert torch.equal(run(copied, latents=noise()), plain)
        pipe.save_pretrained(tmp_path)
        assert type(type(pipe).from_pretrained(tmp_path)) is original
        assert pipe.to(torch.float32) is pipe
        assert relative(run(pipe, latents=noise()), slow()) < PIPELINE_TOLERANCE
    assert type(pipe) is original


def test_a_class_with_slots_and_a_metaclass() -> None:
    pipe = tiny_pipeline(WithSlots, own_unet=True)
    with guide(pipe, SPEC):
        assert relative(run(pipe, latents=noise()), slow()) < PIPELINE_TOLERANCE
    assert type(pipe) is WithSlots


def test_a_call_that_is_a_generator() -> None:
    class Yields(StableDiffusionXLPipeline):
        def __call__(self, *args: Any, **kwargs: Any) -> Iterator[Any]:  # type: ignore[override]
            yield StableDiffusionXLPipeline.__call__(self, *args, **kwargs)

    pipe, latents = tiny_pipeline(Yields, own_unet=True), noise()
    size = {"height": 16 * pipe.vae_scale_factor, "width": 16 * pipe.vae_scale_factor, "num_inference_steps": 3}
    with guide(pipe, SPEC):
        (output,) = pipe("a red fox", latents=latents, guidance_scale=5.0, output_type="latent", **size)
    assert relative(output.images, slow()) < PIPELINE_TOLERANCE


def test_a_guided_pipeline_is_freed_with_its_guidance() -> None:
    pipe = tiny_pipeline(own_unet=True)
    guide(pipe, SPEC)
    run(pipe, latents=noise())
    left = weakref.ref(pipe), weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert [reference() for reference in left] == [None, None]


def test_two_pipelines_with_one_denoiser_removed_in_the_order_they_came() -> None:
    first = tiny_pipeline(own_unet=True)
    second, latents = tiny_pipeline(unet=first.unet), noise()
    original, plain = type(first), run(first, latents=latents)
    guidances = guide(first, SPEC), guide(second, PAG())
    other = run(second, latents=latents)
    assert relative(run(first, latents=latents), slow()) < PIPELINE_TOLERANCE
    guidances[0].remove()
    assert torch.equal(run(first, latents=latents), plain)
    assert torch.equal(run(second, latents=latents), other)
    guidances[1].remove()
    assert torch.equal(run(second, latents=latents), plain)
    assert type(first) is type(second) is original


FORMS: dict[str, Callable[[Any], Any]] = {
    "object": lambda callback: callback,
    "several": lambda callback: MultiPipelineCallbacks([callback]),
    "function": lambda callback: lambda *arguments: callback.callback_fn(*arguments),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_callback_that_ends_classifier_free_guidance(form: str) -> None:
    pipe = tiny_pipeline(own_unet=True)
    cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    tensors = {"callback_on_step_end_tensor_inputs": cutoff.tensor_inputs} if form == "function" else {}

    def draw() -> torch.Tensor:
        return run(pipe, latents=noise(), callback_on_step_end=FORMS[form](cutoff), **tensors)

    with guide(pipe, SPEC):
        output = draw()
    assert relative(output, cut_off(pipe)) < PIPELINE_TOLERANCE


@torch.no_grad()
def cut_off(pipe: Any) -> torch.Tensor:
    """Return latents of a slow loop with classifier-free guidance only in its first step."""
    x, modules = noise(), self_attentions(pipe.unet, ["mid_block*"])
    conditional, unconditional = conditions(pipe, "a red fox", x, 1, True)
    pipe.scheduler.set_timesteps(3)
    x = x * pipe.scheduler.init_noise_sigma
    for i, t in enumerate(pipe.scheduler.timesteps):
        scaled = pipe.scheduler.scale_model_input(x, t)
        c = guided = pipe.unet(scaled, t, **conditional).sample
        if i == 0:
            u = pipe.unet(scaled, t, **unconditional).sample
            guided = u + 5.0 * (c - u)
        with perturbed_attention(pipe.unet, dict.fromkeys(modules, SPEC.sigma), unet_places((16, 16))):
            p = pipe.unet(scaled, t, **conditional).sample
        x = pipe.scheduler.step(guided + SPEC.scale * (c - p), t, x).prev_sample
    return x

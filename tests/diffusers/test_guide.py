# SPDX-License-Identifier: Apache-2.0
"""Guidance on the stock pipeline: it computes the method's formula, shares branches, and acts only in its steps."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.probes import batches_seen
from tests.diffusers.slow_guidance import looped_run
from tests.diffusers.small_pipelines import (
    PIPELINE_TOLERANCE,
    noise,
    relative,
    run,
    tiny_pipeline,
    tiny_pipeline_of_embeddings,
)

CASES: dict[str, tuple[list[SEG], dict[str, Any]]] = {
    "landscape": ([SEG(sigma=1.0)], {"latents": noise(1, 18, 26)}),
    "portrait_infinite": ([SEG()], {"latents": noise(1, 26, 18)}),
    "odd_sizes": ([SEG(sigma=2.0, layers=["d2", "mid", "u0"])], {"latents": noise(1, 13, 19)}),
    "a_single_row": ([SEG(sigma=1.0)], {"latents": noise(1, 3, 17)}),
    "two_prompts": ([SEG(sigma=2.0)], {"prompt": ["a lake", "a fox"], "latents": noise(2)}),
    "two_images_per_prompt": (
        [SEG(sigma=2.0)],
        {"prompt": ["a lake", "a fox"], "num_images_per_prompt": 2, "latents": noise(4, 12, 16)},
    ),
    "rescaled": ([SEG(sigma=2.0)], {"guidance_rescale": 0.7, "latents": noise()}),
    "rescaled_infinite_two_prompts": (
        [SEG(layers="up")],
        {"prompt": ["a lake", "a fox"], "guidance_rescale": 0.3, "latents": noise(2)},
    ),
    "without_cfg": ([SEG(sigma=2.0)], {"guidance_scale": 1.0, "latents": noise(1, 18, 26)}),
    "without_cfg_batch": (
        [SEG(layers=["d0", "u8"])],
        {"prompt": ["a lake", "a fox"], "guidance_scale": 0.0, "latents": noise(2)},
    ),
    "every_layer": ([SEG(scale=1.0, sigma=1.0, layers=["down", "mid", "up"])], {"latents": noise()}),
    "negative_scale": ([SEG(scale=-1.0, sigma=2.0)], {"latents": noise()}),
    "specs_joining_at_different_blocks": (
        [SEG(1.0, 1.0, "up"), SEG(2.0, math.inf, "d1"), SEG(0.5, 3.0, "mid")],
        {"latents": noise(1, 18, 26)},
    ),
    "specs_on_the_same_layers": (
        [SEG(1.0, 1.0), SEG(1.0, math.inf)],
        {"latents": noise(2), "prompt": ["a", "b"]},
    ),
    "a_branch_serves_two_steps": ([SEG(sigma=2.0, reuse=2)], {"latents": noise(), "num_inference_steps": 5}),
    "a_branch_serves_three_steps_without_cfg": (
        [SEG(reuse=3, start=0.3)],
        {"latents": noise(2), "prompt": ["a", "b"], "guidance_scale": 1.0, "num_inference_steps": 5},
    ),
    "branches_serve_different_numbers_of_steps": (
        [SEG(1.0, 1.0, reuse=2), SEG(2.0, math.inf, "up", reuse=3), SEG(0.5, 2.0, "d1")],
        {"latents": noise(), "num_inference_steps": 5, "guidance_rescale": 0.5},
    ),
    "specs_taking_turns": (
        [
            SEG(1.0, 1.0, "mid", stop=0.5),
            SEG(2.0, math.inf, "up", start=0.5),
            SEG(1.0, 2.0, "d2", start=0.25, stop=0.75),
        ],
        {"latents": noise(), "num_inference_steps": 4},
    ),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", CASES)
def test_guided_runs_follow_the_formula(name: str) -> None:
    specs, arguments = CASES[name]
    pipe = tiny_pipeline()
    pipe.vae_scale_factor = 8  # like SDXL's, so that latents of any size correspond to whole pixels
    expected = looped_run(pipe, specs, **arguments)
    for share in (True, False):
        with guide(pipe, *specs, share=share):
            assert relative(run(pipe, **arguments), expected) < PIPELINE_TOLERANCE
    assert relative(run(pipe, **arguments), expected) > 1e-3, "the case does not detect guidance"


@settings(max_examples=8)
@given(
    st.integers(3, 24),
    st.integers(3, 24),
    st.sampled_from([0.5, 1.0, 3.0, math.inf]),
    st.sampled_from(["down", "mid", "up", "d3", "u8"]),
    st.sampled_from([1.0, 4.0]),
)
def test_every_size_is_guided_on_its_own_grid(
    height: int, width: int, sigma: float, layers: str, guidance_scale: float
) -> None:
    pipe, specs = tiny_pipeline(), [SEG(2.0, sigma, layers)]
    pipe.vae_scale_factor = 8
    arguments: dict[str, Any] = {
        "latents": noise(1, height, width),
        "num_inference_steps": 1,
        "guidance_scale": guidance_scale,
    }
    with warnings.catch_warnings():
        # A grid of one token cannot be blurred.
        warnings.filterwarnings("ignore", "SEG.*had no effect")
        with guide(pipe, *specs) as guidance:
            output = run(pipe, **arguments)
        assert all(layer.fired == 1 for layer in guidance.report().layers)
    assert relative(output, looped_run(pipe, specs, **arguments)) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("boundary", ["symmetric", "circular"])
def test_the_boundary_reaches_the_layers(boundary: str) -> None:
    pipe, latents = tiny_pipeline(), noise()
    with guide(pipe, SEG(sigma=2.0)):
        reflected = run(pipe, latents=latents)
    with guide(pipe, SEG(sigma=2.0, boundary=boundary)):
        assert relative(run(pipe, latents=latents), reflected) > 1e-4


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("sigma", [2.0, math.inf], ids=str)
def test_half_precision_stays_as_near_to_float32_as_the_stock_run(dtype: torch.dtype, sigma: float) -> None:
    pipe, texts = tiny_pipeline_of_embeddings()
    guided, stock = [], []
    for to in (torch.float32, dtype):
        pipe.unet.to(to)
        arguments = {
            "prompt": None,
            "latents": noise(1, 20, 28).to(to),
            **{k: v.to(to) for k, v in texts.items()},
        }
        with guide(pipe, SEG(sigma=sigma)):
            guided.append(run(pipe, **arguments))
        stock.append(run(pipe, **arguments))
    assert guided[1].dtype == dtype
    assert relative(guided[1], guided[0]) < 2 * relative(stock[1], stock[0])


def test_without_sharing_every_block_sees_every_branch() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(), share=False):
        seen = batches_seen(pipe, lambda: run(pipe, latents=noise(), guidance_scale=1.0))
    assert set(map(tuple, seen.values())) == {(2,)}


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "scheduler, steps, forwards, guided",
    [
        (None, 8, 8, [2, 3, 4, 5]),
        (DDIMScheduler, 4, 4, [1, 2]),
        (EulerAncestralDiscreteScheduler, 4, 4, [1, 2]),
        (HeunDiscreteScheduler, 4, 7, [2, 3, 4, 5]),
    ],
    ids=["euler", "ddim", "ancestral", "heun"],
)
def test_start_and_stop_are_fractions_of_the_denoisers_calls(
    scheduler: Any, steps: int, forwards: int, guided: list[int]
) -> None:
    pipe, calls = tiny_pipeline(), []
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    handle = pipe.unet.up_blocks[0].register_forward_hook(lambda module, args, output: calls.append(len(output)))
    with guide(pipe, SEG(start=0.25, stop=0.75)):
        for _ in range(2):  # the second run begins with its own first step
            calls.clear()
            run(pipe, latents=noise(), num_inference_steps=steps, generator=torch.manual_seed(0))
            assert calls == [3 if step in guided else 2 for step in range(forwards)]
    handle.remove()


@pytest.mark.one_in(4)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "not_shared"])
@pytest.mark.parametrize(
    "spec", [SEG(start=0.5), SEG(scale=0.0), SEG(sigma=0.0)], ids=["before_start", "no_scale", "no_sigma"]
)
def test_an_inactive_step_is_the_plain_step_bit_for_bit(spec: SEG, share: bool) -> None:
    pipe, latents = tiny_pipeline(), noise()
    steps: list[torch.Tensor] = []

    def record(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(values["latents"])
        return values

    run(pipe, latents=latents, num_inference_steps=4, callback_on_step_end=record)
    plain = list(steps)
    steps.clear()
    guidance = guide(pipe, spec, share=share)
    seen = batches_seen(pipe, lambda: run(pipe, latents=latents, num_inference_steps=4, callback_on_step_end=record))
    with pytest.warns(UserWarning, match="fired in none") if not spec.active(0.75) else nullcontext():
        guidance.remove()
    inactive = 2 if spec.active(0.75) else 4
    for step in range(4):
        assert torch.equal(steps[step], plain[step]) == (step < inactive)
    assert seen["up_blocks.0"] == ({2, 3} if inactive == 2 else {2})


def test_a_callback_may_edit_latents_and_switch_classifier_free_guidance_off() -> None:
    pipe, latents = tiny_pipeline(), noise()

    def switch(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        values["latents"] = values["latents"] * 1.01
        if step == 1:
            pipe._guidance_scale = 0.0
            for name in ("prompt_embeds", "add_text_embeds", "add_time_ids"):
                values[name] = values[name].chunk(2)[1]
        return values

    names = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    arguments: dict[str, Any] = {
        "num_inference_steps": 4,
        "callback_on_step_end": switch,
        "callback_on_step_end_tensor_inputs": names,
    }
    outputs = []
    for share in (True, False):
        with guide(pipe, SEG(sigma=2.0), share=share):
            seen = batches_seen(pipe, lambda: outputs.append(run(pipe, latents=latents, **arguments)))
        assert seen["up_blocks.0"] == {3, 2}
    assert relative(outputs[0], outputs[1]) < PIPELINE_TOLERANCE
    plain = run(pipe, latents=latents, **arguments)
    assert relative(outputs[0], plain) > 1e-3


def test_both_containers_of_the_prediction_are_kept() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(), cfg="batch") as guidance, guidance.run([500]):
        arguments = {
            "sample": noise(1).repeat(2, 1, 1, 1),
            "timestep": torch.tensor(500),
            "encoder_hidden_states": torch.randn(2, 7, 64),
            "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.zeros(2, 6)},
        }
        with torch.no_grad():
            as_object = pipe.unet(**arguments)
            (as_tuple,) = pipe.unet(**arguments, return_dict=False)
            positional = pipe.unet(
                *[arguments[k] for k in ("sample", "timestep", "encoder_hidden_states")],
                added_cond_kwargs=arguments["added_cond_kwargs"],
            )
    assert type(as_object).__name__ == "UNet2DConditionOutput"
    assert torch.equal(as_object.sample, as_tuple)
    assert torch.equal(positional.sample, as_tuple)
    assert as_tuple.shape == (2, 4, 16, 16)

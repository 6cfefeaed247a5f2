# SPDX-License-Identifier: Apache-2.0
"""A compiled denoiser gives the eager one's latents under guidance and is not compiled at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers_tools import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from torch._dynamo.testing import CompileCounter

from segkern.integrations.diffusers import SEG, guide


def smaller_pipeline() -> Any:
    """A pipeline whose denoiser has few layers, because tracing takes seconds."""
    torch.manual_seed(0)
    config = {
        **tiny_pipeline().unet.config,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 2,
    }
    return tiny_pipeline(unet=UNet2DConditionModel.from_config(config).eval())


def wrapped(pipe: Any, backend: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)


def in_place(pipe: Any, backend: Any) -> None:
    pipe.unet.compile(backend=backend, fullgraph=True)


def repeated_blocks(pipe: Any, backend: Any) -> None:
    pipe.unet.compile_repeated_blocks(backend=backend, fullgraph=True)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "compile_, spec",
    [
        (wrapped, SEG(sigma=2.0, layers="m0", start=0.3)),
        (in_place, SEG(layers="m0")),
        (repeated_blocks, SEG(layers="m0", start=0.3)),
    ],
    ids=["wrapped", "in_place", "repeated_blocks"],
)
def test_a_compiled_denoiser_is_guided_and_left_alone_afterwards(
    compile_: Callable[[Any, Any], None], spec: SEG
) -> None:
    pipe, latents, counter = smaller_pipeline(), noise(), CompileCounter()
    plain = run(pipe, latents=latents)
    with guide(pipe, spec):
        guided = run(pipe, latents=latents)
    compile_(pipe, counter)
    compiled = []
    for _ in range(2):
        assert relative(run(pipe, latents=latents), plain) < PIPELINE_TOLERANCE
        with guide(pipe, spec) as guidance:
            assert relative(run(pipe, latents=latents), guided) < PIPELINE_TOLERANCE
        assert guidance.report().layers[0].fired == (2 if spec.start else 3)
        compiled.append(counter.frame_count)
    assert relative(run(pipe, latents=latents), plain) < PIPELINE_TOLERANCE
    assert 0 < compiled[0] == compiled[1] == counter.frame_count, "a second run needs no compilation"


def test_another_guidance_does_not_run_what_was_compiled_for_the_last_one() -> None:
    pipe, latents = smaller_pipeline(), noise()
    guidances = [[SEG(sigma=2.0, layers="m0")], [SEG(layers="m0"), SEG(1.0, math.inf, "u0")]]
    expected = []
    for specs in guidances:
        with guide(pipe, *specs):
            expected.append(run(pipe, latents=latents, num_inference_steps=1))
    wrapped(pipe, "eager")
    for specs, output in zip(guidances, expected, strict=True):
        with guide(pipe, *specs):
            assert relative(run(pipe, latents=latents, num_inference_steps=1), output) < PIPELINE_TOLERANCE


def test_compiling_inside_the_context() -> None:
    pipe, latents = smaller_pipeline(), noise()
    denoiser = pipe.unet
    with guide(pipe, SEG(layers="m0")):
        expected = run(pipe, latents=latents)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    assert not denoiser._forward_hooks


def test_a_compiled_denoiser_is_guided_at_every_size() -> None:
    pipe = smaller_pipeline()
    sizes = [(16, 16), (12, 20), (20, 12), (8, 24)]
    with guide(pipe, SEG(sigma=2.0, layers="m0")):
        expected = [run(pipe, latents=noise(1, *size), num_inference_steps=1) for size in sizes]
    counter = CompileCounter()
    wrapped(pipe, counter)
    with guide(pipe, SEG(sigma=2.0, layers="m0")):
        for size, output in zip(sizes, expected, strict=True):
            found = run(pipe, latents=noise(1, *size), num_inference_steps=1)
            assert relative(found, output) < PIPELINE_TOLERANCE
    assert counter.frame_count < len(sizes), "sizes do not share what was compiled"

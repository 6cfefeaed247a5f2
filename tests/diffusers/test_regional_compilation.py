# SPDX-License-Identifier: Apache-2.0
"""Blocks compiled one by one have the uncompiled latents under guidance at every size, and compilation stops."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, guide
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, smaller_pipeline, tiny_pipeline
from tests.diffusers.small_pipelines import run as run_unet
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer

Draw = Callable[[Any, tuple[int, ...]], torch.Tensor]
SIZES = [(8, 8), (16, 8), (8, 24)]


pytestmark = pytest.mark.slow  # test_compile.py has a quick case


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def repeated(model: Any, backend: Any) -> None:
    model.compile_repeated_blocks(backend=backend, fullgraph=True)


def each(pattern: str) -> Callable[[Any, Any], None]:
    """Return a function that compiles every module with such a name separately."""

    def compile_(model: Any, backend: Any) -> None:
        for name, module in model.named_modules():
            if re.fullmatch(pattern, name):
                module.compile(backend=backend, fullgraph=True)

    return compile_


def draw_unet(pipe: Any, size: tuple[int, ...]) -> torch.Tensor:
    height, width, *samples = size
    count = samples[0] if samples else 1
    return run_unet(pipe, ["a red fox"] * count, latents=noise(count, height, width), num_inference_steps=2)


def check(pipe: Any, model: Any, compile_: Any, draw: Draw, specs: Sequence[Any], sizes: Sequence[Any]) -> list[int]:
    """Return the graphs of the first run of each size and of unguided runs; later runs must not compile."""

    def drawn() -> list[torch.Tensor]:
        outputs = []
        with guide(pipe, *specs):
            for size in sizes:
                outputs.append(draw(pipe, size))
                made.append(counter.frame_count)
        outputs.append(draw(pipe, sizes[0]))
        made.append(counter.frame_count)
        return outputs

    counter = CompileCounter()
    made = [0]
    expected = drawn()
    compile_(model, counter)
    made = [0]
    for again in range(2):
        if again:
            first, made = made, made[-1:]
        for output, eager in zip(drawn(), expected, strict=True):
            assert relative(output, eager) < PIPELINE_TOLERANCE
    assert first[1] > 0
    assert made == made[:1] * len(made), "every run compiles again"
    assert not any("forward" in vars(module) for module in model.modules())
    return first


@pytest.mark.parametrize(
    "specs",
    [
        [SEG(sigma=1.5, layers="m0", start=0.4)],
        [SEG(layers="m0")],
        [PAG(layers="m0"), SEG(sigma=1.0, layers="u0", blend=0.5)],
        [SAG()],
    ],
    ids=["SEG", "SEG at infinity", "PAG and SEG", "SAG"],
)
def test_repeated_blocks_of_a_unet(specs: Sequence[Any]) -> None:
    pipe = smaller_pipeline()
    check(pipe, pipe.unet, repeated, draw_unet, specs, SIZES)


@pytest.mark.parametrize("specs", [[SEG(sigma=1.5)], [SEG()], [PAG(layers=["d0", "mid", "u0"])]], ids=str)
def test_more_blocks(specs: Sequence[Any]) -> None:
    pipe = tiny_pipeline(own_unet=True)
    first = check(pipe, pipe.unet, repeated, draw_unet, specs, [*SIZES, (16, 24), (24, 24)])
    assert first[3] == first[5], "sizes do not share compiled code"


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_repeated_blocks_of_a_transformer(name: str) -> None:
    model = MODELS[name]
    pipe = model.build()

    def draw(pipe: Any, size: tuple[int, ...]) -> torch.Tensor:
        return run_transformer(model, pipe, *size, num_inference_steps=1)

    specs = [SEG(sigma=1.5, layers=model.layers)]
    first = check(pipe, pipe.transformer, repeated, draw, specs, [(6, 4), (8, 6), (4, 8), (8, 8)])
    assert first[3] == first[4], "sizes do not share compiled code"


@pytest.mark.parametrize("pattern", [r".*attn1", r"mid_block", r"(up|down)_blocks\.\d|.*resnets\.\d"])
def test_other_parts(pattern: str) -> None:
    pipe = smaller_pipeline()
    specs = [SEG(sigma=1.0, layers="m0"), PAG(layers="u0")]
    check(pipe, pipe.unet, each(pattern), draw_unet, specs, SIZES[:2])


def test_kinds_of_guidance_do_not_use_up_the_recompile_limit() -> None:
    """The limit of dynamo is 8 per function."""
    pipe = smaller_pipeline()
    guidances: list[list[Any]] = [[SEG(sigma=1.0, layers=layer)] for layer in ("d0", "m0", "u0")]
    guidances += [[PAG(layers="d0"), SEG(layers=layer)] for layer in ("d0", "m0", "u0")]
    guidances += [[CFG(negative_prompt="blurry"), SEG(layers="u0")]]

    def drawn() -> list[torch.Tensor]:
        outputs = []
        for specs in guidances:
            with guide(pipe, *specs):
                scale = 1.0 if isinstance(specs[0], CFG) else 5.0
                given = {"num_inference_steps": 1, "guidance_scale": scale}
                outputs += [run_unet(pipe, latents=noise(1, *size), **given) for size in SIZES[:2]]
        return outputs

    expected = drawn()
    repeated(pipe.unet, "eager")
    for output, eager in zip(drawn(), expected, strict=True):
        assert relative(output, eager) < PIPELINE_TOLERANCE


def test_a_copy_made_in_the_midst_of_a_forward_is_plain() -> None:
    pipe, other = smaller_pipeline(), smaller_pipeline()
    plain = draw_unet(other, (8, 8))
    repeated(pipe.unet, "eager")
    copies: list[Any] = []

    def copying(*_: Any) -> None:
        handle.remove()
        copies.append(copy.deepcopy(pipe.unet))

    with guide(pipe, SEG(layers=["m0", "u0"])):
        handle = pipe.unet.mid_block.register_forward_hook(copying)
        draw_unet(pipe, (8, 8))
    other.unet = copies[0]
    assert torch.equal(draw_unet(other, (8, 8)), plain)


def test_gradients_under_checkpointing() -> None:
    pipe = smaller_pipeline()
    call: Any = type(pipe).__call__
    parameter = next(iter(pipe.unet.mid_block.parameters()))

    def gradient() -> torch.Tensor:
        given = {"prompt": "a red fox", "latents": noise(1, 8, 8), "num_inference_steps": 1, "output_type": "latent"}
        side = 8 * pipe.vae_scale_factor
        with guide(pipe, SEG(sigma=1.0, layers="m0")):
            latents = call.__wrapped__(pipe, height=side, width=side, **given).images
        parameter.grad = None
        latents.square().sum().backward()
        assert parameter.grad is not None
        return parameter.grad

    expected = gradient()
    pipe.unet.enable_gradient_checkpointing()
    repeated(pipe.unet, "eager")
    assert relative(gradient(), expected) < PIPELINE_TOLERANCE

# SPDX-License-Identifier: Apache-2.0
"""Users' forward hooks on parts that run with branches: allowed if they only observe or are trusted, else refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import PAG, SAG, SEG, SEGGuider, guide
from tests.diffusers.modular_pipelines import modular_sdxl, run_sdxl
from tests.diffusers.probes import hooks_of
from tests.diffusers.slow_guidance import looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer

RESNET = "up_blocks.0.resnets.1"
BLOCK = "mid_block.attentions.0.transformer_blocks.0"
LATENTS = noise(1, 8, 12)


def halved(x: torch.Tensor) -> torch.Tensor:
    half = len(x) // 2
    return torch.cat([0.5 * x[:half], x[half:]])


def changes_output(module: Any, args: Any, output: Any) -> Any:
    return halved(output)


def changes_input(module: Any, args: Any) -> Any:
    return halved(args[0]), *args[1:]


def changes_named(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args, kwargs | {"encoder_hidden_states": halved(kwargs["encoder_hidden_states"])}


def writes_to_output(module: Any, args: Any, output: Any) -> None:
    output[: len(output) // 2] *= 0.5


def strengthened(module: Any, args: Any, output: Any) -> Any:
    return 1.5 * output


def same(module: Any, args: Any, output: Any) -> Any:
    return output


def same_input(module: Any, args: Any) -> Any:
    return args


def hooked(unet: Any, name: str, hook: Callable[..., Any]) -> None:
    part = unet.get_submodule(name)
    if "input" in hook.__name__:
        part.register_forward_pre_hook(hook)
    elif "named" in hook.__name__:
        part.register_forward_pre_hook(hook, with_kwargs=True)
    else:
        part.register_forward_hook(hook)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("spec", [SEG(), PAG(layers="m0"), SAG()], ids=str)
@pytest.mark.parametrize(
    ("name", "hook"),
    [
        (RESNET, changes_output),
        (RESNET, changes_input),
        (BLOCK, changes_named),
        (RESNET, writes_to_output),
        ("up_blocks.0.attentions.0.transformer_blocks.0.attn2", changes_output),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_one_that_changes_something_is_refused(name: str, hook: Any, spec: Any) -> None:
    pipe = tiny_pipeline(own_unet=True)
    hooked(pipe.unet, name, hook)
    hooks = hooks_of(pipe.unet)
    message = rf"{name} of .* changes its inputs or outputs, .*{hook.__name__}.*trust=\[{hook.__name__}\]"
    with pytest.raises(ValueError, match=message), torch.inference_mode(hook is changes_input), guide(pipe, spec):
        run(pipe, latents=LATENTS)
    assert hooks_of(pipe.unet) == hooks


@pytest.mark.parametrize("hook", [same, same_input])
def test_one_that_looks_on_is_allowed(hook: Any) -> None:
    pipe = tiny_pipeline(own_unet=True)
    with guide(pipe, SEG()):
        expected = run(pipe, latents=LATENTS)
        hooked(pipe.unet, RESNET, hook)
        hooked(pipe.unet, BLOCK, hook)
        assert torch.equal(run(pipe, latents=LATENTS), expected)


@pytest.mark.parametrize(
    ("name", "trust"), [(RESNET, [strengthened]), ("down_blocks.1.resnets.0", [])], ids=["trusted", "without branches"]
)
def test_one_that_treats_every_sample_alike(name: str, trust: Any) -> None:
    pipe = tiny_pipeline(own_unet=True)
    hooked(pipe.unet, name, strengthened)
    with guide(pipe, SEG(sigma=1.0), trust=trust):
        guided = run(pipe, latents=LATENTS)
    slow = looped_run(pipe, [SEG(sigma=1.0)], latents=LATENTS)
    assert relative(guided, slow) < PIPELINE_TOLERANCE


def test_guiders_and_transformers() -> None:
    pipe = tiny_pipeline(own_unet=True)
    hooked(pipe.unet, RESNET, changes_output)
    with pytest.raises(ValueError, match=r"changes_output.*guider.trust = \[changes_output\]"):
        run_sdxl(modular_sdxl(pipe, SEGGuider(guidance_scale=5.0)), pipe, latents=LATENTS)
    model = MODELS["qwen-image"]
    other = model.build()

    def shifted(module: Any, args: Any, output: Any) -> Any:
        return output[0], halved(output[1])

    other.transformer.transformer_blocks[2].register_forward_hook(shifted)
    with pytest.raises(ValueError, match=r"transformer_blocks.2 .*shifted"), guide(other, SEG(layers=model.layers)):
        run_transformer(model, other)

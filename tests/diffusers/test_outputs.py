# SPDX-License-Identifier: Apache-2.0
"""A guided denoiser's output: its type, all its fields, and the size of the pipeline's batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel, UNet2DConditionOutput

from segkern.integrations.diffusers import CFG, PAG, SEG, guide
from tests.diffusers.small_pipelines import noise, relative, run, tiny_pipeline
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer


@dataclass
class Telling(UNet2DConditionOutput):
    """A prediction, its square for each sample, and values that belong to no sample."""

    energies: torch.Tensor | None = None
    features: list[torch.Tensor] | None = None
    name: str = "telling"
    losses: torch.Tensor | None = None


class Named(NamedTuple):
    """The same output as a named tuple."""

    sample: torch.Tensor
    energies: torch.Tensor
    features: list[torch.Tensor]
    name: str
    losses: torch.Tensor


LOSSES = torch.arange(7.0)


def told(sample: torch.Tensor) -> dict[str, Any]:
    energies = sample.square().sum((1, 2, 3))
    return {"energies": energies, "features": [energies], "name": "mine", "losses": LOSSES}


KINDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "output": lambda x: Telling(sample=x, **told(x)),
    "tuple": lambda x: (x, *told(x).values()),
    "list": lambda x: [x, *told(x).values()],
    "named tuple": lambda x: Named(x, **told(x)),
}


@pytest.mark.one_in(5)
@pytest.mark.parametrize("images", [1, pytest.param(2, marks=pytest.mark.robustness)])
@pytest.mark.parametrize("specs", [(PAG(),), (PAG(stop=0.5),), (SEG(layers="up"), PAG())], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_further_fields_stay_and_are_of_the_pipelines_own_batch(kind: str, specs: Any, images: int) -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise(images)
    prompts = ["a red fox"] * images
    with guide(pipe, *specs):
        expected = run(pipe, prompts, latents=latents)
    given: list[Any] = []
    with guide(pipe, *specs):
        # The first hook after the forward replaces the output, and the last one sees the result.
        first = pipe.unet.register_forward_hook(lambda m, a, output: KINDS[kind](output[0]), prepend=True)
        last = pipe.unet.register_forward_hook(lambda m, a, output: given.append(output))
        assert relative(run(pipe, prompts, latents=latents), expected) == 0.0
        first.remove()
        last.remove()
    for output in given:
        fields = output if isinstance(output, (tuple, list)) else output.to_tuple()
        sample, energies, features, name, losses = fields
        assert type(output) is type(KINDS[kind](sample))
        assert len(sample) == len(energies) == len(features[0]) == 2 * images
        assert name == "mine"
        assert losses is LOSSES


def test_an_output_of_an_unknown_kind_is_refused_by_name() -> None:
    pipe = tiny_pipeline(own_unet=True)
    guidance = guide(pipe, PAG())
    handle = pipe.unet.register_forward_hook(lambda m, a, output: {"sample": output[0]}, prepend=True)
    with pytest.raises(RuntimeError, match="returned a dict"):
        run(pipe, latents=noise())
    handle.remove()
    run(pipe, latents=noise())
    guidance.remove()


@pytest.mark.parametrize("stop", [1.0, 0.5])
def test_an_output_of_another_batch_is_refused_in_plain_steps_too(stop: float) -> None:
    """Simulates a cache that returns the result of an earlier guided call."""
    pipe, kept = tiny_pipeline(own_unet=True), []

    def again(module: Any, args: Any, output: Any) -> Any:
        kept.append(output)
        return kept[0]

    with guide(pipe, PAG(stop=stop)):
        pipe.unet.register_forward_hook(again, prepend=True)
        if stop == 1.0:
            run(pipe, latents=noise())
        else:
            with pytest.raises(RuntimeError, match="UNet2DConditionModel returned 3 predictions for a batch of 2"):
                run(pipe, latents=noise())


def test_a_call_for_the_negative_prompt_keeps_further_fields() -> None:
    model = MODELS["flux"]
    pipe, given = model.build(), []
    with guide(pipe, PAG(layers=model.layers)):
        pipe.transformer.register_forward_hook(lambda m, a, output: (output[0], LOSSES), prepend=True)
        pipe.transformer.register_forward_hook(lambda m, a, output: given.append(output))
        run_transformer(model, pipe)
    assert len(given) == 6
    assert all(len(output[0]) == 1 and output[1] is LOSSES for output in given)


def test_cfg_of_our_own_keeps_further_fields() -> None:
    pipe, given = tiny_pipeline(own_unet=True), []
    with guide(pipe, CFG(scale=3.0, negative_prompt="a boat")):
        pipe.unet.register_forward_hook(lambda m, a, output: KINDS["output"](output[0]), prepend=True)
        pipe.unet.register_forward_hook(lambda m, a, output: given.append(output))
        run(pipe, latents=noise(), guidance_scale=1.0)
    assert isinstance(pipe.unet, UNet2DConditionModel)
    assert all(len(output.sample) == len(output.energies) == 1 and output.name == "mine" for output in given)

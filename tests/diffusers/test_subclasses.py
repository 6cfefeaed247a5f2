# SPDX-License-Identifier: Apache-2.0
"""Subclasses of diffusers' denoisers and blocks: arguments are found in any signature, or the class is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, StableDiffusionXLPAGPipeline, UNet2DConditionModel
from torch import nn

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, guide, list_layers
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.test_pag_pipelines import other
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer

pytestmark = pytest.mark.robustness

FLUX = MODELS["flux"]


class PassesOn(UNet2DConditionModel):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class NamesSome(UNet2DConditionModel):
    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(sample, *args, **kwargs)


class NamesByKeyword(UNet2DConditionModel):
    def forward(self, sample: torch.Tensor, timestep: Any, **kwargs: Any) -> Any:
        return super().forward(sample, timestep, **kwargs)


class OfASubclass(PassesOn):
    def forward(self, *inputs: Any, **rest: Any) -> Any:
        return super().forward(*inputs, **rest)


class OnlyAMethod(UNet2DConditionModel):
    def size(self) -> int:
        return 1


class OtherNames(UNet2DConditionModel):
    def forward(self, x: torch.Tensor, t: Any, encoder_hidden_states: Any = None, **kwargs: Any) -> Any:
        return super().forward(x, t, encoder_hidden_states, **kwargs)


class OtherText(UNet2DConditionModel):
    def forward(self, sample: torch.Tensor, timestep: Any, context: Any = None, **kwargs: Any) -> Any:
        return super().forward(sample, timestep, kwargs.pop("encoder_hidden_states", context), **kwargs)


SPECS = {"PAG": PAG(), "SEG": SEG(sigma=1.0, layers=["down", "up"]), "SAG": SAG(), "CFG": CFG(negative_prompt="a boat")}


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "kind",
    [PassesOn, NamesSome, NamesByKeyword, OfASubclass, OnlyAMethod],
)
def test_subclasses_of_a_unet(kind: type, spec: str, share: bool) -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    scale = {"guidance_scale": 1.0} if spec == "CFG" else {}
    with guide(pipe, SPECS[spec], share=share):
        expected = run(pipe, latents=latents, **scale)
    pipe.unet.__class__ = kind
    trust = [kind] if "forward" in vars(kind) else []
    with guide(pipe, SPECS[spec], share=share, trust=trust):
        assert torch.equal(run(pipe, latents=latents, **scale), expected)
    if trust:
        with pytest.raises(ValueError, match=rf"this {kind.__name__} is a \S+{kind.__name__}, .*trust="):
            guide(pipe, SPECS[spec])


@pytest.mark.parametrize(("kind", "words"), [(OtherNames, "'x' in the place of 'sample'"), (OtherText, "'context'")])
def test_other_names_are_refused_with_their_signature(kind: type, words: str) -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.__class__ = kind
    with pytest.raises(ValueError, match=rf"{kind.__name__}.forward\(self, .*{words}"):
        guide(pipe, PAG(), trust=[kind])


def test_a_subclass_of_a_transformer() -> None:
    class Mine(FluxTransformer2DModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    pipe = FLUX.build()
    with guide(pipe, PAG(layers=FLUX.layers)):
        expected = run_transformer(FLUX, pipe)
    names = [layer.name for layer in list_layers(pipe)]
    pipe.transformer.__class__ = Mine
    assert [layer.name for layer in list_layers(pipe)] == names
    with guide(pipe, PAG(layers=FLUX.layers), trust=[Mine]):
        assert torch.equal(run_transformer(FLUX, pipe), expected)


def test_a_class_of_another_package_with_a_known_name_is_refused() -> None:
    pipe = FLUX.build()
    pipe.transformer = type("FluxTransformer2DModel", (nn.Module,), {})()
    with pytest.raises(ValueError, match=r"got FluxPipeline with a FluxTransformer2DModel from .*, which is neither"):
        guide(pipe, PAG())


class Around(nn.Module):
    """A mid block in a module that passes on all arguments."""

    has_cross_attention = True

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        self.attentions, self.resnets = block.attentions, block.resnets

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


class AroundByName(Around):
    def forward(self, hidden_states: Any, temb: Any = None, **kwargs: Any) -> Any:
        return self.block(hidden_states, temb, **kwargs)


def test_blocks_in_modules_of_another_class() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    expected = run(other(StableDiffusionXLPAGPipeline, pipe, "mid_block"), latents=latents, pag_scale=3.0)
    block = pipe.unet.mid_block
    pipe.unet.mid_block = Around(block)
    with pytest.raises(ValueError, match=r"of mid_block of .*Around.forward\(self, \*args.*'\*args' in the place of"):
        guide(pipe, PAG(), trust=[Around])
    pipe.unet.mid_block = AroundByName(block)
    with guide(pipe, PAG(), trust=[Around]):
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE


def test_a_block_that_passes_everything_on_to_its_base_class() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    expected = run(other(StableDiffusionXLPAGPipeline, pipe, "mid_block"), latents=latents, pag_scale=3.0)
    block: Any = pipe.unet.mid_block.attentions[0].transformer_blocks[0]

    class Mine(type(block)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    block.__class__ = Mine
    with guide(pipe, PAG(), trust=[Mine]):
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE

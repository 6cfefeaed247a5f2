# SPDX-License-Identifier: Apache-2.0
"""Processors that change while a pipeline is guided: supported between steps, refused within a step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from segkern.integrations.diffusers import PAG, SAG, SEG, guide, list_layers
from tests.diffusers.slow_guidance import Perturbed, self_attentions, transformer_run, unet_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, tiny_pipeline
from tests.diffusers.small_pipelines import run as run_unet
from tests.diffusers.transformer_cases import MODELS, run

pytestmark = pytest.mark.robustness

SIZE = (8, 12)
SPECS = {"blur": SEG(sigma=1.5), "mean": SEG(), "identity": PAG()}
ENTRIES = {"blur": 1.5, "mean": float("inf"), "identity": None}


def _xformers(pipe: Any) -> None:
    """Set xFormers only on the guided layers, which do not run it, because it is not installed everywhere."""
    for layer in list_layers(pipe):
        if layer.part == "mid":
            pipe.unet.get_submodule(layer.module).set_processor(XFormersAttnProcessor())


def _fused_and_unfused(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "slicing": lambda pipe: pipe.enable_attention_slicing(),
    "slicing, max": lambda pipe: pipe.enable_attention_slicing("max"),
    "slicing, 1": lambda pipe: pipe.enable_attention_slicing(1),
    "xformers": _xformers,
    "fused": lambda pipe: pipe.fuse_qkv_projections(),
    "fused and unfused": _fused_and_unfused,
    "default": lambda pipe: pipe.unet.set_default_attn_processor(),
    "one for all": lambda pipe: pipe.unet.set_attn_processor(AttnProcessor()),
}


def in_step(number: int, change: Callable[[Any], Any]) -> Callable[..., dict[str, Any]]:
    """Return a pipeline callback that changes the pipeline after a step."""

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == number:
            change(pipe)
        return values

    return callback


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("name", CHANGES)
def test_a_unets_processors_change_between_steps(name: str, kind: str) -> None:
    pipe, given = tiny_pipeline(own_unet=True), {"latents": noise(1, *SIZE)}
    slow = [Perturbed(3.0, ENTRIES[kind], self_attentions(pipe.unet, ["mid_block.*"]))]
    expected = unet_run(pipe, slow, lambda: run_unet(pipe, **given), SIZE, True)
    with guide(pipe, SPECS[kind]) as active:
        changed = run_unet(pipe, **given, callback_on_step_end=in_step(0, CHANGES[name]))
        assert relative(changed, expected) < PIPELINE_TOLERANCE
        assert {row.fired for row in active.report().layers} == {3}
        CHANGES[name](pipe)
        if name != "xformers":
            assert relative(run_unet(pipe, **given), expected) < PIPELINE_TOLERANCE
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        assert relative(run_unet(pipe, **given), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "pixart-sigma", "hunyuan-dit", "wan", "ltx-video"])
def test_a_transformers_processors_change_between_steps(name: str) -> None:
    model = MODELS[name]
    changes: dict[str, Callable[[Any], Any]] = {
        "slicing": lambda pipe: pipe.enable_attention_slicing("max"),  # no effect on transformers
        "fused": lambda pipe: pipe.transformer.fuse_qkv_projections(),
        "unfused": lambda pipe: pipe.transformer.unfuse_qkv_projections(),
        "default": lambda pipe: getattr(pipe.transformer, "set_default_attn_processor", lambda: None)(),
        "new ones": lambda pipe: pipe.transformer.set_attn_processor(
            {name: type(processor)() for name, processor in pipe.transformer.attn_processors.items()}
        ),
    }
    pipe = model.build()
    expected = transformer_run(model, pipe, [Perturbed(3.0, 1.5, model.modules)], lambda: run(model, pipe))
    with guide(pipe, SEG(sigma=1.5, layers=model.layers)) as active:
        for change in changes.values():
            if "callback_on_step_end" in type(pipe).__call__.__code__.co_varnames:
                changed = run(model, pipe, callback_on_step_end=in_step(0, change))
            else:
                change(pipe)
                changed = run(model, pipe)
            assert relative(changed, expected) < PIPELINE_TOLERANCE
    assert {row.fired for row in active.report().layers} == {3 * len(changes)}


@pytest.mark.parametrize("where", ["", "mid_block"])
@pytest.mark.parametrize("spec", [SEG(), PAG(), SAG()], ids=["SEG", "PAG", "SAG"])
def test_processors_that_a_hook_changes_before_the_layers_transformer(spec: Any, where: str) -> None:
    """The change is made by a user's hook that runs after the guidance hook."""
    pipe = tiny_pipeline(own_unet=True)
    with guide(pipe, spec):
        expected = run_unet(pipe, latents=noise(1, *SIZE))
    assert relative(_run_with_a_hook(pipe, spec, where), expected) < PIPELINE_TOLERANCE
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {SlicedAttnProcessor}


@pytest.mark.parametrize("spec", [SEG(), PAG(), SAG()], ids=["SEG", "PAG", "SAG"])
def test_processors_that_a_hook_changes_later_are_refused(spec: Any) -> None:
    pipe = tiny_pipeline(own_unet=True)
    own = dict(pipe.unet.attn_processors)
    plain = run_unet(pipe, latents=noise(1, *SIZE))
    with pytest.raises(RuntimeError, match=r"layer m0 .*was replaced by a .*SlicedAttnProcessor during.*between steps"):
        _run_with_a_hook(pipe, spec, "mid_block.attentions.0.transformer_blocks.0.norm1")
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {SlicedAttnProcessor}
    pipe.unet.set_attn_processor(own)
    assert torch.equal(run_unet(pipe, latents=noise(1, *SIZE)), plain)


def test_a_transformers_processors_that_a_hook_changes_are_refused() -> None:
    model = MODELS["pixart-sigma"]
    pipe = model.build()
    with pytest.raises(RuntimeError, match=r"layer b2 .*was replaced by a .*AttnProcessor during.*between steps"):
        _run_transformer_with_a_hook(model, pipe)


def _run_transformer_with_a_hook(model: Any, pipe: Any) -> None:
    with guide(pipe, SEG(layers=2)):
        pipe.transformer.register_forward_pre_hook(lambda *_: pipe.transformer.set_default_attn_processor())
        run(model, pipe)


def _run_with_a_hook(pipe: Any, spec: Any, where: str) -> torch.Tensor:
    with guide(pipe, spec):
        module = pipe.unet.get_submodule(where)
        handle = module.register_forward_pre_hook(lambda *_: pipe.unet.set_attention_slice("max"))
        try:
            return run_unet(pipe, latents=noise(1, *SIZE))
        finally:
            handle.remove()


def test_a_layer_that_is_replaced_by_another_is_refused() -> None:
    pipe = tiny_pipeline(own_unet=True)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[1]

    def replace(pipe: Any) -> None:
        block.attn1 = copy.deepcopy(block.attn1)

    with pytest.raises(RuntimeError, match=r"layer m1 .*did not run in a guided step.*replaced"), guide(pipe, SEG()):
        run_unet(pipe, latents=noise(1, *SIZE), callback_on_step_end=in_step(0, replace))

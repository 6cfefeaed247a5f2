# SPDX-License-Identifier: Apache-2.0
"""Guidance is removed without a trace, and unsupported pipelines are refused before they are modified."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
)

from segkern import Grid
from segkern.integrations.diffusers import SEG, Guidance, SEGAttnProcessor, guide, list_layers
from tests.diffusers.probes import batches_seen
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.subjects import Picture

MID0 = "mid_block.attentions.0.transformer_blocks.0.attn1"


def run_once(pipe: Any) -> tuple[torch.Tensor, Picture]:
    """Return the result of an unguided run and the state after it (a run sets attributes on the pipeline)."""
    return run(pipe, latents=noise()), Picture(pipe)


def test_leaving_the_context_puts_back_the_very_objects() -> None:
    pipe = tiny_pipeline()
    plain, state = run_once(pipe)
    processors = dict(pipe.unet.attn_processors)
    with guide(pipe, SEG(layers=["down", "mid", "up"])) as guidance:
        assert isinstance(guidance, Guidance)
        run(pipe, latents=noise())
        assert dict(pipe.unet.attn_processors) == processors  # also between calls
    state.assert_same(pipe)
    assert torch.equal(run(pipe, latents=noise()), plain)


def test_guidance_works_without_a_context_until_it_is_removed() -> None:
    pipe = tiny_pipeline()
    plain, state = run_once(pipe)
    guidance = guide(pipe, SEG())
    guided = run(pipe, latents=noise())
    assert relative(guided, plain) > 1e-3
    guidance.remove()
    guidance.remove()
    state.assert_same(pipe)
    assert torch.equal(run(pipe, latents=noise()), plain)
    with pytest.raises(RuntimeError, match="removed"), guidance:
        pass


def test_guidance_that_could_not_be_installed_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()
    _, state = run_once(pipe)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipe.unet, "register_forward_hook", fail)
    with pytest.raises(KeyboardInterrupt):
        guide(pipe, SEG())
    monkeypatch.undo()
    state.assert_same(pipe)
    with guide(pipe, SEG()) as guidance:
        run(pipe, latents=noise())
    assert guidance.report().layers[0].fired == 3


def _with_processor(processor: Any) -> Any:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.get_submodule(MID0).set_processor(processor)
    return pipe


class NoDenoiser:
    """Not a pipeline."""


class OtherDenoiser(NoDenoiser):
    """A pipeline whose unet is another model."""

    unet = torch.nn.Linear(2, 2)


class NoPipeline(NoDenoiser):
    """An object that has a denoiser and cannot be called."""

    unet = tiny_pipeline().unet


@pytest.mark.parametrize(
    "pipe, specs, quoted",
    [
        (NoDenoiser(), [SEG()], "NoDenoiser"),
        (tiny_pipeline().unet, [SEG()], "layout for a UNet2DConditionModel.*cfg='none'"),
        (OtherDenoiser(), [SEG()], "OtherDenoiser with a Linear"),
        (NoPipeline(), [SEG()], "NoPipeline is not callable"),
        (tiny_pipeline(), [], "at least one spec"),
        (tiny_pipeline(), ["mid"], "'mid'"),
        (tiny_pipeline(), [SEG(), SEG(layers="m9")], "'m9'"),
        (tiny_pipeline(), [SEG(), SEG(sigma=2.0, boundary="circular", layers="m1")], "m1.*circular"),
        (tiny_pipeline(), [SEG(), SEG(backend="torch")], "m0.*backend='torch'"),
        (_with_processor(SEGAttnProcessor(1.0, Grid(4, 4))), [SEG()], "m0.*SEGAttnProcessor"),
        (_with_processor(PAGIdentitySelfAttnProcessor2_0()), [SEG()], "m0.*PAGIdentitySelfAttnProcessor2_0"),
    ],
    ids=[
        "no_denoiser",
        "bare_denoiser",
        "other_denoiser",
        "no_pipeline",
        "no_spec",
        "string_for_spec",
        "unknown_layer",
        "two_boundaries",
        "two_backends",
        "seg_processor",
        "pag_processor",
    ],
)
def test_what_cannot_be_guided_is_quoted_and_left_untouched(pipe: Any, specs: list[Any], quoted: str) -> None:
    state = Picture(pipe) if hasattr(pipe, "components") else None
    with pytest.raises(ValueError, match=quoted):
        guide(pipe, *specs)
    if state is not None:
        state.assert_same(pipe)


def test_a_layer_that_attends_to_text_cannot_be_guided() -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.get_submodule(MID0).is_cross_attention = True
    assert MID0 not in [layer.module for layer in list_layers(pipe)]
    with pytest.raises(ValueError, match=f"unknown layer '{MID0}'"):
        guide(pipe, SEG(layers=MID0))
    with guide(pipe, SEG()) as guidance:
        run(pipe, latents=noise())
    assert [layer.module for layer in guidance.report().layers] == [MID0.replace(".0.attn1", ".1.attn1")]


def test_a_second_guidance_is_refused_and_the_first_goes_on() -> None:
    pipe, latents = tiny_pipeline(), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
        with pytest.raises(ValueError, match="already guided; pass all specs"):
            guide(pipe, SEG(layers="up"))
        assert torch.equal(run(pipe, latents=latents), expected)
    with guide(pipe, SEG(layers="up")):
        assert relative(run(pipe, latents=latents), expected) > 1e-3


def test_a_denoiser_called_outside_a_run_says_so() -> None:
    pipe = tiny_pipeline(own_unet=True)
    arguments = {
        "sample": noise(2),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.zeros(2, 6)},
    }
    with guide(pipe, SEG()):
        for _ in range(2):
            with pytest.raises(ValueError, match=r"outside a run of that .*cfg='none'.*guidance\.run\(timesteps\)"):
                pipe.unet(**arguments)
            run(pipe, latents=noise())  # what a run leaves on the pipeline must not affect a custom loop


def test_other_hooks_of_the_denoiser_see_the_pipelines_batch() -> None:
    pipe, seen = tiny_pipeline(), []
    first = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    second = pipe.unet.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    with guide(pipe, SEG(), share=False):
        blocks = batches_seen(pipe, lambda: run(pipe, latents=noise()))
    first.remove()
    second.remove()
    assert set(seen) == {2}
    assert blocks["up_blocks.0"] == {3}


def test_subclasses_of_the_stock_pipeline_are_guided() -> None:
    class Mine(StableDiffusionXLPipeline):
        pass

    pipe = tiny_pipeline(Mine)
    with guide(pipe, SEG()) as guidance:
        run(pipe, latents=noise())
    assert guidance.report().layers[0].fired == 3


def test_set_processors_are_new_standard_ones_after_diffusers_renews_them_by_class() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
        pipe.unet.set_attn_processor({name: type(p)() for name, p in pipe.unet.attn_processors.items()})
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}

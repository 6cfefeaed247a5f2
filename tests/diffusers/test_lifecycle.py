# SPDX-License-Identifier: Apache-2.0
"""Guidance comes and goes without a trace, and refuses what it cannot handle before it touches it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    PAGIdentitySelfAttnProcessor2_0,
    SlicedAttnProcessor,
)

from segkern import Grid
from segkern.integrations.diffusers import SEG, Guidance, SEGAttnProcessor, guide
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor
from tests.diffusers.probes import batches_seen, hooks_of
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline

MID0 = "mid_block.attentions.0.transformer_blocks.0.attn1"


class State:
    """The processor objects and hooks of a pipeline's denoiser."""

    def __init__(self, pipe: Any) -> None:
        self.unet = pipe.unet
        self.processors = dict(pipe.unet.attn_processors)
        self.hooks = hooks_of(pipe.unet)
        self.attributes = set(vars(pipe)) | {("unet", name) for name in vars(pipe.unet)}

    def assert_same(self, pipe: Any) -> None:
        assert pipe.unet is self.unet
        assert pipe.unet.attn_processors.keys() == self.processors.keys()
        for name, processor in pipe.unet.attn_processors.items():
            assert processor is self.processors[name], name
        assert hooks_of(pipe.unet) == self.hooks
        assert {("unet", name) for name in vars(pipe.unet)} <= self.attributes


def run_once(pipe: Any) -> tuple[torch.Tensor, State]:
    """A plain run, and the state after it (a run leaves attributes of its own on the pipeline)."""
    return run(pipe, latents=noise()), State(pipe)


def test_leaving_the_context_puts_back_the_very_objects() -> None:
    pipe = tiny_pipeline()
    plain, state = run_once(pipe)
    with guide(pipe, SEG(layers=["down", "mid", "up"])) as guidance:
        assert isinstance(guidance, Guidance)
        assert hooks_of(pipe.unet) > state.hooks
        seen: list[dict[str, Any]] = []
        handle = pipe.unet.conv_in.register_forward_hook(lambda *_: seen.append(pipe.unet.attn_processors))
        run(pipe, latents=noise())
        handle.remove()
        for processors in seen:  # only while the denoiser runs; between its forwards all is its own
            assert all(isinstance(p, GuidedProcessor) == ("attn1" in n) for n, p in processors.items())
        assert not any(isinstance(p, GuidedProcessor) for p in pipe.unet.attn_processors.values())
    state.assert_same(pipe)
    assert torch.equal(run(pipe, latents=noise()), plain)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
@pytest.mark.parametrize("place", ["callback", "denoiser", "context"])
def test_an_exception_puts_back_the_very_objects(place: str, error: type[BaseException]) -> None:
    pipe = tiny_pipeline()
    plain, state = run_once(pipe)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    handle = pipe.unet.up_blocks[1].register_forward_hook(fail) if place == "denoiser" else None

    def guided() -> None:
        with guide(pipe, SEG()):
            run(pipe, latents=noise(), callback_on_step_end=fail if place == "callback" else None)
            fail()

    with pytest.raises(error):
        guided()
    if handle is not None:
        handle.remove()
    state.assert_same(pipe)
    assert torch.equal(run(pipe, latents=noise()), plain)


def test_an_exception_inside_a_forward_leaves_the_guidance_working() -> None:
    pipe, latents = tiny_pipeline(), noise()

    def fail(*args: Any) -> None:
        raise ZeroDivisionError

    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
        handle = pipe.unet.up_blocks[1].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            run(pipe, latents=latents)
        handle.remove()
        assert torch.equal(run(pipe, latents=latents), expected)


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


def test_processors_that_were_kept_are_harmless_after_removal() -> None:
    pipe = tiny_pipeline()
    plain, _ = run_once(pipe)
    before = dict(pipe.unet.attn_processors)
    with guide(pipe, SEG()) as guidance:
        guided = run(pipe, latents=noise())
        kept = dict(pipe.unet.attn_processors)
    assert guidance.report().forwards == 3
    pipe.unet.set_attn_processor(kept)
    assert torch.equal(run(pipe, latents=noise()), plain)
    with guide(pipe, SEG()):
        assert torch.equal(run(pipe, latents=noise()), guided)
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)


@pytest.mark.parametrize("sigma", [2.0, float("inf")], ids=str)
@pytest.mark.parametrize("unfuse", [False, True], ids=["stays_fused", "unfused_again"])
@pytest.mark.parametrize("inside", [False, True], ids=["fused_before", "fused_inside"])
def test_fused_projections_are_used_and_restored(inside: bool, unfuse: bool, sigma: float) -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    before = dict(pipe.unet.attn_processors)
    with guide(pipe, SEG(sigma=sigma)):
        expected = run(pipe, latents=latents)
    if not inside:
        pipe.fuse_qkv_projections()
    with guide(pipe, SEG(sigma=sigma)) as guidance:
        if inside:
            pipe.fuse_qkv_projections()
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
        assert all(layer.processor.fused for layer in guidance._layers)
        if unfuse:
            pipe.unfuse_qkv_projections()
            assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
            assert not any(layer.processor.fused for layer in guidance._layers)
    if unfuse:
        assert all(pipe.unet.attn_processors[name] is before[name] for name in before)
        return
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    # What fusing saved inside the context, and unfusing sets, must not be the guidance's processors.
    pipe.unfuse_qkv_projections()
    assert all(pipe.unet.attn_processors[name] is before[name] for name in before)


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=lambda p: type(p).__name__)
def test_other_standard_processors_are_guided_alike(processor: Any) -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    with guide(pipe, SEG(start=0.3)):
        expected = run(pipe, latents=latents)
    pipe.unet.set_attn_processor(processor)
    with guide(pipe, SEG(start=0.3)):
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    assert pipe.unet.get_submodule(MID0).processor is processor


def test_a_processor_set_while_guided_is_the_one_put_back() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    new, late = AttnProcessor(), AttnProcessor()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
        pipe.unet.get_submodule(MID0).set_processor(new)
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
        pipe.unet.get_submodule(MID0.replace("blocks.0", "blocks.1")).set_processor(late)
    assert pipe.unet.get_submodule(MID0).processor is new
    assert pipe.unet.get_submodule(MID0.replace("blocks.0", "blocks.1")).processor is late


def test_an_unknown_processor_set_while_guided_is_refused() -> None:
    pipe = tiny_pipeline(own_unet=True)
    with guide(pipe, SEG()):
        pipe.unet.get_submodule(MID0).set_processor(PAGIdentitySelfAttnProcessor2_0())
        with pytest.raises(ValueError, match=f"{MID0}.*PAGIdentitySelfAttnProcessor2_0"):
            run(pipe, latents=noise())


def _with_processor(processor: Any) -> Any:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.get_submodule(MID0).set_processor(processor)
    return pipe


class NoDenoiser:
    """Something that is not a pipeline."""


class OtherDenoiser(NoDenoiser):
    """A pipeline whose unet is another model."""

    unet = torch.nn.Linear(2, 2)


class UnknownBatch(NoDenoiser):
    """A pipeline that does not say whether it runs classifier-free guidance."""

    unet = tiny_pipeline().unet


@pytest.mark.parametrize(
    "pipe, specs, quoted",
    [
        (NoDenoiser(), [SEG()], "NoDenoiser"),
        (tiny_pipeline().unet, [SEG()], "UNet2DConditionModel"),
        (OtherDenoiser(), [SEG()], "OtherDenoiser whose unet is a Linear"),
        (UnknownBatch(), [SEG()], "UnknownBatch.*do_classifier_free_guidance"),
        (tiny_pipeline(), [], "at least one spec"),
        (tiny_pipeline(), ["mid"], "'mid'"),
        (tiny_pipeline(), [SEG(), SEG(layers="m9")], "'m9'"),
        (tiny_pipeline(), [SEG(), SEG(sigma=2.0, boundary="circular", layers="m1")], "m1.*circular"),
        (tiny_pipeline(), [SEG(), SEG(backend="torch")], "m0.*backend='torch'"),
        (_with_processor(SEGAttnProcessor(1.0, Grid(4, 4))), [SEG()], "m0.*SEGAttnProcessor"),
        (_with_processor(PAGIdentitySelfAttnProcessor2_0()), [SEG()], "m0.*PAGIdentitySelfAttnProcessor2_0"),
        (tiny_pipeline(StableDiffusionXLPAGPipeline), [SEG()], "StableDiffusionXLPAGPipeline.*without PAG"),
        (tiny_pipeline(StableDiffusionXLInstructPix2PixPipeline), [SEG()], "Pix2Pix.*three parts"),
    ],
    ids=[
        "no_denoiser",
        "bare_denoiser",
        "other_denoiser",
        "unknown_batch",
        "no_spec",
        "string_for_spec",
        "unknown_layer",
        "two_boundaries",
        "two_backends",
        "seg_processor",
        "pag_processor",
        "pag_pipeline",
        "pix2pix",
    ],
)
def test_what_cannot_be_guided_is_quoted_and_left_untouched(pipe: Any, specs: list[Any], quoted: str) -> None:
    state = State(pipe) if hasattr(getattr(pipe, "unet", None), "attn_processors") else None
    with pytest.raises(ValueError, match=quoted):
        guide(pipe, *specs)
    if state is not None:
        state.assert_same(pipe)


def test_a_layer_that_attends_to_text_cannot_be_guided() -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.get_submodule(MID0).is_cross_attention = True
    with pytest.raises(ValueError, match=f"m0.*{MID0}"):
        guide(pipe, SEG())
    with guide(pipe, SEG(layers="m1")):
        run(pipe, latents=noise())


def test_a_second_guidance_is_refused_and_the_first_goes_on() -> None:
    pipe, latents = tiny_pipeline(), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
        with pytest.raises(ValueError, match=r"guided already.*several specs"):
            guide(pipe, SEG(layers="up"))
        assert torch.equal(run(pipe, latents=latents), expected)
    with guide(pipe, SEG(layers="up")):
        assert relative(run(pipe, latents=latents), expected) > 1e-3


def test_a_denoiser_called_outside_a_run_says_so() -> None:
    pipe = tiny_pipeline()
    arguments = {
        "sample": noise(2),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.zeros(2, 6)},
    }
    with guide(pipe, SEG()), pytest.raises(RuntimeError, match="outside a run"):
        pipe.unet(**arguments)
    with guide(pipe, SEG()):
        run(pipe, latents=noise())
        with pytest.raises(RuntimeError, match="batch of 3"):
            pipe.unet(**{**arguments, "sample": noise(3)})


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

    with guide(tiny_pipeline(Mine), SEG()) as guidance:
        run(guidance._run._pipe, latents=noise())
    assert guidance.report().layers[0].fired == 3


def test_set_processors_are_new_standard_ones_after_diffusers_renews_them_by_class() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
        pipe.unet.set_attn_processor({name: type(p)() for name, p in pipe.unet.attn_processors.items()})
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    assert {type(p) for p in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}

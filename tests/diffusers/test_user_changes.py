# SPDX-License-Identifier: Apache-2.0
"""Changes that a user makes to a guided pipeline, between runs or inside the context, work and persist on exit."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.subjects import (
    FLUX,
    QWEN,
    SD1,
    SD3,
    SDXL,
    Subject,
    every,
    kinds,
    left_as_it_was,
    stand_ins,
)
from tests.diffusers.unet_cases import image_embeds, ip_adapter
from tests.diffusers.unet_image_cases import IMAGES

UNETS = [SD1, pytest.param(SDXL, marks=pytest.mark.robustness)]


def like_a_fresh_one(subject: Subject, pipe: Any, change: Callable[[Any], Any], **more: Any) -> None:
    """Assert that a pipeline changed while guided has the same result as one changed before it was guided."""
    fresh = subject.build()
    change(fresh)
    with guide(fresh, subject.seg()):
        expected = subject.run(fresh, **more)
    assert relative(subject.run(pipe, **more), expected) < PIPELINE_TOLERANCE


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["SEG, infinite", "SEG, reuse", "PAG", "SLG, TPG", "SEG, PAG, SAG"])
@pytest.mark.parametrize("subject", every(SD3))
def test_arguments_that_change_between_runs(subject: Subject, kind: str) -> None:
    specs = kinds(subject).get(kind, (subject.seg(),))  # transformers do not support SAG
    scale = "true_cfg_scale" if subject in (FLUX, QWEN) else "guidance_scale"
    size = {"height": 32, "width": 24} if subject.part == "unet" else {"height": 64, "width": 128}
    changes: list[dict[str, Any]] = [
        {"num_inference_steps": 1},
        {"num_inference_steps": 3},
        size,
        {"generator": torch.Generator().manual_seed(9)},
        {scale: 1.0},
        {scale: 2.5, "num_inference_steps": 2, **size},
    ]

    def seeded(change: dict[str, Any]) -> dict[str, Any]:
        return change | ({"generator": torch.Generator().manual_seed(9)} if "generator" in change else {})

    with left_as_it_was(subject, *specs) as (pipe, _):
        first = subject.run(pipe)
        for change in changes:
            result = subject.run(pipe, **seeded(change))
            fresh = subject.build()
            with guide(fresh, *specs):
                assert torch.equal(result, subject.run(fresh, **seeded(change)))
        assert torch.equal(subject.run(pipe), first)


@pytest.mark.parametrize("subject", every(SD1))
def test_another_scheduler(subject: Subject) -> None:
    names = ["FlowMatchHeunDiscreteScheduler"]
    if subject.part == "unet":
        names = ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler"]
    if subject in (FLUX, QWEN):
        names = ["FlowMatchEulerDiscreteScheduler"]
    with left_as_it_was(subject) as (pipe, _):
        subject.run(pipe)
        own = pipe.scheduler
        for name in names:

            def change(pipe: Any, name: str = name) -> None:
                pipe.scheduler = getattr(diffusers, name)()

            change(pipe)
            like_a_fresh_one(subject, pipe, change)
        pipe.scheduler = own


def _adapter(pipe: Any, part: str) -> None:
    torch.manual_seed(3)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    getattr(pipe, part).add_adapter(config)


@pytest.mark.parametrize("subject", every(SD3))
def test_a_lora_that_comes_and_goes(subject: Subject) -> None:
    with left_as_it_was(subject) as (pipe, _):
        first = subject.run(pipe)
        model = subject.denoiser(pipe)
        _adapter(pipe, subject.part)
        like_a_fresh_one(subject, pipe, lambda fresh: _adapter(fresh, subject.part))
        with_lora = subject.run(pipe)
        assert relative(with_lora, first) > 1e-3
        model.fuse_lora()
        assert relative(subject.run(pipe), with_lora) < PIPELINE_TOLERANCE
        model.unfuse_lora()
        assert relative(subject.run(pipe), with_lora) < PIPELINE_TOLERANCE
        model.disable_adapters()
        assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
        other = subject.denoiser(subject.build())
        model.unload_lora()
        model.load_state_dict(other.state_dict())  # unfusing leaves rounding errors
        assert torch.equal(subject.run(pipe), first)
        _forget_lora(model, other)


def _forget_lora(model: Any, like: Any) -> None:
    """Remove what diffusers leaves of an unloaded adapter: attributes, and parameters in other layers."""
    for module, other in zip(model.modules(), like.modules(), strict=True):
        for name in set(vars(module)) - set(vars(other)) - {"_diffusers_hook"}:  # a run leaves this, not the adapter
            delattr(module, name)


@pytest.mark.parametrize("sigma", [1.5, float("inf")], ids=str)
@pytest.mark.parametrize("subject", UNETS, ids=["sd1", "sdxl"])
def test_projections_fused_and_unfused(subject: Subject, sigma: float) -> None:
    pipe = subject.build()
    plain, own = subject.run(pipe), dict(pipe.unet.attn_processors)
    with guide(pipe, subject.seg(sigma=sigma)):
        first = subject.run(pipe)
        for _ in range(2):
            pipe.fuse_qkv_projections()
            assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
            pipe.unfuse_qkv_projections()
            assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
        pipe.fuse_qkv_projections()
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    with guide(pipe, subject.seg(sigma=sigma)):
        assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
    pipe.unfuse_qkv_projections()  # what fusing saved inside the context must not be segkern's processors
    assert all(processor is own[name] for name, processor in pipe.unet.attn_processors.items())
    assert torch.equal(subject.run(pipe), plain)


@pytest.mark.parametrize("subject", UNETS, ids=["sd1", "sdxl"])
def test_processors_that_are_set_inside_the_context_stay(subject: Subject) -> None:
    pipe = subject.build()
    with guide(pipe, subject.seg()):
        first = subject.run(pipe)
        mine = AttnProcessor()
        pipe.unet.set_attn_processor(mine)
        assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
        assert all(processor is mine for processor in pipe.unet.attn_processors.values())
        pipe.enable_attention_slicing("max")
        sliced = dict(pipe.unet.attn_processors)
        assert {type(processor) for processor in sliced.values()} == {SlicedAttnProcessor}
        assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
    assert all(processor is sliced[name] for name, processor in pipe.unet.attn_processors.items())
    with guide(pipe, subject.seg()):
        pipe.disable_attention_slicing()
        assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        assert torch.equal(subject.run(pipe), first)
        ip_adapter(pipe)
        embeds = image_embeds(IMAGES[subject.name], 2, True)
        with_image = subject.run(pipe, ip_adapter_image_embeds=embeds)
        assert relative(with_image, first) > 1e-3
    kinds_of = {type(processor) for name, processor in pipe.unet.attn_processors.items() if "attn2" in name}
    assert kinds_of == {IPAdapterAttnProcessor2_0}
    assert stand_ins(subject, pipe) == 0
    with guide(pipe, subject.seg()):
        assert torch.equal(subject.run(pipe, ip_adapter_image_embeds=embeds), with_image)


@pytest.mark.parametrize("subject", every(SD3))
def test_offloading_inside_the_context(subject: Subject) -> None:
    with left_as_it_was(subject) as (pipe, _):
        first = subject.run(pipe)
        model = subject.denoiser(pipe)
        forward = type(model).forward
        accelerate.cpu_offload_with_hook(model, execution_device="cpu")
        assert torch.equal(subject.run(pipe), first)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert model.forward.__func__ is forward
        for module in model.modules():
            vars(module).pop("forward", None)  # accelerate leaves this
        assert torch.equal(subject.run(pipe), first)


def test_offloading_module_by_module() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
    accelerate.cpu_offload(pipe.unet, execution_device="cpu")
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"meta"}
    with guide(pipe, SEG()):
        assert torch.equal(run(pipe, latents=latents), expected)


@pytest.mark.parametrize("subject", every(SD1, SD3))
def test_a_clean_run_warns_and_logs_nothing(
    subject: Subject, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe = subject.build()
    subject.run(pipe)
    capsys.readouterr()
    caplog.clear()
    for specs in kinds(subject).values():
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.DEBUG):
            warnings.simplefilter("always")
            with guide(pipe, *specs) as guidance:
                subject.run(pipe)
                guidance.report()
        assert not [w for w in caught if "segkern" in f"{w.filename} {w.category}" or "guid" in str(w.message)]
        assert not [record for record in caplog.records if record.name.startswith("segkern")]
    assert capsys.readouterr() == ("", "")
    guidance = guide(pipe, subject.seg(start=0.9), subject.seg(), subject.seg(scale=0.0))
    subject.run(pipe)
    with pytest.warns(UserWarning, match="fired in none") as once:
        guidance.remove()
    assert len(once) == 1
    assert str(once[0].message).count("had no effect") == 2  # one warning names both specs


@pytest.mark.parametrize("subject", UNETS, ids=["sd1", "sdxl"])
def test_a_refused_processor_leaves_no_stand_in(subject: Subject) -> None:
    with left_as_it_was(subject, subject.seg(layers=["down", "mid", "up"])) as (pipe, guidance):
        first = subject.run(pipe)
        last = pipe.unet.get_submodule(guidance.report().layers[-1].module)
        own = last.processor
        last.set_processor(IPAdapterAttnProcessor2_0(8, 8))
        with pytest.raises(ValueError, match=r"processor of layer .* was replaced while guided"):
            subject.run(pipe)
        assert stand_ins(subject, pipe) == 0
        last.set_processor(own)
        vars(last).get("_modules", {}).pop("processor", None)
        assert torch.equal(subject.run(pipe), first)


@pytest.mark.parametrize("when", ["before the run", "in a callback"])
def test_another_denoiser_is_refused(when: str) -> None:
    with left_as_it_was(SD1) as (pipe, _):
        expected = SD1.run(pipe)
        own, other = pipe.unet, SD1.build().unet

        def replace(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            pipe.unet = other
            return given

        if when == "before the run":
            pipe.unet = other
        given = {"callback_on_step_end": replace} if when == "in a callback" else {}
        with pytest.raises(ValueError, match=r"unet of this .* was replaced while guided"):
            SD1.run(pipe, **given)
        pipe.unet = own
        assert torch.equal(SD1.run(pipe), expected)

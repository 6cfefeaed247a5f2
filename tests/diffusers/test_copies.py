# SPDX-License-Identifier: Apache-2.0
"""Copies, pickles and saved files of a guided pipeline are not guided. Specs and reports survive pickling."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from segkern import Grid
from segkern.integrations.diffusers import (
    CFG,
    PAG,
    SAG,
    SEG,
    PAGGuider,
    SAGGuider,
    SEGAttnProcessor,
    SEGGuider,
    guide,
    record_energy,
)
from tests.diffusers.modular_pipelines import modular_sdxl, run_sdxl
from tests.diffusers.probes import hooks_of
from tests.diffusers.small_pipelines import noise, relative, run, smaller_pipeline, tiny_pipeline
from tests.diffusers.subjects import SD1, SD3, Subject, every, left_as_it_was, stand_ins


def _pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


def _saved(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"copy.deepcopy": copy.deepcopy, "pickle": _pickled, "torch.save": _saved}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("subject", every(SD3))
def test_a_copy_of_what_is_guided_is_plain(subject: Subject, way: Callable[[Any], Any]) -> None:
    with left_as_it_was(subject) as (pipe, _):
        guided = subject.run(pipe)
        copied = subject.build()
        plain = subject.run(copied)
        setattr(copied, subject.part, way(subject.denoiser(pipe)))
        assert torch.equal(subject.run(copied), plain)
        whole = way(pipe)
        whole.set_progress_bar_config(disable=True)
        assert torch.equal(subject.run(whole), plain)
        assert torch.equal(subject.guided(whole), guided)
        assert torch.equal(subject.run(whole), plain)
        assert torch.equal(subject.run(pipe), guided)


@pytest.mark.parametrize("subject", every(SD1))
def test_a_copy_made_in_the_midst_of_a_forward_is_plain(subject: Subject) -> None:
    with left_as_it_was(subject) as (pipe, _):
        guided = subject.run(pipe)
        other = subject.build()
        plain = subject.run(other)
        copies: list[Any] = []

        def copying(*_: Any) -> None:
            if not copies:
                assert stand_ins(subject, pipe) > 0
                handle.remove()
                copies.extend(way(subject.denoiser(pipe)) for way in WAYS.values())

        handle = subject.denoiser(pipe).get_submodule(subject.inside).register_forward_hook(copying)
        assert torch.equal(subject.run(pipe), guided)
        assert len(copies) == len(WAYS)
        for copied in copies:
            setattr(other, subject.part, copied)
            assert stand_ins(subject, other) == 0
            assert torch.equal(subject.run(other), plain)
            assert torch.equal(subject.guided(other), guided)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_copy_keeps_nothing_of_the_guided_pipeline(way: Callable[[Any], Any]) -> None:
    pipe = SD1.build()
    with guide(pipe, SD1.seg()), record_energy(pipe, "mid"):
        SD1.run(pipe)
        copied = way(pipe.unet)
        assert b"segkern" not in pickle.dumps(pipe.unet), "it could not be loaded without segkern"
    original = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert original() is None
    assert hooks_of(copied) > 0  # of the standard library, without effect


@pytest.mark.parametrize("subject", every(SD3))
def test_what_is_saved_while_guided_is_what_is_saved_without(subject: Subject, tmp_path: Path) -> None:
    def files(folder: Path) -> dict[str, bytes]:
        subject.denoiser(pipe).save_pretrained(folder)
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    with left_as_it_was(subject) as (pipe, _):
        subject.run(pipe)
        denoiser, other = subject.denoiser(pipe), subject.denoiser(subject.build())
        assert [name for name, _ in denoiser.named_modules()] == [name for name, _ in other.named_modules()]
        state, expected = denoiser.state_dict(), other.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
        guided = files(tmp_path / "guided")
    assert len(guided) >= 2
    assert files(tmp_path / "plain") == guided


def halving(fraction: float) -> float:
    return 1.0 - fraction / 2.0


SPECS = [
    SEG(),
    SEG(scale=2.0, sigma={"mid": math.inf, "u0-1": [1.0, (2.0, 3.0)]}, schedule=halving, stop=0.7),
    SEG(sigma=4.0, layers=range(2, 4), query_stride=2, reuse=2),
    PAG(layers=["d0", "mid"], adaptive_scale=0.01, schedule="cosine"),
    SAG(schedule=halving, threshold=0.5),
    CFG(scale=4.0, negative_prompt="blurry", schedule=halving),
    CFG(negative_prompt_embeds=torch.arange(6.0).view(1, 2, 3), negative_pooled_prompt_embeds=torch.ones(1, 4)),
    Grid(3, 4),
    Grid(3, 4, start=2, frames=5),
]


@pytest.mark.parametrize("way", [copy.copy, *WAYS.values()], ids=["copy.copy", *WAYS])
def test_descriptions_of_guidances_are_pickled(way: Callable[[Any], Any]) -> None:
    for spec in SPECS:
        copied = way(spec)
        assert type(copied) is type(spec)
        assert (copied, hash(copied), repr(copied)) == (spec, hash(spec), repr(spec))
        assert [copied != other for other in SPECS].count(False) == 1


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_reports_processors_and_guiders_are_pickled(way: Callable[[Any], Any]) -> None:
    pipe = SD1.build()
    with guide(pipe, SD1.seg(), SAG()) as guidance:
        SD1.run(pipe)
        report = guidance.report()
        assert way(report) == report
        assert str(way(report)) == str(report)
    processor = SEGAttnProcessor((0.0, 2.0), Grid(3, 4), boundary="circular")
    assert vars(way(processor)) == vars(processor)
    pipe = smaller_pipeline()
    for guider in (SEGGuider(sigma=2.0, schedule=halving), PAGGuider(scale=2.0), SAGGuider(guidance_scale=3.0)):
        modular = modular_sdxl(pipe, guider)
        expected = run_sdxl(modular, pipe, latents=noise(1, 8, 12), num_inference_steps=2)
        copied = way(guider)
        assert (type(copied), copied.spec, dict(copied.config)) == (type(guider), guider.spec, dict(guider.config))
        assert len(pickle.dumps(guider)) < 20_000, "the denoiser is included"
        modular = modular_sdxl(pipe, copied)
        assert torch.equal(run_sdxl(modular, pipe, latents=noise(1, 8, 12), num_inference_steps=2), expected)
        guider.disable()
        assert not way(guider)._enabled


def test_a_guidance_itself_is_not_pickled() -> None:
    pipe = SD3.build()
    with guide(pipe, SD3.seg()) as guidance:
        with pytest.raises(TypeError, match=r"pickle the pipeline .* or the result of report\(\)"):
            pickle.dumps(guidance)
        assert copy.deepcopy({"guidance": guidance})["guidance"] is guidance
        SD3.run(pipe)


@pytest.mark.parametrize("ran_before", [False, True], ids=["before any run", "after a run"])
def test_another_pipeline_with_the_same_denoiser_runs_unguided(ran_before: bool) -> None:
    guided, other = tiny_pipeline(), tiny_pipeline()
    assert guided.unet is other.unet
    arguments = {"prompt": ["a fox", "a lake"], "latents": noise(batch=2), "guidance_scale": 1.0}
    plain = run(other, **arguments)
    with guide(guided, SEG()):
        if ran_before:
            run(guided, latents=noise())
        beside = run(other, **arguments)
        with_guidance = run(guided, **arguments)
    assert torch.equal(beside, plain)
    assert relative(with_guidance, plain) > 1e-3


def test_a_pipeline_made_from_a_guided_one_can_be_guided_itself() -> None:
    pipe = tiny_pipeline()
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    arguments = {"prompt": "a fox", "image": image, "strength": 0.8, "num_inference_steps": 4, "output_type": "latent"}

    def draw(img2img: StableDiffusionXLImg2ImgPipeline) -> torch.Tensor:
        img2img.set_progress_bar_config(disable=True)
        return img2img(**arguments, generator=torch.Generator().manual_seed(1)).images

    plain = draw(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe))
    guidance = guide(pipe, SEG())
    beside = draw(StableDiffusionXLImg2ImgPipeline.from_pipe(pipe))
    with pytest.warns(UserWarning, match="called only by other pipelines"):
        guidance.remove()
    assert torch.equal(beside, plain)
    img2img = StableDiffusionXLImg2ImgPipeline.from_pipe(pipe)
    with guide(img2img, SEG()):
        assert relative(draw(img2img), plain) > 1e-3


def test_a_denoiser_replaced_while_guided_is_reported() -> None:
    pipe = tiny_pipeline(own_unet=True)
    guidance = guide(pipe, SEG())
    mine = pipe.unet
    pipe.unet = copy.deepcopy(mine)
    with pytest.raises(ValueError, match=r"unet of this .* was replaced while guided"):
        run(pipe, latents=noise())
    guidance.remove()
    assert not hooks_of(mine)

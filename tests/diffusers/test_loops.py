# SPDX-License-Identifier: Apache-2.0
"""Custom denoising loops: guided like the slow computation, or refused, whatever ran on the pipeline before."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import diffusers
import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.slow_guidance import conditions, looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_sd

SPEC = SEG(3.0, 1.0)
IMAGES = 2
PROMPT = ["a red fox"] * IMAGES
SCALE = 5.0


def pipeline() -> Any:
    return tiny_sd()


@lru_cache
def slow(scale: float = SCALE) -> torch.Tensor:
    return looped_run(pipeline(), [SPEC], PROMPT, latents=noise(IMAGES), guidance_scale=scale)


@torch.no_grad()
def loop(pipe: Any, calls: str, *, bar: bool = False) -> torch.Tensor:
    """Return latents of a loop whose steps call the denoiser in this way."""
    latents, unet = noise(IMAGES), pipe.unet
    conditional, unconditional = conditions(pipe, PROMPT, latents, 1, True)
    c, u = conditional["encoder_hidden_states"], unconditional["encoder_hidden_states"]
    pipe.scheduler.set_timesteps(3)
    x = latents * pipe.scheduler.init_noise_sigma
    for t in pipe.progress_bar(pipe.scheduler.timesteps) if bar else pipe.scheduler.timesteps:
        if calls == "[u, c]":
            away, to = unet(torch.cat([x] * 2), t, torch.cat([u, c])).sample.chunk(2)
        elif calls == "[c, u]":
            to, away = unet(torch.cat([x] * 2), t, torch.cat([c, u])).sample.chunk(2)
        elif calls == "c, u":
            to, away = unet(x, t, c).sample, unet(x, t, u).sample
        elif calls == "u, c":
            away, to = unet(x, t, u).sample, unet(x, t, c).sample
        elif calls == "image by image":
            pairs = [(unet(x[i : i + 1], t, c[i : i + 1]), unet(x[i : i + 1], t, u[i : i + 1])) for i in range(IMAGES)]
            to, away = (torch.cat([pair[i].sample for pair in pairs]) for i in range(2))
        else:
            to = away = unet(x, t, c).sample
        x = pipe.scheduler.step(away + SCALE * (to - away), t, x).prev_sample
    return x


STATEMENTS: dict[str, dict[str, Any]] = {
    "[u, c]": {"cfg": "batch"},
    "[c, u]": {"cfg": "batch", "conditional": "first"},
    "c, u": {"cfg": "separate"},
    "image by image": {"cfg": "separate"},
    "c": {"cfg": "none"},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("of", ["pipeline", "denoiser"])
@pytest.mark.parametrize("calls", STATEMENTS)
def test_a_loop_that_is_told(calls: str, of: str) -> None:
    pipe, expected = pipeline(), slow(1.0 if calls == "c" else SCALE)
    with guide(pipe if of == "pipeline" else pipe.unet, SPEC, **STATEMENTS[calls]) as guidance:
        pipe.scheduler.set_timesteps(3)
        for _ in range(2):
            with guidance.run(pipe.scheduler.timesteps):
                output = loop(pipe, calls)
            assert relative(output, expected) < PIPELINE_TOLERANCE


@pytest.mark.one_in(4)
@pytest.mark.parametrize("calls", [*STATEMENTS, "u, c"])
@pytest.mark.parametrize("stated", STATEMENTS)
def test_a_wrong_statement_is_refused_where_the_texts_show_it(calls: str, stated: str) -> None:
    """Requires that the pipeline has encoded the texts. A denoiser alone has no texts, so its layout is not checked."""
    right = STATEMENTS.get(calls) == STATEMENTS[stated] or (calls, stated) in {("c", "c, u"), ("c", "image by image")}
    pipe, expected = pipeline(), slow(1.0 if calls == "c" else SCALE)
    refused = pytest.raises(ValueError, match=r"the denoiser of StableDiffusionPipeline|called its denoiser")
    with guide(pipe, SPEC, **STATEMENTS[stated]) as guidance:
        pipe.scheduler.set_timesteps(3)
        with guidance.run(pipe.scheduler.timesteps), nullcontext() if right else refused:
            assert relative(loop(pipe, calls), expected) < PIPELINE_TOLERANCE


@pytest.mark.one_in(3)
@pytest.mark.parametrize("before", [None, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7}])
def test_what_a_stock_run_has_left_is_not_believed(before: dict[str, Any] | None) -> None:
    pipe, expected = pipeline(), slow()
    other = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with guide(pipe, SPEC):
        if before is not None:
            run(pipe, PROMPT, latents=noise(IMAGES), **before)
        for calls in (*STATEMENTS, "u, c"):
            for bar in (False, True):
                with pytest.raises(ValueError, match="outside a run of that pipeline"):
                    loop(pipe, calls, bar=bar)
        assert relative(run(pipe, PROMPT, latents=noise(IMAGES), guidance_scale=SCALE), expected) < PIPELINE_TOLERANCE
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline


def test_an_exception_in_a_loop_and_calls_after_it() -> None:
    pipe, expected = pipeline(), slow()

    def failing() -> None:
        with guidance.run(timesteps):
            loop(pipe, "[u, c]")
            raise ZeroDivisionError

    with guide(pipe.unet, SPEC, cfg="batch") as guidance:
        pipe.scheduler.set_timesteps(3)
        timesteps = pipe.scheduler.timesteps
        with pytest.raises(ZeroDivisionError):
            failing()
        with pytest.raises(ValueError, match="outside a run of that pipeline"):
            loop(pipe, "[u, c]")
        with guidance.run(timesteps), guidance.run(timesteps):
            assert relative(loop(pipe, "[u, c]"), expected) < PIPELINE_TOLERANCE
    with pytest.raises(ValueError, match="cfg='none', 'batch' or 'separate'"):
        guide(pipe.unet, SPEC)

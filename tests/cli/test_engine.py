# SPDX-License-Identifier: Apache-2.0
"""Batches of images: an image depends only on its own job, and a failure affects only its own image."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from segkern.generation import engine
from segkern.generation.drawing import ImageRequest, draw
from segkern.generation.engine import Job, Outcome, generate_images
from segkern.integrations.diffusers import PAG, SAG, SEG
from tests.cli.small_transformer import small_sd3
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative, tiny_pipeline

REQUEST = ImageRequest("a red fox", "", 32, 32, 1, 2, 5.0)


def latents_of(pipe: Any, jobs: Sequence[Job], batch_size: Any, **options: Any) -> dict[str, torch.Tensor]:
    """Return the final latents of all jobs by name."""
    batch: list[torch.Tensor] = []

    def on_step(pipe: Any, index: int, timestep: Any, tensors: Any) -> Any:
        if index == pipe.num_timesteps - 1:
            batch[:] = tensors["latents"].clone()
        return tensors

    latents: dict[str, torch.Tensor] = {}
    for outcome in generate_images(pipe, jobs, batch_size, on_step=on_step, **options):
        assert outcome.result is not None, outcome.reason
        assert outcome.job.name not in latents
        latents[outcome.job.name] = batch.pop(0)
    assert latents.keys() == {job.name for job in jobs}
    return latents


def mixed_jobs() -> list[Job]:
    """Return jobs of two sizes, with and without negative prompts, with different sigmas and methods."""
    specs = [(SEG(sigma=math.inf),), (SEG(sigma=0.7),), (SEG(sigma=0.0),), (PAG(), SAG()), (), (SEG(sigma=2.0),)]
    jobs = []
    for number in range(15):
        width = 32 if number % 4 else 48
        negative = "blurry" if number % 3 == 0 else ""
        request = replace(REQUEST, prompt=f"a fox, {number} trees", negative_prompt=negative, width=width, seed=number)
        jobs.append(Job(request, specs[number % len(specs)], str(number)))
    return jobs


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def expected(pipe: Any) -> dict[str, torch.Tensor]:
    return latents_of(pipe, mixed_jobs(), 1)


@pytest.mark.parametrize("batch_size", [2, 3, "auto"])
def test_latents_depend_only_on_the_job(batch_size: Any, pipe: Any, expected: dict[str, torch.Tensor]) -> None:
    jobs = mixed_jobs()
    random.shuffle(jobs)
    actual = latents_of(pipe, jobs, batch_size)
    for name, latents in expected.items():
        assert relative(actual[name], latents) < PIPELINE_TOLERANCE
    assert relative(expected["1"], expected["7"]) > 0.1


def test_rounding_does_not_depend_on_other_jobs(pipe: Any) -> None:
    jobs = mixed_jobs()
    expected = latents_of(pipe, jobs, 3)
    random.shuffle(jobs)
    for part in (jobs[:5], jobs[5:]):
        for name, latents in latents_of(pipe, part, 3).items():
            assert torch.equal(latents, expected[name])


def test_a_batch_of_one_is_a_single_image(pipe: Any) -> None:
    job = mixed_jobs()[0]
    (outcome,) = generate_images(pipe, [job])
    assert outcome.result.image.tobytes() == draw(pipe, job.request, job.specs).image.tobytes()


SCHEDULERS = {
    "ancestral": (EulerAncestralDiscreteScheduler, {}),
    "sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "unipc": (UniPCMultistepScheduler, {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_of_schedulers_depends_only_on_the_job(name: str, pipe: Any) -> None:
    kind, options = SCHEDULERS[name]
    own = pipe.scheduler
    pipe.scheduler = kind.from_config(own.config, **options)
    try:
        jobs = [Job(replace(REQUEST, seed=seed, steps=3), (SEG(sigma=1.0),), str(seed)) for seed in range(3)]
        single = latents_of(pipe, jobs, 1)
        together = latents_of(pipe, jobs[::-1], 3)
    finally:
        pipe.scheduler = own
    for seed, latents in single.items():
        assert relative(together[seed], latents) < PIPELINE_TOLERANCE


def test_random_numbers_without_generators_end_batches(caplog: pytest.LogCaptureFixture) -> None:
    pipe = small_sd3()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    jobs = [Job(replace(REQUEST, seed=seed, guidance_scale=1.0), (), str(seed)) for seed in range(3)]
    state = torch.get_rng_state()
    single = latents_of(pipe, jobs, 1)
    assert relative(single["0"], single["1"]) > 0.1
    with caplog.at_level(logging.WARNING):
        together = latents_of(pipe, jobs[::-1], 3)
    assert "one by one: StableDiffusion3Pipeline with FlowMatchEulerDiscreteScheduler" in caplog.text
    assert all(torch.equal(together[seed], latents) for seed, latents in single.items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("steps", [2, 3])
def test_a_transformer_in_batches(steps: int) -> None:
    pipe = small_sd3()
    prompts = ["a", "a fox on a table in a room", ""]
    jobs = [
        Job(replace(REQUEST, prompt=prompt, seed=number, steps=steps), (SEG(),), str(number))
        for number, prompt in enumerate(prompts)
    ]
    single, together = latents_of(pipe, jobs, 1), latents_of(pipe, jobs, 3)
    for number, latents in single.items():
        assert relative(together[number], latents) < PIPELINE_TOLERANCE


class Denoiser:
    """Counts the images of each pipeline call, and lets some calls fail."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        most: int = 100,
        broken: str = "no prompt",
        error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),  # noqa: B008
    ) -> None:
        self.sizes: list[int] = []
        original = engine.draw_batch

        def draw_batch(pipe: Any, requests: Sequence[ImageRequest], *arguments: Any) -> Any:
            self.sizes.append(len(requests))
            if len(requests) > most:
                raise error
            if any(request.prompt == broken for request in requests):
                raise ZeroDivisionError("of this\nprompt")
            return original(pipe, requests, *arguments)

        monkeypatch.setattr(engine, "draw_batch", draw_batch)


def jobs_of(count: int, **settings: Any) -> list[Job]:
    return [Job(replace(REQUEST, seed=seed, steps=1, **settings), (), str(seed)) for seed in range(count)]


def seeds(outcomes: Iterator[Outcome]) -> list[int]:
    return [outcome.job.request.seed for outcome in outcomes if outcome.result is not None]


@pytest.mark.parametrize("batch_size", ["auto", 8])
def test_out_of_memory_halves_the_batch_size_once(
    batch_size: Any, pipe: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = Denoiser(monkeypatch, most=3)
    assert seeds(generate_images(pipe, jobs_of(11), batch_size)) == list(range(11))
    assert denoiser.sizes == [8, 4, 2, 2, 2, 2, 2, 2]
    assert ("do not fit in memory; using batches of 2" in caplog.text) == (batch_size == 8)


def test_out_of_memory_of_one_image_is_its_failure(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    Denoiser(monkeypatch, most=0)
    outcomes = list(generate_images(pipe, jobs_of(2), 2))
    assert [outcome.result for outcome in outcomes] == [None, None]
    assert outcomes[0].reason == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


def test_an_image_that_fails_only_in_batches_is_generated_alone(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(monkeypatch, most=1, error=RuntimeError("cuDNN error"))
    assert seeds(generate_images(pipe, jobs_of(2), 2)) == [0, 1]
    assert denoiser.sizes == [2, 2, 1, 2, 1]


def test_a_batch_size_is_kept_for_other_image_sizes(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(monkeypatch, most=2)
    list(generate_images(pipe, [*jobs_of(4, width=48), *jobs_of(4)], 4))
    assert denoiser.sizes == [4, 2, 2, 4, 2, 2]


def test_a_failing_image_does_not_affect_others(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(monkeypatch, broken="of this")
    jobs = jobs_of(4)
    jobs[1] = replace(jobs[1], request=replace(jobs[1].request, prompt="of this"))
    outcomes = list(generate_images(pipe, jobs, 3))
    assert [outcome.job.name for outcome in outcomes] == ["0", "1", "2", "3"]
    assert [outcome.reason for outcome in outcomes] == ["", "ZeroDivisionError: of this prompt", "", ""]
    # The first batch is generated in halves. The failing image is tried alone, and the last one fills a batch.
    assert denoiser.sizes == [3, 3, 3, 3, 1, 3, 3]


def test_a_failed_gpu_ends_the_run(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw_batch(*arguments: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(engine, "draw_batch", draw_batch)
    with pytest.raises(torch.AcceleratorError):
        list(generate_images(pipe, jobs_of(2)))


def test_jobs_are_read_as_needed(pipe: Any) -> None:
    read = 0

    def endless() -> Iterator[Job]:
        nonlocal read
        while True:
            read += 1
            # Every job has its own number of steps, so no two jobs are compatible.
            yield Job(replace(REQUEST, steps=read))

    outcomes = generate_images(pipe, endless(), 2)
    assert [next(outcomes).job.request.steps for _ in range(3)] == [1, 2, 3]
    assert read == 34


def test_each_image_has_its_own_report(pipe: Any) -> None:
    jobs = [Job(replace(REQUEST, seed=seed), (SEG(sigma=sigma),), "") for seed, sigma in enumerate((0.5, 1.0, 4.0))]
    together = [outcome.result.report for outcome in generate_images(pipe, jobs, 3)]
    single = [outcome.result.report for outcome in generate_images(pipe, jobs, 1)]
    for ours, theirs in zip(together, single, strict=True):
        assert ours.specs == theirs.specs
        assert ours.forwards == theirs.forwards
        for row, other in zip(ours.layers, theirs.layers, strict=True):
            assert row.fired == other.fired == 2
            assert row.moved == pytest.approx(other.moved, rel=1e-4)
    assert together[0].layers[0].moved < together[2].layers[0].moved


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True, "all"])
def test_batch_size_is_checked(batch_size: Any, pipe: Any) -> None:
    with pytest.raises(ValueError, match="batch size must be 'auto' or an integer of at least 1"):
        generate_images(pipe, [], batch_size)

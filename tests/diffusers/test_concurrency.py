# SPDX-License-Identifier: Apache-2.0
"""Several guidance objects at the same time, in any order and thread: each acts as it would alone, or is refused."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide, record_energy
from tests.diffusers.subjects import (
    FLUX,
    QWEN,
    SD1,
    SD3,
    SDXL,
    STEPS,
    Picture,
    Subject,
    every,
    kinds,
    left_as_it_was,
)
from tests.diffusers.transformer_cases import MODELS, run

SECONDS = 60  # a thread that waits longer is considered blocked


@pytest.mark.parametrize(
    "outer, inner", [(QWEN, SD3), pytest.param(SD1, FLUX, marks=pytest.mark.robustness)], ids=["qwen, sd3", "sd1, flux"]
)
def test_two_guided_pipelines_at_once(outer: Subject, inner: Subject) -> None:
    first, second = outer.build(), inner.build()
    expected = outer.guided(first), inner.guided(second)
    outputs = []

    def within(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        outputs.append(inner.run(second))
        with pytest.raises(ValueError, match="already guided"):
            guide(first, outer.seg(scale=1.0))
        return given

    with guide(second, inner.seg()), guide(first, outer.seg()):
        assert torch.equal(outer.run(first, callback_on_step_end=within), expected[0])
        assert torch.equal(outer.run(first), expected[0])
    assert len(outputs) == STEPS
    assert all(torch.equal(output, expected[1]) for output in outputs)


@pytest.mark.parametrize("reuse", [1, 2])
@pytest.mark.parametrize("subject", every(QWEN))
def test_a_denoiser_shared_between_steps(subject: Subject, reuse: int) -> None:
    with left_as_it_was(subject, subject.seg(reuse=reuse)) as (pipe, _):
        other = subject.beside(pipe)
        with pytest.raises(ValueError, match="shares it and was created since: run it again"):
            subject.run(other)
        guided, plain = subject.run(pipe), subject.run(other)
        outputs = []

        def within(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            outputs.append(subject.run(other))
            return given

        assert torch.equal(subject.run(pipe, callback_on_step_end=within), guided)
        assert all(torch.equal(output, plain) for output in outputs)
        with guide(other, subject.seg(reuse=reuse)):
            assert torch.equal(subject.run(other), guided)
            assert torch.equal(subject.run(pipe), guided)


@pytest.mark.parametrize(
    "subject", [QWEN, pytest.param(FLUX, marks=pytest.mark.robustness)], ids=["qwen-image", "flux"]
)
def test_a_denoiser_shared_between_the_calls_of_a_step(subject: Subject) -> None:
    with left_as_it_was(subject) as (pipe, _):
        other = subject.beside(pipe)
        with pytest.raises(ValueError, match="shares it and was created since: run it again"):
            subject.run(other)
        guided, plain = subject.run(pipe), subject.run(other)
        calls, outputs = [], []

        def between(*_: Any) -> None:
            calls.append(None)
            if len(calls) == 4:  # the call for the negative prompt in the second step
                outputs.append(subject.run(other))

        handle = pipe.transformer.register_forward_pre_hook(between, prepend=True)
        assert torch.equal(subject.run(pipe), guided)
        handle.remove()
        assert torch.equal(outputs[0], plain)


@pytest.mark.robustness
def test_contexts_left_in_the_wrong_order() -> None:
    first, second = SD1.build(), SDXL.build()
    plain = SD1.run(first), SDXL.run(second)
    pictures = Picture(first), Picture(second)
    guidances = guide(first, SD1.seg()), guide(second, SDXL.seg())
    recorder = record_energy(first, "mid")
    for context in (*guidances, recorder):
        context.__enter__()
    SD1.run(first)
    recorded = len(recorder.records)
    assert recorded > 0
    guidances[0].__exit__(None, None, None)
    assert torch.equal(SD1.run(first), plain[0])
    assert len(recorder.records) == 2 * recorded
    guided = SDXL.run(second)
    recorder.__exit__(None, None, None)
    pictures[0].assert_same(first)
    guidances[1].__exit__(None, None, None)
    pictures[1].assert_same(second)
    assert torch.equal(SDXL.run(second), plain[1])
    assert not torch.equal(guided, plain[1])


def test_a_context_entered_twice_is_left_when_the_outer_one_is() -> None:
    with left_as_it_was(SD3) as (pipe, guidance):
        guided = SD3.run(pipe)
        with guidance:
            assert torch.equal(SD3.run(pipe), guided)
        assert torch.equal(SD3.run(pipe), guided)
        with pytest.raises(ZeroDivisionError), guidance:
            raise ZeroDivisionError
        assert torch.equal(SD3.run(pipe), guided)
    with pytest.raises(RuntimeError, match="removed"), guidance:
        pass


@pytest.mark.one_in(4)
@pytest.mark.parametrize("place", ["callback", "denoiser", "callback of another thread's run"])
@pytest.mark.parametrize("subject", every(SD1, QWEN))
def test_removal_during_a_run_ends_the_guidance_after_the_step(subject: Subject, place: str) -> None:
    pipe = subject.build()
    plain = subject.run(pipe)
    expected = subject.guided(pipe, subject.seg(stop=0.3))  # the first two of four steps
    picture = Picture(pipe)
    guidance = guide(pipe, subject.seg())
    steps: list[int] = []

    def after_step(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == 1 and place != "denoiser":
            guidance.remove()
        return given

    def inside(*_: Any) -> None:
        if len(steps) == 1 and place == "denoiser":
            guidance.remove()

    handle = subject.denoiser(pipe).get_submodule(subject.inside).register_forward_hook(inside)

    def draw() -> torch.Tensor:
        return subject.run(pipe, callback_on_step_end=after_step)

    if place == "callback of another thread's run":
        with ThreadPoolExecutor(1) as threads:
            result = threads.submit(draw).result(SECONDS)
    else:
        result = draw()
    handle.remove()
    assert steps == list(range(STEPS))
    assert torch.equal(result, expected)
    picture.assert_same(pipe)
    assert torch.equal(subject.run(pipe), plain)
    guidance.remove()


@pytest.mark.parametrize("subject", every(QWEN))
def test_removal_by_another_thread_waits_for_the_forward(subject: Subject) -> None:
    pipe = subject.build()
    subject.run(pipe)
    picture, expected = Picture(pipe), subject.guided(pipe, subject.seg(stop=0.2))
    guidance = guide(pipe, subject.seg())
    within, asked = threading.Event(), threading.Event()

    def inside(*_: Any) -> None:
        if not within.is_set():
            within.set()
            assert asked.wait(SECONDS)

    handle = subject.denoiser(pipe).get_submodule(subject.inside).register_forward_hook(inside)
    with ThreadPoolExecutor(1) as threads:
        drawn = threads.submit(subject.run, pipe)
        assert within.wait(SECONDS)
        threading.Timer(0.1, asked.set).start()
        guidance.remove()
        assert asked.is_set(), "the guidance was removed during a call"
        result = drawn.result(SECONDS)
    handle.remove()
    assert torch.equal(result, expected)
    picture.assert_same(pipe)


def test_guide_while_another_thread_is_in_the_denoiser() -> None:
    pipe = SD1.build()
    other = SD1.beside(pipe)
    plain, guided = SD1.run(other), SD1.guided(pipe)
    within = threading.Event()
    go_on = threading.Event()

    def inside(*_: Any) -> None:
        if not within.is_set():
            within.set()
            assert go_on.wait(SECONDS)

    handle = pipe.unet.mid_block.register_forward_pre_hook(inside)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(SD1.run, other)
        assert within.wait(SECONDS)
        with guide(pipe, SD1.seg()):
            second = threads.submit(SD1.run, pipe)
            threading.Timer(0.1, go_on.set).start()
            assert torch.equal(first.result(SECONDS), plain)
            assert torch.equal(second.result(SECONDS), guided)
    handle.remove()
    assert torch.equal(SD1.run(pipe), plain)


def test_a_guided_pipeline_in_a_server() -> None:
    with left_as_it_was(QWEN) as (pipe, guidance):
        expected = QWEN.run(pipe)
        names = set()

        def draw() -> torch.Tensor:
            names.add(threading.current_thread().name)
            return QWEN.run(pipe)

        async def serve() -> list[torch.Tensor]:
            lock = asyncio.Lock()

            async def answer() -> torch.Tensor:
                async with lock:
                    return await asyncio.to_thread(draw)

            return await asyncio.gather(*(answer() for _ in range(6)))

        assert all(torch.equal(output, expected) for output in asyncio.run(serve()))
        for index in range(3):
            thread = threading.Thread(target=draw, name=f"request {index}")
            thread.start()
            thread.join(SECONDS)
        assert len(names) >= 4
        assert guidance.report().forwards == 2 * STEPS * 10


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "subject, kind", [(SD1, "SEG, reuse"), (SD1, "SAG"), (QWEN, "SEG, reuse")], ids=["sd1", "sd1, SAG", "qwen-image"]
)
def test_threads_that_share_a_denoiser(subject: Subject, kind: str) -> None:
    with left_as_it_was(subject, *kinds(subject)[kind]) as (pipe, _):
        others = [subject.beside(pipe) for _ in range(2)]
        with pytest.raises(ValueError, match="shares it and was created since"):
            subject.run(others[0])
        guided, plain = subject.run(pipe), subject.run(others[0])
        together = threading.Barrier(3)

        def draw(index: int) -> list[torch.Tensor]:
            together.wait(SECONDS)
            return [subject.run([pipe, *others][index]) for _ in range(2)]

        with ThreadPoolExecutor(3) as threads:
            for index, outputs in enumerate(threads.map(draw, range(3), timeout=SECONDS)):
                assert all(torch.equal(output, plain if index else guided) for output in outputs)


def test_a_removal_in_the_second_of_two_denoisers_takes_all_off() -> None:
    """Wan 2.2 has one denoiser for steps with much noise and one for the rest."""
    model = MODELS["wan"]
    first, second = model.build(), model.build()
    pipe = type(first)(
        **{**first.components, "transformer_2": second.transformer}, boundary_ratio=0.9, expand_timesteps=False
    )
    pipe.set_progress_bar_config(disable=True)
    plain = run(model, pipe)
    guidance = guide(pipe, SEG(scale=2.0, sigma=1.5, layers=model.layers))
    handle = pipe.transformer_2.blocks[0].register_forward_pre_hook(lambda *_: guidance.remove())
    run(model, pipe)
    handle.remove()
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer_2._forward_hooks
    assert torch.equal(run(model, pipe), plain)
    guide(pipe, SEG(layers=model.layers)).remove()

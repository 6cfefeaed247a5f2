# SPDX-License-Identifier: Apache-2.0
"""A run that is interrupted anywhere leaves the pipeline guided and working, without state of the interrupted run."""

from __future__ import annotations

import functools
import gc
import math
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, guide, list_layers, record_energy
from segkern.integrations.specs.layer_names import select_layers
from tests.diffusers.subjects import (
    QWEN,
    SD1,
    SD3,
    SDXL,
    STEPS,
    Picture,
    Subject,
    every,
    failing,
    left_as_it_was,
    stand_ins,
)


@contextmanager
def patched(owner: Any, name: str, error: type[BaseException], after: int) -> Iterator[None]:
    """Make a function raise the error after this number of calls."""
    own, calls = getattr(owner, name), []

    @functools.wraps(own)  # pipelines inspect its signature
    def fail(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > after:
            raise error
        return own(*args, **kwargs)

    with mock.patch.object(owner, name, fail):
        yield
    assert len(calls) == after + 1, f"{name} was called {len(calls)} times"


@contextmanager
def in_place(place: str, subject: Subject, pipe: Any, error: type[BaseException]) -> Iterator[dict[str, Any]]:
    """Return arguments for a run that is interrupted in its second step."""

    def callback(*_: Any) -> None:
        raise error

    model, step = subject.denoiser(pipe), 2 if subject is QWEN else 1
    options: dict[str, Any] = {"callback_on_step_end": callback} if place == "the callback" else {}
    with ExitStack() as stack:
        if place == "a block":
            stack.enter_context(failing(model.get_submodule(subject.inside), error, step))
        elif place == "a perturbed layer":
            (layer, *_) = select_layers(list_layers(pipe), subject.seg().layer_names)
            stack.enter_context(failing(model.get_submodule(f"{layer.module}.to_v"), error, step))
        elif place == "the scheduler":
            stack.enter_context(patched(pipe.scheduler, "step", error, 1))
        yield options


@contextmanager
def seen(*modules: torch.nn.Module) -> Iterator[list[weakref.ref[torch.Tensor]]]:
    """Collect weak references to images, texts and activations that reach modules inside."""
    references: list[weakref.ref[torch.Tensor]] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        tensors = [tensor for tensor in (*args, *kwargs.values()) if isinstance(tensor, torch.Tensor)]
        references.extend(weakref.ref(tensor) for tensor in tensors if tensor.ndim >= 3)

    handles = [module.register_forward_pre_hook(note, with_kwargs=True, prepend=True) for module in modules]
    yield references
    for handle in handles:
        handle.remove()
    assert references
    gc.collect()
    assert not [reference for reference in references if reference() is not None]


PLACES = ["a block", "a perturbed layer", "the scheduler", "the callback"]
ERRORS = [torch.OutOfMemoryError, KeyboardInterrupt]
BREAKS = [
    pytest.param(
        place,
        error,
        id=f"{place}, {error.__name__}",
        marks=[pytest.mark.robustness] * (place != "a block" and error is not KeyboardInterrupt),
    )
    for place in PLACES
    for error in ERRORS
]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place, error", BREAKS)
@pytest.mark.parametrize("subject", every(SD1, SD3))
def test_a_run_that_breaks_off(subject: Subject, place: str, error: type[BaseException]) -> None:
    with left_as_it_was(subject, subject.seg(reuse=1), PAG(scale=0.5, layers=subject.layers)) as (pipe, guided):
        expected = subject.run(pipe)
        model = subject.denoiser(pipe)
        with seen(model, model.get_submodule(subject.inside)):
            with in_place(place, subject, pipe, error) as options, pytest.raises(error):
                subject.run(pipe, **options)
            assert guided.report().forwards > STEPS
            assert stand_ins(subject, pipe) == 0
        assert torch.equal(subject.run(pipe), expected)


def test_a_run_that_breaks_off_in_the_vae() -> None:
    with left_as_it_was(SD1) as (pipe, _):
        expected = SD1.run(pipe)
        with patched(pipe.vae, "decode", torch.OutOfMemoryError, 0), pytest.raises(torch.OutOfMemoryError):
            SD1.run(pipe, output_type="pt")
        assert torch.equal(SD1.run(pipe), expected)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt], ids=lambda e: e.__name__)
@pytest.mark.parametrize("subject", [SD1, pytest.param(SDXL, marks=pytest.mark.robustness)], ids=["sd1", "sdxl"])
def test_a_run_that_breaks_off_in_the_second_forward(subject: Subject, error: type[BaseException]) -> None:
    with left_as_it_was(subject, SAG(), SEG(sigma=2.0, reuse=2)) as (pipe, guided):
        expected = subject.run(pipe)
        for after in (0, 3):  # the first call of the first step, and the second call of the second step
            with seen(pipe.unet):
                with failing(pipe.unet.get_submodule(subject.inside), error, after), pytest.raises(error):
                    subject.run(pipe)
                guided.report()
                assert stand_ins(subject, pipe) == 0
        with record_energy(pipe, "m0") as recorder:  # the first call is not mistaken for a second one
            assert torch.equal(subject.run(pipe), expected)
        assert len(recorder.records) == STEPS


@pytest.mark.parametrize("subject", every(SD3))
def test_a_schedule_that_fails(subject: Subject) -> None:
    broken: list[Any] = []

    def schedule(fraction: float) -> float:
        if fraction > 0.3 and broken:
            if broken[0] is math.nan:
                return math.nan
            raise broken[0]
        return 1.0

    with left_as_it_was(subject, subject.seg(schedule=schedule, reuse=3)) as (pipe, guided):
        expected = subject.run(pipe)
        for error, raised in ((LookupError("a table"), LookupError), (math.nan, ValueError)):
            broken[:] = [error]
            with pytest.raises(raised):
                subject.run(pipe)
            assert stand_ins(subject, pipe) == 0
            assert guided.report().forwards > 0
            broken.clear()
            assert torch.equal(subject.run(pipe), expected)


@pytest.mark.parametrize("subject", every(SD3))
def test_a_prediction_that_is_not_a_number(subject: Subject) -> None:
    pipe = subject.build()
    plain = subject.run(pipe)
    picture = Picture(pipe)

    def lose(_: Any, __: Any, output: Any) -> Any:
        return output * math.nan

    guided = guide(pipe, subject.seg(), trust=[lose])
    expected = subject.run(pipe)
    block = subject.denoiser(pipe).get_submodule(subject.inside)
    handle = block.register_forward_hook(lose)
    assert subject.run(pipe).isnan().all()
    handle.remove()
    assert torch.equal(subject.run(pipe), expected)
    with pytest.warns(UserWarning, match="encountered NaN") as caught:  # later steps began with NaN
        guided.remove()
    assert len(caught) == 1
    picture.assert_same(pipe)
    assert torch.equal(subject.run(pipe), plain)


@pytest.mark.parametrize("at", [0, 1, STEPS - 1])
@pytest.mark.parametrize("subject", every(SD3))
def test_a_cancelled_run(subject: Subject, at: int) -> None:
    def cancel(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = step >= at
        return given

    with left_as_it_was(subject, subject.seg(reuse=2, stop=0.6)) as (pipe, _):
        expected = subject.run(pipe)
        for _ in range(2):
            cancelled = subject.run(pipe, callback_on_step_end=cancel)
            assert torch.equal(cancelled, expected) == (at == STEPS - 1)
        assert torch.equal(subject.run(pipe), expected)


@pytest.mark.parametrize("subject", every(SD3))
def test_a_run_that_breaks_off_before_the_first_step(subject: Subject) -> None:
    with left_as_it_was(subject) as (pipe, guided):
        error = torch.OutOfMemoryError
        with patched(pipe.scheduler, "set_timesteps", error, 0), pytest.raises(error):
            subject.run(pipe)
        with pytest.warns(UserWarning, match="fired in none of 0 denoiser calls"):
            guided.report()
        expected = subject.run(pipe)
        with failing(subject.denoiser(pipe), ZeroDivisionError), pytest.raises(ZeroDivisionError):
            subject.run(pipe)  # a user's hook, after those of guidance
        assert torch.equal(subject.run(pipe), expected)


def test_a_run_without_the_pipelines_own_guidance_that_breaks_off() -> None:
    embeds = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(3))
    negative = CFG(negative_prompt_embeds=embeds)
    pipe = SD1.build()
    with guide(pipe, negative, SAG()) as guided:
        given = {"guidance_scale": 1.0, "negative_prompt_embeds": None}
        expected = SD1.run(pipe, **given)
        for error in (torch.OutOfMemoryError, KeyboardInterrupt):
            with failing(pipe.unet.mid_block, error, 1), pytest.raises(error):
                SD1.run(pipe, **given)
            with pytest.raises(ValueError, match="already applies classifier-free guidance"):
                SD1.run(pipe)
            assert torch.equal(SD1.run(pipe, **given), expected)
        assert guided.report().layers[0].fired > 0

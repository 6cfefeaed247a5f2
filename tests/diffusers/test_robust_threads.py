# SPDX-License-Identifier: Apache-2.0
"""Threads whose pipelines share a guided denoiser draw what each would draw alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SAG, SEG, guide
from tests.diffusers.subjects import QWEN, SD1, Subject, every, left_as_it_was
from tests.diffusers.transformer_cases import MODELS, run

SECONDS = 60  # after which a thread that waits is taken to wait forever


@pytest.mark.parametrize("subject", every(SD1, QWEN))
def test_threads_that_share_a_denoiser(subject: Subject) -> None:
    with left_as_it_was(subject, subject.seg(reuse=2)) as (pipe, _):
        others = [subject.beside(pipe) for _ in range(2)]
        guided, plain = subject.run(pipe), subject.run(others[0])
        together = threading.Barrier(3)

        def draw(index: int) -> list[torch.Tensor]:
            together.wait(SECONDS)
            return [subject.run([pipe, *others][index]) for _ in range(2)]

        with ThreadPoolExecutor(3) as threads:
            for index, found in enumerate(threads.map(draw, range(3), timeout=SECONDS)):
                assert all(torch.equal(each, plain if index else guided) for each in found)


def test_a_second_forward_lets_nobody_else_in() -> None:
    """Two threads that could only both be in the denoiser if one of them had taken no turn."""
    with left_as_it_was(SD1, SAG()) as (pipe, guidance):
        other = SD1.beside(pipe)
        guided, plain = SD1.run(pipe), SD1.run(other)
        again, entered, changed, passed = (threading.Event() for _ in range(4))
        drawing: dict[str, int] = {}

        def before(*_: Any) -> None:
            here = threading.get_ident()
            if here == drawing["guided"] and guidance._sag.running and not again.is_set():
                again.set()
                entered.wait(0.5)  # the other one comes in now, if it may
            elif here == drawing.get("plain") and not entered.is_set():
                entered.set()
                changed.wait(0.5)  # and is still in when the next step has changed the layers

        def after(*_: Any) -> None:
            if threading.get_ident() == drawing.get("plain"):
                passed.set()
            elif entered.is_set() and not guidance._sag.running:
                changed.set()
                passed.wait(0.5)

        def draw(name: str, one: Any) -> torch.Tensor:
            drawing[name] = threading.get_ident()
            assert name == "guided" or again.wait(SECONDS)
            return SD1.run(one)

        middle = pipe.unet.mid_block
        handles = middle.register_forward_pre_hook(before), middle.register_forward_hook(after)
        with ThreadPoolExecutor(2) as threads:
            found = [threads.submit(draw, "guided", pipe), threads.submit(draw, "plain", other)]
            assert torch.equal(found[0].result(SECONDS), guided)
            assert torch.equal(found[1].result(SECONDS), plain)
        for handle in handles:
            handle.remove()


def test_a_removal_in_the_second_of_two_denoisers_takes_all_off() -> None:
    """Wan 2.2: one for steps of much noise, one for the rest."""
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

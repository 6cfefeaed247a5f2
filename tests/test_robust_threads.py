# SPDX-License-Identifier: Apache-2.0
"""Threads whose pipelines share a guided denoiser draw what each would draw alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pipeline_tools import QWEN, SD1, Subject, every, left_as_it_was
from reliability import survives
from transformer_models import MODELS, run

from segkern.integrations.diffusers import SAG, SEG, guide

Tried = Callable[[int], None]
SECONDS = 60  # after which a thread that waits is taken to wait forever


@survives("pipelines", "threads whose pipelines share a guided denoiser")
@pytest.mark.parametrize("subject", every(SD1, QWEN))
def test_threads_that_share_a_denoiser(subject: Subject, tried: Tried) -> None:
    _draw_together(subject, subject.seg(reuse=2), tried)


@survives("pipelines", "threads whose pipelines share a denoiser that runs twice in a step")
def test_threads_beside_self_attention_guidance(tried: Tried) -> None:
    _draw_together(SD1, SAG(), tried)


def _draw_together(subject: Subject, spec: Any, tried: Tried) -> None:
    with left_as_it_was(subject, spec) as (pipe, _):
        others = [subject.beside(pipe) for _ in range(2)]
        guided, plain = subject.run(pipe), subject.run(others[0])
        together = threading.Barrier(3)

        def draw(index: int) -> list[torch.Tensor]:
            together.wait(SECONDS)
            return [subject.run([pipe, *others][index]) for _ in range(2)]

        with ThreadPoolExecutor(3) as threads:
            for index, found in enumerate(threads.map(draw, range(3), timeout=SECONDS)):
                assert all(torch.equal(each, plain if index else guided) for each in found)
                tried(len(found))


@survives("pipelines", "a removal inside the second of two denoisers")
def test_a_removal_in_the_second_of_two_denoisers_takes_all_off(tried: Tried) -> None:
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
    tried(2)

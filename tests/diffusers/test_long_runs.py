# SPDX-License-Identifier: Apache-2.0
"""A thousand guided steps, and hundreds of guidance objects, need no more memory than a few.

After a warm-up that fills caches, the test counts objects known to the garbage collector and blocks allocated by
Python. A leak of one tensor per step would add 900 objects; a leak of a guidance object would add a hundred each. The
bounds on objects are half an object per step or guidance object. The number of blocks varies by some hundreds without
any guidance. The resident memory of the process, which includes PyTorch's allocations, may grow by what allocators
keep.
"""

from __future__ import annotations

import copy
import gc
import resource
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SAGGuider, SEGGuider, guide
from tests.diffusers.modular_pipelines import modular_sdxl, run_sdxl
from tests.diffusers.small_pipelines import noise, smaller_pipeline
from tests.diffusers.subjects import QWEN, SD1, SD3, Subject, kinds
from tests.diffusers.unet_cases import built_of, unet
from tests.diffusers.unet_image_cases import IMAGES

STEPS = 1000
OBJECTS = 450
BLOCKS = 700
RESIDENT = 16 << 20


def _resident() -> int:
    """Return the resident memory of the process in bytes; the peak if the system does not provide it."""
    memory = Path("/proc/self/statm")
    if memory.exists():
        return int(memory.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def no_growth(bound: int = OBJECTS) -> Iterator[None]:
    """Assert that memory does not grow inside this context."""

    def now() -> tuple[int, int, int]:
        gc.collect()
        return len(gc.get_objects()), sys.getallocatedblocks(), _resident()

    before = now()
    yield
    growth = [later - earlier for earlier, later in zip(before, now(), strict=True)]
    assert growth[0] < bound, growth
    assert growth[1] < BLOCKS, growth
    assert growth[2] < RESIDENT, growth


def _one_level() -> Subject:
    """Return Stable Diffusion 1 with one level, so that a step takes milliseconds."""
    case = IMAGES["sd1"]
    options = {"block_out_channels": (8,), "down_block_types": ("CrossAttnDownBlock2D",)}
    make = built_of(unet, **options, up_block_types=("CrossAttnUpBlock2D",))
    return replace(SD1, name="sd1 of one level", make=lambda: make(case))


SMALL = _one_level()


def _cases() -> list[Any]:
    cases = [(SMALL, name) for name in kinds(SMALL)] + [(SD3, "SEG"), (SD3, "PAG"), (QWEN, "SEG, reuse")]
    return [pytest.param(subject, kinds(subject)[name], id=f"{subject.name}, {name}") for subject, name in cases]


def drawing(subject: Subject, pipe: Any, **more: Any) -> Callable[[], torch.Tensor]:
    """Return a function that generates a small image in a tenth of the steps."""
    size = {"height": 16, "width": 16} if subject.part == "unet" else {"height": 32, "width": 32}
    return lambda: subject.run(pipe, **{"num_inference_steps": STEPS // 10, **size, **more})


@pytest.mark.robustness
@pytest.mark.parametrize("subject, specs", _cases())
def test_a_thousand_steps(subject: Subject, specs: tuple[Any, ...]) -> None:
    pipe = subject.build()
    draw = drawing(subject, pipe)
    with guide(pipe, *specs) as guidance:
        first = draw()
        with no_growth():
            for _ in range(9):
                last = draw()
            assert torch.equal(last, first)
            del last
            guidance.report()


@pytest.mark.robustness
@pytest.mark.parametrize("guider", [SEGGuider(sigma=2.0, layers="m0", reuse=2), SAGGuider()], ids=["SEG", "SAG"])
def test_a_thousand_steps_with_a_guider(guider: Any) -> None:
    pipe = smaller_pipeline()
    modular = modular_sdxl(pipe, guider)
    latents = noise(1, 8, 8)

    def draw() -> torch.Tensor:
        return run_sdxl(modular, pipe, latents=latents, num_inference_steps=STEPS // 10)

    expected = draw()
    with no_growth():
        for _ in range(9):
            assert torch.equal(draw(), expected)
        guider.report()


@pytest.mark.robustness
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt], ids=lambda e: e.__name__)
def test_runs_that_break_off_again_and_again(error: type[BaseException]) -> None:
    pipe = SMALL.build()

    def fail(*_: Any) -> None:
        raise error

    with guide(pipe, SD1.seg(reuse=2)):
        expected = SD1.run(pipe)  # also fills the caches

        def cycle(times: int) -> None:
            for _ in range(times):
                handle = pipe.unet.up_blocks[0].register_forward_hook(fail)
                try:
                    SD1.run(pipe, num_inference_steps=1)
                except error:
                    handle.remove()

        cycle(5)
        with no_growth(25):
            cycle(50)
        assert torch.equal(SD1.run(pipe), expected)


@pytest.mark.robustness
@pytest.mark.parametrize("subject", [SMALL, SD3], ids=lambda subject: subject.name)
def test_guidances_that_come_and_go(subject: Subject) -> None:
    pipe = subject.build()
    guidances = list(kinds(subject).values())
    draw = drawing(subject, pipe, num_inference_steps=1)

    def cycle(times: int) -> None:
        for index in range(times):
            with guide(pipe, *guidances[index % len(guidances)]):
                copy.deepcopy(subject.denoiser(pipe))
                draw()

    cycle(3 * len(guidances))
    with no_growth(150):
        cycle(300)


def test_a_removed_guidance_is_garbage() -> None:
    pipe = SD1.build()
    with guide(pipe, SD1.seg()) as guidance:
        SD1.run(pipe, num_inference_steps=1)
    alive = weakref.ref(guidance)
    del guidance
    gc.collect()
    assert alive() is None

# SPDX-License-Identifier: Apache-2.0
"""Other tasks of transformers under ``guide``, compared with the slow computation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import PAG, SEG, guide
from tests.compatibility import proves
from tests.diffusers.probes import hooks_of
from tests.diffusers.slow_guidance import Perturbed, transformer_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.transformer_cases import run
from tests.diffusers.transformer_task_cases import DISTILLED, TASKS

PROVED = {  # model and task in words
    "sd3 img2img": ("Stable Diffusion 3", "image to image"),
    "sd3 inpainting": ("Stable Diffusion 3.5", "inpainting"),
    "sd3 ControlNet": ("Stable Diffusion 3", "ControlNet"),
    "flux img2img": ("Flux.1", "image to image"),
    "flux inpainting": ("Flux.1", "inpainting"),
    "flux ControlNet": ("Flux.1", "ControlNet"),
    "flux Kontext": ("Flux.1 Kontext", "editing"),
    "flux Fill": ("Flux.1 Fill", "inpainting"),
    "pixart-alpha": ("PixArt-alpha", "text to image"),
    "qwen img2img": ("Qwen-Image", "image to image"),
    "wan image to video": ("Wan", "image to video"),
    "chroma img2img": ("Chroma", "image to image"),
    "chroma inpainting": ("Chroma", "inpainting"),
    "flux2": ("Flux.2", "text to image"),
    "flux2 editing": ("Flux.2", "editing"),
    "flux2-klein editing": ("Flux.2 Klein", "editing"),
    "flux2-klein inpainting": ("Flux.2 Klein", "inpainting"),
    "flux2-klein-kv": ("Flux.2 Klein KV", "text to image"),
    "hunyuan-video image to video": ("HunyuanVideo", "image to video"),
    "hunyuan-video first frame": ("HunyuanVideo", "image to video"),
    "skyreels": ("SkyReels V1", "image to video"),
    "framepack": ("FramePack", "image to video"),
    "cogvideox image to video": ("CogVideoX", "image to video"),
    "cogvideox video to video": ("CogVideoX", "video to video"),
    "cogvideox control": ("CogVideoX Fun", "control video"),
}


def sigma_of(name: str) -> float:
    return math.inf if name.endswith("ControlNet") else 1.5


def cells() -> Iterator[Any]:
    """Yield every task with every guidance method, and what it proves."""
    for name in TASKS:
        model, task = PROVED[name]
        group = "Video" if TASKS[name].frames > 1 else "Transformers"
        seg = "SEG at infinity" if math.isinf(sigma_of(name)) else "SEG"
        for guidance, word in (("seg", seg), ("pag", "PAG")):
            yield pytest.param(name, guidance, marks=proves(group=group, model=model, task=task, guidance=word))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name, guidance", list(cells()))
def test_equals_the_slow_way(name: str, guidance: str) -> None:
    """Reference: a separate call per branch with float64 blurred logits; not square, mostly two samples."""
    model = TASKS[name]
    pipe = model.build()
    cfg, samples = name not in DISTILLED, 2 if model.frames == 1 else 1

    def draw() -> torch.Tensor:
        return run(model, pipe, 6, 4, samples=samples, cfg=cfg)

    plain = draw()
    sigma = sigma_of(name)
    slow = Perturbed(2.0, sigma if guidance == "seg" else None, model.modules)
    expected = transformer_run(model, pipe, [slow], draw, cfg=cfg)
    assert relative(plain, expected) > 5 * PIPELINE_TOLERANCE  # the effect is large enough to be measured
    spec = (
        SEG(scale=2.0, sigma=sigma, layers=model.layers) if guidance == "seg" else PAG(scale=2.0, layers=model.layers)
    )
    with guide(pipe, spec) as active:
        assert relative(draw(), expected) < PIPELINE_TOLERANCE
    assert all(row.fired == 3 and row.moved for row in active.report().layers)
    assert hooks_of(pipe.transformer) == 0
    assert torch.equal(draw(), plain)


def test_a_controlnet_runs_once() -> None:
    """Its residuals are added between blocks, so branches join at the input, and the ControlNet runs only once."""
    model = TASKS["flux ControlNet"]
    pipe = model.build()
    batches: list[int] = []
    handle = pipe.controlnet.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    with guide(pipe, SEG(layers=model.layers)):
        run(model, pipe, cfg=True)
    handle.remove()
    assert batches == [1, 1, 1]

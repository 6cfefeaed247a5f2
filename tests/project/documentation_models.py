# SPDX-License-Identifier: Apache-2.0
"""Small random models in place of the published ones that the documentation loads."""

from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from segkern.generation.loading import DEMO
from segkern.integrations.diffusers import StableDiffusionXLSEGPipeline
from tests.diffusers import transformer_cases
from tests.diffusers.modular_pipelines import modular_sdxl, run_sdxl
from tests.diffusers.small_pipelines import noise, tiny_pipeline

_FROM_PRETRAINED = diffusers.DiffusionPipeline.from_pretrained.__func__  # before any test replaces it
_STEPS = 3
_BUNDLED_STEPS = 10  # of the bundled model, which draws real pictures
_LOADED = ("dtype", "torch_dtype", "use_safetensors", "variant")  # what a page may ask of the loading
_BLOCKS = 12  # of a transformer, so that layers of the examples exist
_SHRINK = 32  # published pixels for one of a small model


def small(kind: type, always: Mapping[str, Any] | None = None, **parts: Any) -> Any:
    """A small pipeline of a class, whose runs are short and whose pictures are small.

    Args:
        kind: the class.
        always: arguments of every call.
        parts: of the pipeline, beside those it has.
    """
    if kind is diffusers.DiffusionPipeline:
        kind = diffusers.StableDiffusionXLPipeline
    if kind.__name__.startswith("StableDiffusion3"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer_cases, "BLOCKS", _BLOCKS)
            pipe = transformer_cases.MODELS["sd3"].build()
        return _short(pipe, _by_embeddings, always or {})
    return _short(tiny_pipeline(kind, own_unet=True, **parts), _by_prompt, always or {})


def _short(pipe: Any, arguments: Any, always: Mapping[str, Any]) -> Any:
    stock = type(pipe)

    def call(self: Any, prompt: Any = None, **given: Any) -> Any:
        return stock.__call__(self, **arguments(prompt, given), **always)

    pipe.__class__ = type(stock.__name__, (stock,), {"__call__": call, "__module__": stock.__module__})
    return pipe


def _by_prompt(prompt: Any, given: dict[str, Any]) -> dict[str, Any]:
    steps = min(given.pop("num_inference_steps", _STEPS), _STEPS)
    sides = {name: max(16, given.pop(name, 512) // _SHRINK // 8 * 8) for name in ("height", "width")}
    return {"prompt": prompt, **sides, "num_inference_steps": steps, **given}


def _by_embeddings(prompt: Any, given: dict[str, Any]) -> dict[str, Any]:
    for name in ("height", "width", "num_inference_steps"):
        given.pop(name, None)
    sizes = transformer_cases.MODELS["sd3"].call(6, 4, 1, True)
    short = {"height": 96, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    return {**short, **sizes, **given}


def _few_steps(prompt: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, **given, "num_inference_steps": min(given.get("num_inference_steps", 50), _BUNDLED_STEPS)}


@cache
def _bundled() -> dict[str, Any]:
    """Parts of the bundled model, which is loaded once."""
    pipe = _FROM_PRETRAINED(diffusers.StableDiffusionXLPipeline, DEMO, dtype=torch.float32)
    return dict(pipe.components)


class Modular:
    """A modular pipeline that takes a prompt: the small one takes embeddings alone."""

    def __init__(self) -> None:
        self._stock = tiny_pipeline()
        self._guider: Any = None

    def update_components(self, guider: Any) -> None:
        self._guider = guider

    def __call__(self, prompt: str, height: int, width: int, output: str) -> torch.Tensor:
        assert output == "images"
        modular = modular_sdxl(self._stock, self._guider)
        return run_sdxl(modular, self._stock, prompt, latents=noise(1, height // _SHRINK, width // _SHRINK))


def replace_models(patch: pytest.MonkeyPatch, **always: Any) -> None:
    """Let ``from_pretrained`` of a hub's name make a small pipeline, and leave it on the CPU where there is no GPU.

    The official script's module is there too: segkern's pipeline with its arguments, whose latents are the official
    ones by ``tests/diffusers/test_golden.py``.
    """
    official = types.ModuleType("pipeline_seg")
    official.StableDiffusionXLSEGPipeline = StableDiffusionXLSEGPipeline  # type: ignore[attr-defined]
    patch.setitem(sys.modules, "pipeline_seg", official)
    to = diffusers.DiffusionPipeline.to

    def from_pretrained(kind: type, name: Any, **given: Any) -> Any:
        if Path(name) == DEMO and kind is not diffusers.DiffusionPipeline:
            pipe = kind(**_bundled())
            pipe.set_progress_bar_config(disable=True)
            return _short(pipe, _few_steps, always)
        if Path(name).is_dir():
            return _FROM_PRETRAINED(kind, name, **given)
        assert str(name).count("/") == 1, f"{name!r} is no name of a hub"
        parts = {key: value for key, value in given.items() if key == "pag_applied_layers"}
        assert set(given) <= {*_LOADED, *parts}, given
        return small(kind, always, **parts)

    def moved(pipe: Any, *args: Any, **given: Any) -> Any:
        if not torch.cuda.is_available() and args[:1] == ("cuda",):
            return pipe
        return to(pipe, *args, **given)

    patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    patch.setattr(diffusers.DiffusionPipeline, "to", moved)

# SPDX-License-Identifier: Apache-2.0
"""Small random models in place of the published ones that the documentation loads."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file import FromSingleFileMixin

from segkern.generation.loading import DEMO
from segkern.integrations.diffusers import StableDiffusionXLSEGPipeline
from tests.diffusers import transformer_cases
from tests.diffusers.modular_pipelines import modular_sdxl, run_sdxl
from tests.diffusers.small_pipelines import noise, tiny_pipeline, tiny_sd

_FROM_PRETRAINED = diffusers.DiffusionPipeline.from_pretrained.__func__  # before any test replaces it
_STEPS = 3
_BUNDLED_STEPS = 10  # for the bundled model, which generates recognisable images
_LOADED = ("dtype", "torch_dtype", "use_safetensors", "variant")  # loading arguments that a page may use
_BLOCKS = 12  # number of transformer blocks, so that the layers of the examples exist
_SHRINK = 32  # a small model generates one pixel for this many pixels of a published one
_TRANSFORMERS = {"StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}


def small(kind: type, always: Mapping[str, Any] | None = None, **parts: Any) -> Any:
    """Return a small pipeline of a class that runs few steps and generates small images.

    Args:
        kind: pipeline class.
        always: additional arguments of every call.
        parts: additional components of the pipeline.
    """
    if kind is diffusers.DiffusionPipeline:
        kind = diffusers.StableDiffusionXLPipeline
    if kind.__name__ in _TRANSFORMERS:
        case = transformer_cases.MODELS[_TRANSFORMERS[kind.__name__]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer_cases, "BLOCKS", _BLOCKS)
            pipe = case.build()
        return _short(pipe, functools.partial(_by_embeddings, case), always or {})
    if kind is diffusers.StableDiffusionPipeline:
        return _short(tiny_sd(), _by_prompt, always or {})
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


def _by_embeddings(case: transformer_cases.TransformerCase, prompt: Any, given: dict[str, Any]) -> dict[str, Any]:
    for name in ("height", "width", "num_inference_steps"):
        given.pop(name, None)
    sizes = case.call(6, 4, 1, True)
    short = {"height": 6 * case.factor, "width": 4 * case.factor, "num_inference_steps": 2, "output_type": "latent"}
    return {**short, **sizes, **given}


def _few_steps(prompt: Any, given: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": prompt, **given, "num_inference_steps": min(given.get("num_inference_steps", 50), _BUNDLED_STEPS)}


@cache
def _bundled() -> dict[str, Any]:
    """Return the components of the bundled model, which is loaded once."""
    pipe = _FROM_PRETRAINED(diffusers.StableDiffusionXLPipeline, DEMO, dtype=torch.float32)
    return dict(pipe.components)


class Modular:
    """A modular pipeline that accepts a prompt; the small one accepts only embeddings."""

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
    """Make ``from_pretrained`` and ``from_single_file`` return small pipelines, and stay on the CPU without a GPU.

    The module of the official script is replaced by segkern's pipeline with the same arguments, whose latents are the
    official ones according to ``tests/diffusers/test_golden.py``.
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
        assert str(name).count("/") == 1, f"{name!r} is not a hub name"
        parts = {key: value for key, value in given.items() if key == "pag_applied_layers"}
        assert set(given) <= {*_LOADED, *parts}, given
        return small(kind, always, **parts)

    def moved(pipe: Any, *args: Any, **given: Any) -> Any:
        if not torch.cuda.is_available() and args[:1] == ("cuda",):
            return pipe
        return to(pipe, *args, **given)

    def from_single_file(kind: type, path: str, **given: Any) -> Any:
        assert path.endswith(".safetensors"), path
        assert set(given) <= {*_LOADED, "config"}, given
        return small(kind, always)

    def offload(pipe: Any, *args: Any, **given: Any) -> None:
        if torch.cuda.is_available():
            offloaded(pipe, *args, **given)

    offloaded = diffusers.DiffusionPipeline.enable_model_cpu_offload
    patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    patch.setattr(FromSingleFileMixin, "from_single_file", classmethod(from_single_file))
    patch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", offload)
    patch.setattr(diffusers.DiffusionPipeline, "to", moved)

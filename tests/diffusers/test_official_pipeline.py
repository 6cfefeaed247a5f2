# SPDX-License-Identifier: Apache-2.0
"""The official pipeline's name and arguments have their original meaning."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionXLPipeline,
)

from segkern.integrations.diffusers import SEG, StableDiffusionXLSEGPipeline, guide
from tests.diffusers.small_pipelines import noise, run, tiny_pipeline


def official(seg: dict[str, Any]) -> torch.Tensor:
    return run(tiny_pipeline(StableDiffusionXLSEGPipeline), latents=noise(), **seg)


def ours(*specs: SEG) -> torch.Tensor:
    pipe = tiny_pipeline()
    if not specs:
        return run(pipe, latents=noise())
    with guide(pipe, *specs):
        return run(pipe, latents=noise())


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "seg, specs",
    [
        ({}, [SEG(3.0, math.inf, "mid")]),
        ({"seg_blur_sigma": 9999.1}, [SEG()]),
        ({"seg_blur_sigma": 9999.0}, [SEG(sigma=9999.0)]),
        (
            {"seg_scale": 2.0, "seg_blur_sigma": 1.0, "seg_applied_layers": ["down", "up"]},
            [SEG(2.0, 1.0, ["down", "up"])],
        ),
        ({"seg_applied_layers_index": ["d4", "m0", "u2"]}, [SEG(layers=["d4", "m0", "u2"])]),
        ({"seg_applied_layers_index": [], "seg_applied_layers": ["up"]}, [SEG(layers="up")]),
        ({"seg_applied_layers": "mid"}, [SEG()]),
        ({"seg_scale": 0.0}, []),
        ({"seg_scale": -1.0}, []),
        ({"seg_applied_layers": []}, []),
        ({"seg_applied_layers": None, "seg_applied_layers_index": None}, []),
    ],
    ids=str,
)
def test_official_arguments_mean_what_they_meant(seg: dict[str, Any], specs: list[SEG]) -> None:
    assert torch.equal(official(seg), ours(*specs))


@pytest.mark.parametrize(
    "seg, quoted",
    [
        ({"seg_applied_layers": ["middle"]}, "'middle'"),
        ({"seg_applied_layers_index": ["u99"]}, "'u99'"),
        ({"seg_blur_sigma": -1.0}, "-1.0"),
        ({"seg_scale": math.nan}, "nan"),
    ],
    ids=str,
)
def test_official_arguments_that_do_not_fit_are_quoted(seg: dict[str, Any], quoted: str) -> None:
    with pytest.raises(ValueError, match=quoted):
        official(seg)


def test_the_official_pipeline_is_the_stock_one_with_more_arguments() -> None:
    stock = inspect.signature(StableDiffusionXLPipeline.__call__).parameters
    seg = inspect.signature(StableDiffusionXLSEGPipeline.__call__).parameters
    added = {"seg_scale", "seg_blur_sigma", "seg_applied_layers", "seg_applied_layers_index"}
    assert list(stock) == [name for name in seg if name not in added]
    assert added == set(seg) - set(stock)
    assert "a red fox" in (StableDiffusionXLSEGPipeline.__doc__ or "")


def test_the_official_pipeline_takes_positional_arguments_and_returns_tuples() -> None:
    pipe = tiny_pipeline(StableDiffusionXLSEGPipeline)
    processors = dict(pipe.unet.attn_processors)
    arguments = {"latents": noise(), "num_inference_steps": 3, "output_type": "latent"}
    as_tuple = pipe("a red fox", None, 32, 32, **arguments, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], pipe(prompt="a red fox", height=32, width=32, **arguments).images)
    assert all(pipe.unet.attn_processors[name] is processors[name] for name in processors)


def test_the_official_pipeline_is_made_from_a_stock_one() -> None:
    pipe = StableDiffusionXLSEGPipeline.from_pipe(tiny_pipeline())
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(run(pipe, latents=noise()), ours(SEG()))

# SPDX-License-Identifier: Apache-2.0
"""Layouts of a denoiser's batches and calls: guided like the slow computation, or refused in the first step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.own_pipelines import FLUX, own_flux
from tests.diffusers.slow_guidance import Perturbed, transformer_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.transformer_cases import run

SPEC = SEG(3.0, 1.0, layers=FLUX.layers)
ROWS, COLUMNS = 6, 4
NAMINGS = ("stock", "scale", "own")


@lru_cache
def slow(samples: int, one_text: bool = False) -> torch.Tensor:
    """Return latents of the stock Flux pipeline under guidance."""
    pipe, given = FLUX.build(), FLUX.call(ROWS, COLUMNS, samples, True)
    names = [name.removeprefix("negative_") for name in given if name.startswith("negative_") and one_text]
    texts = {f"negative_{name}": given[name].clone() for name in names}
    return transformer_run(
        FLUX, pipe, [Perturbed(3.0, 1.0, FLUX.modules)], lambda: run(FLUX, pipe, samples=samples, **texts)
    )


def named(naming: str, samples: int, one_text: bool = False) -> dict[str, Any]:
    """Return arguments of a pipeline call, with stock or other names for the negative text and its scale."""
    given = FLUX.call(ROWS, COLUMNS, samples, True)
    scale = given.pop("true_cfg_scale")
    texts = given.pop("negative_prompt_embeds"), given.pop("negative_pooled_prompt_embeds")
    if one_text:
        texts = given["prompt_embeds"], given["pooled_prompt_embeds"]
    if naming == "own":
        return {**given, "negative": texts[0], "pooled_negative": texts[1], "cfg": scale}
    given |= {"negative_prompt_embeds": texts[0], "negative_pooled_prompt_embeds": texts[1]}
    return {**given, ("true_cfg_scale" if naming == "stock" else "cfg"): scale}


def guided(step: str, naming: str, samples: int = 1, one_text: bool = False, **layout: Any) -> torch.Tensor:
    """Return latents of a custom pipeline under guidance."""
    pipe = own_flux(step)
    given = named(naming, samples, one_text)
    given |= {"height": 16 * ROWS, "width": 16 * COLUMNS, "generator": torch.Generator().manual_seed(5)}
    with guide(pipe, SPEC, **layout):
        return pipe(**given).images


@pytest.mark.one_in(5)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("step", ["separate", "cloned", "cast", "views", "batch", "batch, flipped"])
@pytest.mark.parametrize("samples", [1, 2])
def test_pipelines_that_call_as_the_stock_one_or_with_both_halves(step: str, naming: str, samples: int) -> None:
    assert relative(guided(step, naming, samples), slow(samples)) < PIPELINE_TOLERANCE


@pytest.mark.one_in(4)
@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize(
    ("step", "samples", "words"),
    [
        ("negative first", 1, "the prompt first"),
        ("negative first, cloned", 2, "the prompt first"),
        ("interleaved", 2, "interleaved"),
        ("interleaved", 3, "interleaved"),
        ("three parts", 1, "three parts"),
        ("three parts", 2, "three parts"),
        ("one by one", 2, "batch of 1 for 2 images"),
        ("image by image", 2, "batch of 1 for 2 images"),
    ],
)
def test_other_layouts_are_refused_by_name(step: str, samples: int, words: str, naming: str) -> None:
    with pytest.raises(ValueError, match=words):
        guided(step, naming, samples)


@pytest.mark.parametrize("step", ["separate", "cloned", "one by one", "image by image"])
def test_what_is_not_told_can_be_stated(step: str) -> None:
    """Two calls for each step, also for single images of a batch."""
    assert relative(guided(step, "own", 2, cfg="separate"), slow(2)) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("step", ["separate", "batch"])
@pytest.mark.parametrize("naming", NAMINGS)
def test_one_text_for_both(step: str, naming: str) -> None:
    """Under other names it may be another guidance method of the pipeline, so the layout must be specified."""
    layout = {}
    if naming == "own":
        with pytest.raises(ValueError, match=f"the same text.*cfg='{step}'"):
            guided(step, naming, one_text=True)
        layout = {"cfg": step}
    assert relative(guided(step, naming, one_text=True, **layout), slow(1, one_text=True)) < PIPELINE_TOLERANCE


@pytest.mark.parametrize(
    ("step", "layout", "words"),
    [
        ("batch", {"cfg": "batch", "conditional": "first"}, "the negative prompt where guide expects the prompt"),
        ("batch, flipped", {"cfg": "batch"}, "the negative prompt where guide expects the prompt"),
        ("batch", {"cfg": "none"}, "batch of 2"),
        ("batch", {"cfg": "separate"}, "batch of 2"),
        ("separate", {"cfg": "batch"}, "batch of 1"),
        ("separate", {"cfg": "none"}, "twice"),
        ("negative first", {"cfg": "separate"}, "the prompt first"),
    ],
)
def test_wrong_statements_are_refused_where_the_texts_show_it(step: str, layout: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        guided(step, "stock", **layout)

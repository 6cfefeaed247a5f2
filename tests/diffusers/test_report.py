# SPDX-License-Identifier: Apache-2.0
"""The report describes the effect of guidance, and guidance without effect causes a warning."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.probes import problems_warned
from tests.diffusers.small_pipelines import noise, run, tiny_pipeline, tiny_pipeline_of_embeddings

MID = "mid_block.attentions.0.transformer_blocks"


def test_the_report_counts_forwards_for_each_guidance_and_layer() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(layers="mid", stop=0.5), SEG(sigma=2.0, layers=["d1", "m1"])) as guidance:
        run(pipe, latents=noise(), num_inference_steps=4)
        run(pipe, latents=noise(), num_inference_steps=2)
    report = guidance.report()
    assert report.forwards == 6
    assert [(row.spec, row.layer, row.fired) for row in report.layers] == [
        (0, "m0", 3),
        (0, "m1", 3),
        (1, "d1", 6),
        (1, "m1", 6),
    ]
    assert report.layers[1].module == f"{MID}.1.attn1"
    assert all(row.moved is not None and 0.01 < row.moved < 2.0 for row in report.layers)


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0], ids=["without_cfg", "cfg"])
@pytest.mark.parametrize("sigma", [2.0, math.inf], ids=str)
def test_moved_is_the_mean_relative_distance_of_the_layers_outputs(sigma: float, guidance_scale: float) -> None:
    pipe, distances = tiny_pipeline(), []

    def measure(module: Any, args: Any, output: torch.Tensor) -> None:
        *_, c, p = output.double().chunk(2 if guidance_scale == 1.0 else 3)
        distances.append(((c - p).flatten(1).norm(dim=1) / c.flatten(1).norm(dim=1)).mean().item())

    handle = pipe.unet.get_submodule(f"{MID}.1.attn1").register_forward_hook(measure)
    with guide(pipe, SEG(sigma=sigma)) as guidance:
        run(pipe, ["a", "b"], latents=noise(2), guidance_scale=guidance_scale)
    handle.remove()
    assert guidance.report().layers[1].moved == pytest.approx(sum(distances) / len(distances), rel=1e-5)


def test_an_image_of_a_batch_has_its_own_report() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(layers="mid", sigma=(0.5, math.inf))) as guidance:
        run(pipe, ["a", "b"], latents=noise(2))
    both, *images = (guidance.report(image) for image in (None, 0, 1))
    for row, first, second in zip(both.layers, *(report.layers for report in images), strict=True):
        assert row.fired == first.fired == second.fired == 3
        assert 0 < first.moved < second.moved
        assert row.moved == pytest.approx((first.moved + second.moved) / 2)
    for index in (-1, 2):
        with pytest.raises(ValueError, match=rf"got {index} for batches of \[2\]"):
            guidance.report(index)
    with guide(pipe, SEG()) as guidance:
        run(pipe, ["a", "b"], latents=noise(2))
        run(pipe, latents=noise(1))
    assert guidance.report().forwards == 6
    with pytest.raises(ValueError, match=r"batches of \[1, 2\]"):
        guidance.report(0)


def test_the_report_prints_as_a_table_and_turns_into_a_dictionary() -> None:
    pipe = tiny_pipeline()
    with guide(pipe, SEG(layers="mid")) as guidance:
        run(pipe, latents=noise())
    report = guidance.report()
    lines = str(report).splitlines()
    assert lines[0] == "3 denoiser calls"
    assert lines[2].startswith("SEG(scale=3.0, sigma=inf, layers='mid'")
    assert lines[3].split() == ["layer", "fired", "moved", "module"]
    assert [line.split()[0] for line in lines[4:]] == ["m0", "m1"]
    assert lines[4].split()[1:] == ["3", f"{report.layers[0].moved:.2%}", f"{MID}.0.attn1"]
    values = report.to_dict()
    assert values["layers"][1]["moved"] == report.layers[1].moved
    assert values["specs"][0]["layers"] == "mid"
    assert json.loads(json.dumps(values))["forwards"] == 3


def test_before_the_first_forward_nothing_has_fired() -> None:
    pipe = tiny_pipeline()
    guidance = guide(pipe, SEG())
    with pytest.warns(UserWarning, match="fired in none of 0 denoiser calls"):
        report = guidance.report()
    assert [(row.fired, row.moved) for row in report.layers] == [(0, None)] * 2
    assert "-" in str(report).splitlines()[4].split()
    with problems_warned() as caught:
        guidance.remove()
    assert caught == [], "the denoiser never ran, so there is nothing to warn about"


@pytest.mark.parametrize(
    "spec, latents, problem",
    [
        (SEG(start=0.9), noise(), "fired in none of 3 denoiser calls"),
        (SEG(scale=0.0), noise(), "fired in none"),
        (SEG(sigma=0.0), noise(), "fired in none"),
        (SEG(), noise(1, 4, 4), "had no effect"),
        (SEG(sigma=0.01), noise(), "had no effect"),
    ],
    ids=["too_late", "no_scale", "no_sigma", "one_token", "sigma_too_small"],
)
def test_a_guidance_that_did_nothing_warns_on_leaving_and_in_its_report(
    spec: SEG, latents: torch.Tensor, problem: str
) -> None:
    pipe = tiny_pipeline()
    with problems_warned() as caught:
        with guide(pipe, spec) as guidance:
            run(pipe, latents=latents)
        guidance.remove()
        report = guidance.report()
    (warning,) = caught  # the report does not repeat the warning issued on leaving
    assert problem in str(warning.message)
    assert warning.filename == __file__
    assert f"warning: {report.problems[0]}" in str(report)


def test_only_the_guidance_that_did_nothing_is_named() -> None:
    pipe = tiny_pipeline()
    with problems_warned() as caught, guide(pipe, SEG(), SEG(scale=0.0)):
        run(pipe, latents=noise())
    assert ["scale=0.0" in str(warning.message) for warning in caught] == [True]


def test_one_warning_names_all_guidances_without_effect() -> None:
    pipe = tiny_pipeline()
    with problems_warned() as caught:
        with guide(pipe, SEG(scale=0.0), SEG(sigma=0.0), SEG()) as guidance:
            run(pipe, latents=noise())
        report = guidance.report()
    (warning,) = caught
    assert str(warning.message) == "; ".join(report.problems)
    assert len(report.problems) == 2


def test_a_report_warns_again_after_more_denoiser_calls() -> None:
    pipe = tiny_pipeline()
    guidance = guide(pipe, SEG(start=0.9))
    with problems_warned() as caught:
        for _ in range(2):
            run(pipe, latents=noise())
            guidance.report()
        guidance.remove()
    assert [f"none of {calls} denoiser calls" in str(w.message) for calls, w in zip((3, 6), caught, strict=True)] == [
        True,
        True,
    ]


def test_leaving_by_an_exception_does_not_add_warnings() -> None:
    pipe = tiny_pipeline()

    def guided() -> None:
        with guide(pipe, SEG(scale=0.0)):
            run(pipe, latents=noise())
            raise ZeroDivisionError

    with problems_warned() as caught, pytest.raises(ZeroDivisionError):
        guided()
    assert caught == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_half_precision_is_not_movement(dtype: torch.dtype) -> None:
    pipe, texts = tiny_pipeline_of_embeddings()
    pipe.unet.to(dtype)
    arguments = {"prompt": None, **{name: text.to(dtype) for name, text in texts.items()}}
    with problems_warned() as caught, guide(pipe, SEG()):
        run(pipe, latents=noise(1, 4, 4).to(dtype), **arguments)
    assert ["had no effect" in str(warning.message) for warning in caught] == [True]
    with guide(pipe, SEG()) as guidance:
        run(pipe, latents=noise().to(dtype), **arguments)
    assert guidance.report().problems == ()

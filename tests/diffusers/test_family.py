# SPDX-License-Identifier: Apache-2.0
"""Several guidance methods together, and all their options: sigmas of all forms, schedules, blending."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from segkern.integrations.diffusers import CFG, PAG, SEG, guide, list_layers
from segkern.integrations.specs.base import AttentionSpec
from tests.diffusers.slow_guidance import Branch, looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_sd

STEPS = 3
GUIDANCE_SCALE = 4.0


def names(pipe: Any, part: str) -> list[str]:
    return [layer.name for layer in list_layers(pipe) if layer.part == part]


PER_HEAD = (0.0, 1.0, 3.0, math.inf)


def blurred(entry: Any, part: str = "mid") -> Callable[[Any], dict[str, Any]]:
    return lambda pipe: dict.fromkeys(names(pipe, part), entry)


CASES: dict[str, tuple[AttentionSpec, Callable[[Any], dict[str, Any]], Callable[[int], float]]] = {
    "one sigma": (SEG(sigma=2.0), blurred(2.0), lambda step: 3.0),
    "a sigma for each sample": (SEG(sigma=(1.0, math.inf)), blurred([1.0, math.inf]), lambda step: 3.0),
    "the mean query first": (SEG(sigma=(math.inf, 1.0)), blurred([math.inf, 1.0]), lambda step: 3.0),
    "one image alone": (SEG(sigma=(math.inf, 0.0)), blurred([math.inf, 0.0]), lambda step: 3.0),
    "the mean query, then heads": (
        SEG(sigma=(math.inf, PER_HEAD), layers=("d0", "mid")),
        lambda pipe: {"d0": [math.inf, PER_HEAD], "m0": [math.inf, PER_HEAD]},
        lambda step: 3.0,
    ),
    "a sigma for each head": (SEG(sigma=[PER_HEAD]), blurred(PER_HEAD), lambda step: 3.0),
    "for samples and heads": (
        SEG(sigma=(2.0, PER_HEAD), layers=("d0", "mid")),
        lambda pipe: {"d0": [2.0, PER_HEAD], "m0": [2.0, PER_HEAD]},
        lambda step: 3.0,
    ),
    "a sigma for each layer": (
        SEG(sigma={"m0": 2.0, "u0": math.inf, "u1-2": (1.0, 0.0)}),
        lambda pipe: {"m0": 2.0, "u0": math.inf, "u1": [1.0, 0.0], "u2": [1.0, 0.0]},
        lambda step: 3.0,
    ),
    "linear": (SEG(sigma=2.0, schedule="linear"), blurred(2.0), lambda step: 3.0 * (1 - step / STEPS)),
    "cosine, from a third on": (
        SEG(sigma=2.0, schedule="cosine", start=0.3),
        blurred(2.0),
        lambda step: 1.5 * (1 + math.cos(math.pi * (step / STEPS - 0.3) / 0.7)) if step else 0.0,
    ),
    "a schedule of one's own": (
        PAG(scale=2.0, schedule=lambda done: 1.0 if done > 0.5 else -0.5),
        blurred(None),
        lambda step: 2.0 if step == 2 else -1.0,
    ),
    "the mean query, a third of it": (SEG(blend=1 / 3), blurred(math.inf), lambda step: 3.0),
    "a blur, half of it": (
        SEG(sigma=2.0, blend=0.5, layers=("mid", "up")),
        lambda pipe: dict.fromkeys([*names(pipe, "mid"), *names(pipe, "up")], 2.0),
        lambda step: 3.0,
    ),
    "identity, a quarter of it": (PAG(blend=0.25, layers="up"), blurred(None, "up"), lambda step: 3.0),
    "each image its own, half of it": (
        SEG(sigma=(math.inf, 1.0), blend=0.5),
        blurred([math.inf, 1.0]),
        lambda step: 3.0,
    ),
    "heads apart, half of it": (SEG(sigma=[PER_HEAD], blend=0.5), blurred(PER_HEAD), lambda step: 3.0),
}


@pytest.mark.one_in(4)
@pytest.mark.parametrize("case", CASES)
def test_each_is_what_its_definition_says(case: str) -> None:
    spec, entries, strength = CASES[case]
    pipe = tiny_sd()
    arguments = {"latents": noise(2, 8, 12), "num_images_per_prompt": 2, "guidance_scale": GUIDANCE_SCALE}
    expected = looped_run(pipe, [Branch(entries(pipe), strength, spec.blend)], **arguments)
    for share in (True, False):
        with guide(pipe, spec, share=share):
            assert relative(run(pipe, **arguments), expected) < PIPELINE_TOLERANCE
    if spec.blend != 1.0:
        assert relative(looped_run(pipe, [Branch(entries(pipe), strength)], **arguments), expected) > 1e-4


@pytest.mark.one_in(3)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "in full"])
@pytest.mark.parametrize("guidance_scale", [GUIDANCE_SCALE, 1.0], ids=["CFG", "without CFG"])
def test_any_set_at_once(guidance_scale: float, share: bool) -> None:
    """Three branches in the same and in different layers: one with a sigma per head, one that starts later."""
    specs = (
        SEG(scale=2.0, sigma=math.inf, layers=("mid", "u0")),
        PAG(scale=1.0, layers=("d1", "mid"), schedule="linear"),
        SEG(scale=-0.5, sigma=[PER_HEAD], layers="up", start=0.5, blend=0.5),
    )
    pipe = tiny_sd()
    latents = noise(2, 8, 12)
    branches = [
        Branch(dict.fromkeys([*names(pipe, "mid"), "u0"], math.inf), lambda step: 2.0),
        Branch(dict.fromkeys(["d1", *names(pipe, "mid")], None), lambda step: 1 - step / STEPS),
        Branch(dict.fromkeys(names(pipe, "up"), PER_HEAD), lambda step: -0.5 * (step >= 2), 0.5),
    ]
    arguments = {"latents": latents, "num_images_per_prompt": 2, "guidance_scale": guidance_scale}
    expected = looped_run(pipe, branches, **arguments)
    with guide(pipe, *specs, share=share) as guidance:
        ours = run(pipe, **arguments)
    assert relative(ours, expected) < PIPELINE_TOLERANCE
    fired = {(row.spec, row.layer): row.fired for row in guidance.report().layers}
    assert fired[0, "m0"] == 3
    assert fired[1, "d1"] == 3
    assert fired[2, "u0"] == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: SEG(sigma=[(1.0, 2.0)]), r"SEG.sigma has 2 numbers per head for layer m0, which has 4 heads"),
        (lambda: SEG(sigma={"m0": 1.0, "mid": 2.0}), "SEG.sigma names layer m0 twice, as 'm0' and 'mid'"),
        (lambda: SEG(sigma={"m0": 1.0}, layers=["mid", "u0"]), "SEG.sigma has no entry for layer u0"),
        (lambda: SEG(sigma={"m0": 1.0, "d0": 1.0}, layers=["m0"]), "'d0' for layers that are not in SEG.layers"),
        (lambda: SEG(sigma={"x9": 1.0}), "unknown layer 'x9'"),
    ],
)
def test_sigmas_that_do_not_fit_the_model_are_refused(spec: Callable[[], SEG], message: str) -> None:
    pipe = tiny_sd()
    with pytest.raises(ValueError, match=message):
        guide(pipe, spec())


def test_a_number_of_sigmas_that_is_not_the_batchs_is_refused() -> None:
    pipe = tiny_sd()
    plain = run(pipe, latents=noise(1, 8, 12))
    message = "SEG.sigma has 3 entries, one per sample, for a batch with 1 conditional samples"
    with pytest.raises(ValueError, match=message), guide(pipe, SEG(sigma=(1.0, 2.0, 3.0))):
        run(pipe, latents=noise(1, 8, 12))
    assert torch.equal(run(pipe, latents=noise(1, 8, 12)), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": {}}, r"SEG.sigma must map layer names.*got \{\}"),
        ({"sigma": {"m0": "wide"}}, "got 'wide'"),
        ({"sigma": [[1.0, -2.0]]}, r"\[\[1.0, -2.0\]\]"),
        ({"sigma": []}, r"got \[\]"),
        ({"sigma": (1.0, 2.0), "query_stride": 2}, "SEG.query_stride=2 needs one number as sigma"),
        ({"blend": -0.1}, "SEG.blend must lie between 0"),
        ({"scale": "much"}, "SEG.scale must be a finite number, got 'much'"),
        ({"schedule": 3}, "SEG.schedule must be one of.*got 3"),
    ],
)
def test_a_spec_quotes_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SEG(**options)


def test_a_schedules_answer_must_be_a_number() -> None:
    spec = SEG(schedule=lambda done: math.nan)
    with pytest.raises(ValueError, match=r"SEG.schedule must return a finite number, got nan at fraction 0.25"):
        spec.strength(0.25)


def test_specs_are_values() -> None:
    assert SEG(sigma={"m0": 1.0}) == SEG(sigma={"m0": 1})
    assert hash(SEG(sigma={"m0": 1.0})) == hash(SEG(sigma={"m0": 1.0}))
    assert replace(SEG(sigma={"m0": 1.0}), sigma={"u0": 2.0}).layer_names == ("u0",)
    assert replace(SEG(scale=2.0), sigma=1.0) == SEG(scale=2.0, sigma=1.0)
    assert SEG(schedule=lambda done: np.float32(0.5)).strength(0.1) == 1.5
    with pytest.raises(ValueError, match=r"SEG.sigma has an entry 'u0' for layers that are not in SEG.layers='mid'"):
        guide(tiny_sd(), SEG(sigma={"mid": 1.0, "u0": 2.0}, layers="mid"))
    embeds = torch.zeros(1, 77, 4)
    assert CFG(negative_prompt_embeds=embeds) != CFG(negative_prompt_embeds=embeds + 1)


def test_a_report_is_plain() -> None:
    pipe = tiny_sd()
    _, embeds = pipe.encode_prompt("x", pipe.device, 1, True)
    embeds = torch.nn.Parameter(embeds) * 1.0
    specs = (CFG(negative_prompt_embeds=embeds), SEG(sigma={"m0": 1.0}, schedule=lambda done: 1.0))
    with torch.no_grad(), guide(pipe, *specs) as guidance:
        run(pipe, latents=noise(1, 8, 12), guidance_scale=1.0)
    values = json.loads(json.dumps(guidance.report().to_dict()))
    assert [sorted(spec)[0] for spec in values["specs"]] == ["negative_prompt", "backend"]
    assert values["specs"][1]["sigma"] == {"m0": 1.0}
    assert "lambda" in values["specs"][1]["schedule"]

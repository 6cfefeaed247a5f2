# SPDX-License-Identifier: Apache-2.0
"""UNets at all their tasks under ``guide``, each compared with slow guidance that does not use the adapter."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import PAG, SEG, guide
from tests.diffusers.probes import hooks_of
from tests.diffusers.proven_cells import of_unet
from tests.diffusers.slow_guidance import Perturbed, self_attentions, unet_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.unet_cases import run
from tests.diffusers.unet_image_cases import IMAGES
from tests.diffusers.unet_video_cases import MOTION

CASES = {**IMAGES, **MOTION}

# With and without classifier-free guidance, each with other guidance methods.
RUNS = [
    (name, cfg) for name, case in CASES.items() for cfg in (True, False) if case.scales[0 if cfg else 1] is not None
]


def proved(name: str, cfg: bool) -> pytest.MarkDecorator:
    return of_unet(name, CASES[name].name, guidance="SEG" if cfg else ("SEG at infinity", "PAG"))


@lru_cache(maxsize=len(CASES))
def built(name: str) -> Any:
    return CASES[name].build(CASES[name])


@pytest.mark.one_in(8)
@pytest.mark.parametrize(
    ("name", "cfg"),
    [pytest.param(*case, marks=proved(*case)) for case in RUNS],
    ids=lambda value: value if isinstance(value, str) else ("", "cfg")[value],
)
def test_equals_the_slow_way(name: str, cfg: bool) -> None:
    """Reference: a separate call per branch with float64 blurred logits; not square, mostly two samples."""
    case, pipe = CASES[name], built(name)
    modules = self_attentions(pipe.unet, case.modules)
    specs: list[Any] = (
        [SEG(2.0, 1.5, case.layers)] if cfg else [SEG(1.5, math.inf, case.layers), PAG(-0.5, case.layers)]
    )
    slow = (
        [Perturbed(2.0, 1.5, modules)] if cfg else [Perturbed(1.5, math.inf, modules), Perturbed(-0.5, None, modules)]
    )
    plain = run(case, pipe, cfg)
    processors = dict(pipe.unet.attn_processors)
    expected = unet_run(pipe, slow, lambda: run(case, pipe, cfg), case.size, cfg)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE  # the effect is large enough to be measured
    with guide(pipe, *specs) as active:
        guided = run(case, pipe, cfg)
    assert relative(guided, expected) < PIPELINE_TOLERANCE
    report = active.report()
    assert {row.module for row in report.layers} == set(modules)
    assert report.forwards > 0
    assert all(row.fired == report.forwards and row.moved is not None and row.moved > 0 for row in report.layers)
    assert all(pipe.unet.attn_processors[name] is processors[name] for name in processors)
    assert hooks_of(pipe.unet) == 0
    assert torch.equal(run(case, pipe, cfg), plain)

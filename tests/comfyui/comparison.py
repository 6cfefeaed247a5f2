# SPDX-License-Identifier: Apache-2.0
"""Runs with the node pack's guidance, with and without sharing, compared with the independent guidance."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from segkern_pack.guidance import RecordingCalc

from segkern.integrations.specs import PAG, SEG

from .independent import Independent
from .small_models import forwards, make_model, relative, sample

CALC = "sampler_calc_cond_batch_function"
UNET_LAYERS = {
    "sd15": {
        "mid": [("middle", 0, 0)],
        "up": [("output", i, 0) for i in range(4)],
        "down": [("input", 1, 0), ("input", 3, 0)],
        "input.3, output.2": [("input", 3, 0), ("output", 2, 0)],
        "output.3": [("output", 3, 0)],
    },
    "sdxl": {
        "mid": [("middle", 0, i) for i in range(3)],
        "up": [("output", i, j) for i in (0, 1) for j in (0, 1)],
        "middle.0.1": [("middle", 0, 1)],
        "u1.1, d0.1": [("output", 1, 1), ("input", 3, 1)],
        "output": [("output", i, j) for i in (0, 1) for j in (0, 1)],
    },
}
TRANSFORMER_LAYERS = {
    "flux": {"1,4": [1, 4], "0": [0], "single": [3, 4, 5], "5": [5]},
    "sd3": {"1-2": [1, 2], "0": [0], "3": [3]},
    "qwen": {"1": [1], "0-2": [0, 1, 2]},
    "wan": {"1": [1], "0,2": [0, 2]},
    "lumina": {"1": [1], "0-2": [0, 1, 2]},
}
SPECS = {
    "seg inf": SEG(scale=2.0, sigma=math.inf),
    "seg 1.5": SEG(scale=2.0, sigma=1.5),
    "seg 10": SEG(scale=-1.0, sigma=10.0),
    "pag": PAG(scale=2.0),
}


def unshared(model: Any) -> Any:
    """Return a clone of a guided model whose perturbed forward passes are computed in full."""
    clone = model.clone()
    calc = clone.model_options[CALC]
    if isinstance(calc, RecordingCalc):
        del clone.model_options[CALC]
        if calc.before is not None:
            clone.set_model_sampler_calc_cond_batch_function(calc.before)
    return clone


@cache
def small(name: str) -> Any:
    """Return a small model, in float64 if ComfyUI's code preserves it."""
    return make_model(name, torch.float64 if name in UNET_LAYERS else torch.float32)


def sigma_of(spec: SEG | PAG) -> float | None:
    return float(spec.sigma) if isinstance(spec, SEG) else None  # type: ignore[arg-type]


def independent(name: str, layers: Any, spec: SEG | PAG, **options: Any) -> Independent:
    """Return the independent guidance of a spec."""
    text = 0 if name == "wan" else 5
    return Independent(layers, sigma_of(spec), spec.scale, **{"text": text, **options})


def compare(model: Any, name: str, ours: Any, reference: Any, exact: float, **options: Any) -> torch.Tensor:
    """Compare two evaluations: all outputs of the first up to ``exact``, the latents up to float32 rounding."""
    options = {"steps": 2, **options}
    with forwards(model) as expected:
        expected_latent = sample(reference, name, **options)
    with forwards(model) as full:
        unshared_latent = sample(unshared(ours), name, **options)
    with forwards(model) as own:
        latent = sample(ours, name, **options)
    assert len(own) == len(full) == len(expected) >= 2
    half = len(own) // 2
    for a, b, c in list(zip(own, full, expected, strict=True))[:half]:
        _check(a, c, exact)
        _check(b, c, exact)
    _check(latent, expected_latent, 2e-5)
    _check(unshared_latent, expected_latent, 2e-5)
    return latent


def _check(actual: torch.Tensor, expected: torch.Tensor, most: float) -> None:
    distance = relative(actual, expected)
    assert distance < most, f"relative distance {distance:.2e}, of at most {most:.0e}"

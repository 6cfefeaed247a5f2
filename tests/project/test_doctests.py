# SPDX-License-Identifier: Apache-2.0
"""The examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

import segkern

MODULES = [
    "segkern.grid",
    "segkern.core.gaussian",
    "segkern.core.sigmas",
    "segkern.core.coarse_queries",
    "segkern.api",
    "segkern.analysis.logits",
    "segkern.analysis.curvature",
    "segkern.analysis.energy",
    "segkern.analysis.report",
    "segkern.core.dispatch",
    "segkern.core.fallback",
    "segkern.core.bounded_cache",
    "segkern.core.environment",
    "segkern.cli.explain",
    "studies.evaluation.metrics",
    "studies.drawings.scenes",
    "studies.evaluation.settings",
    "segkern.kernels._configs",
    "segkern.kernels._routes",
    "segkern.kernels._blur_matrices",
    "segkern.generation.drawing",
    "segkern.generation.loading",
    "segkern.generation.options",
    "segkern.generation.pictures",
    "segkern.playground.choices",
    "segkern.playground.markup",
    "segkern.playground.presets",
    "segkern.playground.snippet",
    "segkern.generation.tables",
    "segkern.generation.vocabulary",
    "segkern.integrations.specs.guidances",
    "segkern.integrations.diffusers.guiders.components",
    "segkern.integrations.diffusers.models.layers",
    "segkern.integrations.diffusers.runtime.processor",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    names = {"torch": torch, "math": math, "segkern": segkern, "Grid": segkern.Grid}
    results = doctest.testmod(module, extraglobs=names)
    assert results.attempted > 0, f"{name} has no example"
    assert results.failed == 0

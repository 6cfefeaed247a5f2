# SPDX-License-Identifier: Apache-2.0
"""Examples in docstrings run."""

from __future__ import annotations

import doctest
import importlib
import math

import pytest
import torch

import segkern

MODULES = [
    "segkern.grid",
    "segkern.blur",
    "segkern.coarse",
    "segkern.api",
    "segkern.logits",
    "segkern.curvature",
    "segkern.energy",
    "segkern.energy_report",
    "segkern.dispatch",
    "segkern.failures",
    "segkern.keeping",
    "segkern.environment",
    "segkern.explain",
    "segkern.evaluation.metrics",
    "segkern.evaluation.shapes",
    "segkern.evaluation.study",
    "segkern.kernels._configs",
    "segkern.kernels._routes",
    "segkern.kernels._tables",
    "segkern.loading",
    "segkern.masses",
    "segkern.options",
    "segkern.playground.choices",
    "segkern.playground.form",
    "segkern.playground.markup",
    "segkern.playground.snippet",
    "segkern.tables",
    "segkern.integrations.diffusers.specs",
    "segkern.integrations.diffusers.guiders",
    "segkern.integrations.diffusers.layers",
    "segkern.integrations.diffusers.processor",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    names = {"torch": torch, "math": math, "segkern": segkern, "Grid": segkern.Grid}
    results = doctest.testmod(module, extraglobs=names)
    assert results.attempted > 0, f"{name} has no example"
    assert results.failed == 0

# SPDX-License-Identifier: Apache-2.0
"""What is measured together: a suite's cases, sigmas and providers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from benchmarks.cases import ON_A_CPU, REAL
from benchmarks.providers import PROVIDERS, Provider

SIGMAS = (0.5, 1.0, 3.0, 10.0, 30.0, math.inf)


@dataclass(frozen=True)
class Suite:
    """One question put to many cases.

    Attributes:
        name: on the command line.
        asks: the question, for pages.
        sigmas: of the blurred third.
    """

    name: str
    asks: str
    sigmas: tuple[float, ...] = SIGMAS

    @property
    def providers(self) -> tuple[Provider, ...]:
        """Those that take part."""
        return tuple(provider for provider in PROVIDERS.values() if self.name in provider.suites)


SUITES = {
    suite.name: suite
    for suite in (
        Suite("attention", "What does a layer's attention cost when a third of the batch is blurred?"),
        Suite("infinite", "What is left of it when the blurred third has one query row?", (math.inf,)),
        Suite("coarse", "What do blurred rows at every few tokens save, and how wrong are they?", SIGMAS[1:-1]),
        Suite("blur", "What does the blur cost alone, beside the attention that it comes before?"),
        Suite("mass", "What do the masses of all keys cost, beside a forward of attention?", (0.0,)),
    )
}


STEP = "step"  # measured by benchmarks/steps.py: runs of pipelines, not calls of attention


def find_suite(name: str) -> Suite:
    """The suite of that name.

    Raises:
        ValueError: for an unknown one; the message lists them.
    """
    if name not in SUITES:
        raise ValueError(f"--suite takes {', '.join(SUITES)}, {STEP}, got {name!r}")
    return SUITES[name]


def find_providers(suite: Suite, wanted: Sequence[str]) -> tuple[Provider, ...]:
    """The suite's providers of these names or globs, all of them for none.

    Raises:
        ValueError: for one that fits none; the message lists them.
    """
    names = [provider.name for provider in suite.providers]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"--providers {pattern!r} fits none of {', '.join(names)}")
    chosen = [name for name in names if not wanted or any(fnmatchcase(name, pattern) for pattern in wanted)]
    return tuple(PROVIDERS[name] for name in chosen)


def usual_cases(device: torch.device) -> tuple[str, ...]:
    """Names of what a device is measured with unless told otherwise."""
    return ON_A_CPU if device.type == "cpu" else REAL


def usual_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """Dtypes that a device is measured with unless told otherwise."""
    return (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16, torch.float32)

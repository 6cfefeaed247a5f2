# SPDX-License-Identifier: Apache-2.0
"""Which tests put a fault or many inputs to the package, and how many inputs each of them tried.

A test says with ``survives(area, fault)`` what it puts in, and calls the fixture ``tried`` with the number of inputs that
it has been through, as often as it likes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

AREAS = ("inputs", "devices and compilers", "pipelines", "interruptions", "long runs")
_INPUTS = "inputs tried"


def survives(area: str, fault: str) -> pytest.MarkDecorator:
    """A mark for a test.

    Args:
        area: one of ``AREAS``.
        fault: what is put in, in a few words: ``"NaN in one sample"``.
    """
    if area not in AREAS:
        raise ValueError(f"area must be one of {', '.join(AREAS)}, got {area!r}")
    return pytest.mark.survives(area=area, fault=fault)


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Count inputs that a test has tried."""

    def count(inputs: int = 1) -> None:
        request.node.user_properties.append((_INPUTS, inputs))

    return count

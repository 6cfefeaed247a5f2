# SPDX-License-Identifier: Apache-2.0
"""Import errors that name the new location of modules that have moved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

MOVED = {
    "segkern.dispatch": "segkern.core.dispatch",
    "segkern.energy": "segkern.analysis.energy",
    "segkern.flops": "segkern.ops.flops",
    "segkern.loading": "segkern.generation.loading",
    "segkern.integrations.diffusers.architectures": "segkern.integrations.diffusers.models.architectures",
    "segkern.integrations.diffusers.names": "segkern.integrations.specs.layer_names",
    "segkern.integrations.diffusers.specs": "segkern.integrations.specs",
    "segkern.integrations.diffusers.models.names": "segkern.integrations.specs.layer_names",
}


class MovedModuleFinder:
    """The last finder on ``sys.meta_path``, called only for modules that no other finder has found."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Raise a ModuleNotFoundError that names the new module, if ``name`` is an old one."""
        if name in MOVED:
            raise ModuleNotFoundError(f"{name} has moved; import {MOVED[name]} instead", name=name)


def install() -> None:
    """Append the finder to ``sys.meta_path``, once."""
    if MovedModuleFinder not in sys.meta_path:
        sys.meta_path.append(MovedModuleFinder)

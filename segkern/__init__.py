# SPDX-License-Identifier: Apache-2.0
"""Smoothed Energy Guidance (SEG, arXiv 2408.00760) in PyTorch and Triton.

Importing this package does not import PyTorch, Triton or diffusers. PyTorch is loaded when a public name is first
used, and kernels when they are first launched. The diffusers adapter is in :mod:`segkern.integrations.diffusers`.
Import :mod:`segkern.api` to register the operators in ``torch.ops.segkern`` without calling a function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from segkern.core import moved_modules
from segkern.version import __version__

if TYPE_CHECKING:
    from segkern import reference
    from segkern.analysis import energy
    from segkern.api import attention_energy, attention_mass, gaussian_blur, seg_attention
    from segkern.grid import Grid

__all__ = [
    "Grid",
    "__version__",
    "attention_energy",
    "attention_mass",
    "energy",
    "gaussian_blur",
    "reference",
    "seg_attention",
]

_MODULES = {  # where each name is defined
    "Grid": "segkern.grid",
    "attention_energy": "segkern.api",
    "attention_mass": "segkern.api",
    "energy": "segkern.analysis.energy",
    "gaussian_blur": "segkern.api",
    "reference": "segkern.reference",
    "seg_attention": "segkern.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_MODULES[name])
    return module if _MODULES[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


moved_modules.install()

# SPDX-License-Identifier: Apache-2.0
"""Smoothed Energy Guidance (SEG, arXiv 2408.00760) in PyTorch and Triton.

Importing this package does not import Triton or diffusers. Kernels are loaded on first use. The diffusers adapter
is in :mod:`segkern.integrations.diffusers`.
"""

from segkern import reference
from segkern.analysis import energy
from segkern.api import attention_energy, attention_mass, gaussian_blur, seg_attention
from segkern.core import moved_modules
from segkern.grid import Grid
from segkern.version import __version__

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

moved_modules.install()

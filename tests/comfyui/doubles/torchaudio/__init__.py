# SPDX-License-Identifier: Apache-2.0
"""Test double of torchaudio: the names that ComfyUI imports. It computes nothing.

The package index has no build of torchaudio for the CPU build of PyTorch.
"""

from . import functional, transforms

__all__ = ["functional", "transforms"]

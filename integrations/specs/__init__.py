# SPDX-License-Identifier: Apache-2.0
"""Guidance specs. This package does not import diffusers."""

from segkern.integrations.specs.guidances import CFG, PAG, SAG, SEG, SLG, TPG

__all__ = ["CFG", "PAG", "SAG", "SEG", "SLG", "TPG"]

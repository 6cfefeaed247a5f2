# SPDX-License-Identifier: Apache-2.0
"""Guiders for modular diffusers."""

from segkern.integrations.diffusers.guiders.components import PAGGuider, SAGGuider, SEGGuider, SLGGuider, TPGGuider

__all__ = ["PAGGuider", "SAGGuider", "SEGGuider", "SLGGuider", "TPGGuider"]

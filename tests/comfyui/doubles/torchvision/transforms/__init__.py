# SPDX-License-Identifier: Apache-2.0
"""Test double of torchvision.transforms."""

from torchvision import Absent

from . import functional
from .functional import InterpolationMode

Compose = Lambda = Normalize = Resize = ToPILImage = ToTensor = Absent

__all__ = ["Compose", "InterpolationMode", "Lambda", "Normalize", "Resize", "ToPILImage", "ToTensor", "functional"]

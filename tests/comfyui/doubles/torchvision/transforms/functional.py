# SPDX-License-Identifier: Apache-2.0
"""Test double of torchvision.transforms.functional."""

from enum import Enum


class InterpolationMode(Enum):
    """Ways to resize."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"

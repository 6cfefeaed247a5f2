# SPDX-License-Identifier: Apache-2.0
"""Test double of torchvision.models.optical_flow."""

from torchvision import Absent, absent

raft_large = absent
Raft_Large_Weights = Absent

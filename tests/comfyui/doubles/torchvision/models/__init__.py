# SPDX-License-Identifier: Apache-2.0
"""Test double of torchvision.models."""

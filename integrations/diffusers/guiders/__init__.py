# SPDX-License-Identifier: Apache-2.0
"""Guiders for modular diffusers."""

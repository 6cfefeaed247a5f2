# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers; importing a module here imports Triton."""

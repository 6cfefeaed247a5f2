# SPDX-License-Identifier: Apache-2.0
"""Triton kernels and their launchers. Importing any module of this package imports Triton."""

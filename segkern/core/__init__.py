# SPDX-License-Identifier: Apache-2.0
"""Shared by all of the package: Gaussian taps, argument checks, backend choice, caches."""

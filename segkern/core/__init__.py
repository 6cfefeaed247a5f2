# SPDX-License-Identifier: Apache-2.0
"""Code shared by the whole package: Gaussian taps, argument checks, backend choice, caches."""

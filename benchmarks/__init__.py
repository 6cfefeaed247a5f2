# SPDX-License-Identifier: Apache-2.0
"""Speed of segkern against what a user could pick instead; run from a checkout, with ``python -m benchmarks``."""

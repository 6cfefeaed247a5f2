# SPDX-License-Identifier: Apache-2.0
"""Speed of segkern compared with the alternatives. Run ``python -m benchmarks`` from a checkout."""

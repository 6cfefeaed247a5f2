# SPDX-License-Identifier: Apache-2.0
"""What acts while a guided pipeline runs: hooks, branches, guided layers, reports."""

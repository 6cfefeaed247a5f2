# SPDX-License-Identifier: Apache-2.0
"""The runtime of guidance: hooks, branches, guided layers and reports."""

# SPDX-License-Identifier: Apache-2.0
"""Descriptions of denoisers: architectures, layers and names."""

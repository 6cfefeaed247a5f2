# SPDX-License-Identifier: Apache-2.0
"""Adapters for other libraries. Each subpackage imports its library; this package imports none."""

# SPDX-License-Identifier: Apache-2.0
"""Adapters for other libraries; each one imports its library, this package imports none."""

# SPDX-License-Identifier: Apache-2.0
"""The energy of attention: values, moments, curvature, recorded runs and their plots."""

# SPDX-License-Identifier: Apache-2.0
"""Analysis of the energy of attention: values, moments, curvature, recorded runs and plots."""

# SPDX-License-Identifier: Apache-2.0
"""Evaluation of guidance on the bundled model: a classifier, measures, settings and reports."""

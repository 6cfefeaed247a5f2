# SPDX-License-Identifier: Apache-2.0
"""Evaluation of guidance on a model of simple shapes: drawings, a classifier of them, measures, reports."""

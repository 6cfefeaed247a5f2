# SPDX-License-Identifier: Apache-2.0
"""What guidance does to samples of a model of simple shapes: drawings, a classifier of them, measures, reports."""

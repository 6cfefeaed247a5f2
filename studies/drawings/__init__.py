# SPDX-License-Identifier: Apache-2.0
"""Captioned emoji drawings that the bundled model is trained on and measured against."""

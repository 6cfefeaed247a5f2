# SPDX-License-Identifier: Apache-2.0
"""The package version, defined only here."""

__version__ = "0.1.0"

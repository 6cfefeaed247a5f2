# SPDX-License-Identifier: Apache-2.0
"""The playground of ``segkern ui``: a page that draws the same picture with and without guidance."""

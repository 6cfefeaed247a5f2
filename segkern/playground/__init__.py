# SPDX-License-Identifier: Apache-2.0
"""The playground of ``segkern ui``: a page that generates the same image with and without guidance."""

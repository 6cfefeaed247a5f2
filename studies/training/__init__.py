# SPDX-License-Identifier: Apache-2.0
"""Training of the bundled model and its judge: ``python -m studies.training --help``."""

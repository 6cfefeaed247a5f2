# SPDX-License-Identifier: Apache-2.0
"""How the bundled model and its judge are made: ``python -m studies.training --help``."""

# SPDX-License-Identifier: Apache-2.0
"""Loading checkpoints, drawing pictures, and writing them with their settings."""

# SPDX-License-Identifier: Apache-2.0
"""Loading of checkpoints, generation of images, and image files with settings."""

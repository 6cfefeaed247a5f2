# SPDX-License-Identifier: Apache-2.0
"""Test double of torchaudio.functional, without any function."""

# SPDX-License-Identifier: Apache-2.0
"""Guidance specs: what a user asks for, without importing diffusers."""

# SPDX-License-Identifier: Apache-2.0
"""Test double of torchaudio.transforms."""

from __future__ import annotations

from typing import Any


class MelScale:
    """A class that cannot be made."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("torchaudio is a test double here, which computes nothing")

# SPDX-License-Identifier: Apache-2.0
"""Device, versions and commit that a measurement names beside its numbers."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from segkern.version import __version__


def environment(device: torch.device, *packages: str) -> dict[str, Any]:
    """The machine and the versions that something is measured with.

    Args:
        device: that computes.
        packages: whose versions matter beside Python's, torch's and segkern's.
    """
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: version_of(package) for package in packages},
        "segkern": __version__,
        "commit": commit(),
    }


def processor() -> str:
    """The processor's name."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of segkern's own checkout, marked where files differ from it; empty outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""  # installed, perhaps below the checkout of something else
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        asked = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout.strip()


def fingerprint(*modules: torch.nn.Module) -> str:
    """The first letters of a checksum over all weights, as float32.

    Example:
        >>> fingerprint(torch.nn.Identity())
        'e3b0c44298fc1c14'
    """
    digest = hashlib.sha256()
    for module in modules:
        for weight in module.parameters():
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def version_of(package: str) -> str:
    """Version of an installed package.

    Example:
        >>> version_of("no-such-package")
        'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

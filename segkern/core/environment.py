# SPDX-License-Identifier: Apache-2.0
"""The device, versions and commit to record with a measurement."""

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
    """Return the machine and the versions that a measurement uses.

    Args:
        device: Device that computes.
        packages: Packages whose versions to record, in addition to Python, torch and segkern.
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
    """Return the name of the processor."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of segkern's checkout, marked if files differ from it; empty outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""  # installed, possibly inside the checkout of another project
    ask = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        asked = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout.strip()


def fingerprint(*modules: torch.nn.Module) -> str:
    """Return the first 16 hexadecimal digits of a checksum of all weights as float32.

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
    """Return the version of an installed package.

    Example:
        >>> version_of("no-such-package")
        'not installed'
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"

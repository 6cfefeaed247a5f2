# SPDX-License-Identifier: Apache-2.0
"""The machine as described in result files (device, versions, commit, driver), and its free memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from segkern.core.environment import environment

_ROOT = Path(__file__).parents[1]


def described(device: torch.device) -> dict[str, Any]:
    """Return device, versions, commit and driver, as stored in result files."""
    known = environment(device, "triton", "numpy") | {"device_type": device.type}
    if _only_results_differ():
        known["commit"] = known["commit"].removesuffix("-dirty")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known |= {
            "cuda": torch.version.cuda or "",
            "hip": torch.version.hip or "",
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": properties.L2_cache_size / 2**20,
            "driver": _driver(device),
        }
    return known


def _only_results_differ() -> bool:
    """Return whether only result files differ from the commit: consecutive suites then measure the same code."""
    try:
        command = ["git", "status", "--porcelain", "--untracked-files=no"]
        asked = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return False
    changed = [line[3:] for line in asked.stdout.splitlines()]
    return asked.returncode == 0 and all(path.startswith("benchmarks/results/") for path in changed)


def _driver(device: torch.device) -> str:
    """Return driver version and maximum clock of a device, found by UUID: nvidia-smi numbers devices differently."""
    which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "-i", which, "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "not known"
    return asked.stdout.strip() if asked.returncode == 0 else "not known"


def free_memory(device: torch.device) -> float:
    """Return how many bytes can still be allocated on a device."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def slug(name: str) -> str:
    """Return a device's name in the form used in file names.

    Example:
        >>> slug("NVIDIA H100 80GB HBM3"), slug("Intel(R) Xeon(R) Processor")
        ('nvidia-h100-80gb-hbm3', 'intel-xeon-processor')
    """
    name = re.sub(r"\((R|TM|C)\)", " ", name)
    words = "".join(c if c.isalnum() else " " for c in name.lower()).split()
    return "-".join(words)

# SPDX-License-Identifier: Apache-2.0
"""The bug-report template of ``segkern info --report``: versions, devices, compiler and backends of this machine.

It works without typer and the other packages of the command line.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from segkern.core.dispatch import choose_backend
from segkern.core.environment import commit, processor, version_of
from segkern.generation.loading import DTYPES
from segkern.version import __version__

PACKAGES = (
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "peft",
    "typer",
    "rich",
    "pillow",
    "gradio",
    "matplotlib",
    "torchmetrics",
    "numpy",
)
# Variables that affect devices, compilers, memory and threads. All TRITON_ variables are included too.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "CUDA_HOME",
    "CUDA_LAUNCH_BLOCKING",
    "CC",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "HF_HUB_OFFLINE",
)
# Self-attention calls of common models, and their head dimensions.
CALLS = (
    ("SDXL mid, 32x32 tokens, 20 heads of dimension 64", 64),
    ("SDXL, 64x64 tokens, 10 heads of dimension 64", 64),
    ("SD 1.5, 64x64 tokens, 8 heads of dimension 40", 40),
    ("SD 1.5, 32x32 tokens, 8 heads of dimension 80", 80),
    ("SD 1.5, 16x16 tokens, 8 heads of dimension 160", 160),
)


def report() -> str:
    """Return the report as a Markdown code block. If a topic fails, its line contains the error."""
    lines = [f"{topic + ':':<18}{line}" for topic, describe in _TOPICS for line in _lines(describe)]
    return "\n".join(["```text", *lines, "```"])


def devices() -> list[torch.device]:
    """Return the CPU and all CUDA or ROCm devices."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def backends(device: torch.device) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield dtypes, the backend of ``seg_attention`` on a device, the reason for it, and the calls in ``CALLS``."""
    calls: dict[tuple[str, str, str], list[str]] = {}
    for call, head_dim in CALLS:
        names: dict[tuple[str, str], list[str]] = {}
        for name, dtype in DTYPES.items():
            names.setdefault(choose_backend(device, getattr(torch, dtype), head_dim), []).append(name)
        for (backend, reason), dtypes in names.items():
            calls.setdefault((", ".join(dtypes), backend, reason), []).append(call)
    for (joined, backend, reason), served in calls.items():
        yield joined, backend, reason, served


def _lines(describe: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return list(describe())
    except Exception as error:  # the report is most useful when something is broken
        return [f"unknown: {type(error).__name__}: {' '.join(str(error).split())}"]


def _segkern() -> Iterator[str]:
    checkout = commit()
    yield f"{__version__}, {f'checkout at commit {checkout}' if checkout else 'installed'}"


def _python() -> Iterator[str]:
    yield f"{platform.python_version()}, {platform.python_implementation()}"


def _platform() -> Iterator[str]:
    yield platform.platform()


def _processor() -> Iterator[str]:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 if hasattr(os, "sysconf") else None
    size = "" if memory is None else f", {memory:.0f} GiB"
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {capability}{size}"


def _torch() -> Iterator[str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    build = build or (f"ROCm {torch.version.hip}" if torch.version.hip else "neither CUDA nor ROCm")
    cudnn = torch.backends.cudnn.version()
    yield f"{torch.__version__}, built with {build}, cuDNN {cudnn if cudnn is not None else 'none'}"


def _devices() -> Iterator[str]:
    if not devices()[1:]:
        yield "no GPU that torch can use"
    for device in devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        target = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        kind = target or f"compute capability {properties.major}.{properties.minor}"
        yield f"{device}, {properties.name}, {kind}, {properties.total_memory / 2**30:.0f} GiB"


def _driver() -> Iterator[str]:
    amd = Path("/sys/module/amdgpu/version")
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        process = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        yield from dict.fromkeys(f"NVIDIA {line.strip()}" for line in process.stdout.splitlines() if line.strip())
    elif amd.exists():
        yield f"amdgpu {amd.read_text(encoding='utf-8').strip()}"
    else:
        yield "none found"


def _compiler() -> Iterator[str]:
    """Yield the C compiler that Triton and torch.compile use."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        yield f"none ({', '.join(names)}); Triton on a GPU and torch.compile need one"
        return
    process = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20)
    yield f"{_short(path)}, {process.stdout.splitlines()[0]}"


def _variables() -> Iterator[str]:
    names = sorted({name for name in os.environ if name.startswith("TRITON_")} | set(VARIABLES) & set(os.environ))
    yield ", ".join(f"{name}={_short(os.environ[name])}" for name in names) or "no relevant variables"


def _backends() -> Iterator[str]:
    for device in devices():
        for dtypes, backend, reason, calls in backends(device):
            where = "" if len(calls) == len(CALLS) else f" in {'; '.join(calls)}"
            yield f"{device}, {dtypes}{where}: {backend} (reason: {reason})"


def _short(path: str) -> str:
    """Return the path without the user's name."""
    return path.replace(str(Path.home()), "~") if Path.home() != Path("/") else path


def _version(package: str) -> Callable[[], Iterator[str]]:
    return lambda: iter([version_of(package)])


_TOPICS: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
    ("segkern", _segkern),
    ("python", _python),
    ("platform", _platform),
    ("cpu", _processor),
    ("torch", _torch),
    ("device", _devices),
    ("driver", _driver),
    *((package, _version(package)) for package in PACKAGES),
    ("C compiler", _compiler),
    ("environment", _variables),
    ("seg_attention", _backends),
)

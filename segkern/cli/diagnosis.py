# SPDX-License-Identifier: Apache-2.0
"""Versions, devices, compiler and backends of this machine, as a report of a fault needs them.

``segkern info --report`` prints it, also where typer and the other packages of the command line are missing.
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
# Beside all that begin with TRITON_: what chooses devices, compilers, memory and threads.
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
# Label, head dimension, of self-attention calls that occur in real models.
CALLS = (
    ("SDXL mid, 32x32 tokens, 20 heads", 64),
    ("SDXL, 64x64 tokens, 10 heads", 64),
    ("SD 1.5, 64x64 tokens, 8 heads", 40),
    ("SD 1.5, 32x32 tokens, 8 heads", 80),
    ("SD 1.5, 16x16 tokens, 8 heads", 160),
)


def report() -> str:
    """Everything as one block of markdown; a topic that cannot be found out says why instead."""
    lines = [f"{topic + ':':<18}{answer}" for topic, tell in _TOPICS for answer in _asked(tell)]
    return "\n".join(["```text", *lines, "```"])


def devices() -> list[torch.device]:
    """The CPU, and every CUDA or ROCm device."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def served(device: torch.device) -> Iterator[tuple[str, int, str, str, str]]:
    """Backends of real models' self-attention on a device: call, head dimension, dtypes, backend and reason."""
    for layer, width in CALLS:
        answers: dict[tuple[str, str], list[str]] = {}
        for name, dtype in DTYPES.items():
            answers.setdefault(choose_backend(device, getattr(torch, dtype), width), []).append(name)
        for (backend, reason), names in answers.items():
            yield layer, width, ", ".join(names), backend, reason


def _asked(tell: Callable[[], Iterator[str]]) -> list[str]:
    try:
        return list(tell())
    except Exception as error:  # whatever is broken here is what the report is for
        return [f"not known: {type(error).__name__}: {' '.join(str(error).split())}"]


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
    yield f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch, {capability}{size}"


def _torch() -> Iterator[str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    build = build or (f"ROCm {torch.version.hip}" if torch.version.hip else "neither CUDA nor ROCm")
    cudnn = torch.backends.cudnn.version()
    yield f"{torch.__version__}, built with {build}, cuDNN {cudnn if cudnn is not None else 'none'}"


def _devices() -> Iterator[str]:
    if not devices()[1:]:
        yield "none that torch can use"
    for device in devices()[1:]:
        properties = torch.cuda.get_device_properties(device)
        target = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        kind = target or f"compute capability {properties.major}.{properties.minor}"
        yield f"{device}, {properties.name}, {kind}, {properties.total_memory / 2**30:.0f} GiB"


def _driver() -> Iterator[str]:
    amd = Path("/sys/module/amdgpu/version")
    if shutil.which("nvidia-smi") is not None:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        yield from dict.fromkeys(f"NVIDIA {line.strip()}" for line in asked.stdout.splitlines() if line.strip())
    elif amd.exists():
        yield f"amdgpu {amd.read_text(encoding='utf-8').strip()}"
    else:
        yield "none found"


def _compiler() -> Iterator[str]:
    """The one that Triton takes for its launchers, and torch.compile on the CPU."""
    names = [os.environ["CC"]] if "CC" in os.environ else ["cc", "gcc", "clang"]
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        yield f"none ({', '.join(names)}): Triton on a GPU and torch.compile need one"
        return
    asked = subprocess.run([path, "--version"], capture_output=True, text=True, check=True, timeout=20)
    yield f"{_short(path)}, {asked.stdout.splitlines()[0]}"


def _variables() -> Iterator[str]:
    names = sorted({name for name in os.environ if name.startswith("TRITON_")} | set(VARIABLES) & set(os.environ))
    yield ", ".join(f"{name}={_short(os.environ[name])}" for name in names) or "none that matter"


def _served() -> Iterator[str]:
    for device in devices():
        answers: dict[tuple[str, str, str], list[str]] = {}
        for layer, _, dtypes, backend, reason in served(device):
            answers.setdefault((dtypes, backend, reason), []).append(layer)
        for (dtypes, backend, reason), layers in answers.items():
            calls = "" if len(layers) == len(CALLS) else f" in {'; '.join(layers)}"
            yield f"{device}, {dtypes}{calls}: {backend}, because: {reason}"


def _short(path: str) -> str:
    """Without the name of the user."""
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
    ("seg_attention", _served),
)

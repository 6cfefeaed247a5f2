# SPDX-License-Identifier: Apache-2.0
"""Find and load the pipeline that a user names: ``demo``, a folder, a hub name or a single file."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # our names and PyTorch's

# What describes a single file when the user names nothing: the configuration of the model it was made from.
_SINGLE_FILE_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
# What an SDXL file in the original layout holds, by the prefixes of its keys.
_SINGLE_FILE_PARTS = {
    "the denoiser": ("model.diffusion_model.",),
    "the autoencoder": ("first_stage_model.", "vae."),
    "the first text encoder": ("conditioner.embedders.0.transformer.",),
    "the second text encoder": ("conditioner.embedders.1.model.",),
}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """A model that was named and found.

    Attributes:
        name: what to call it in messages and metadata.
        kind: ``"folder"``, ``"hub"`` or ``"file"``.
        weights: folder, hub name or file with the weights.
        config: folder or hub name with the configuration.
    """

    name: str
    kind: str
    weights: str
    config: str


def missing_packages(*others: str) -> list[str]:
    """The packages that loading a pipeline needs, and others, that are not installed."""
    needed = ("diffusers", "transformers", "accelerate", "safetensors", *others)
    return [name for name in needed if importlib.util.find_spec(name) is None]


def find_model(model: str, config: str | None = None) -> Source:
    """Find out what a user's words name; nothing is loaded or fetched.

    Args:
        model: ``demo``, a checkpoint folder, a ``.safetensors`` file or a hub name.
        config: folder or hub name that describes a single file.

    Raises:
        ValueError: for what is none of these; the message quotes it.

    Example:
        >>> find_model("stabilityai/stable-diffusion-xl-base-1.0").kind
        'hub'
    """
    path = DEMO if model == "demo" else Path(model).expanduser()
    if path.is_file():
        _check_single_file(path)
        return Source(path.name, "file", str(path), _find_config(config))
    if config is not None:
        raise ValueError(f"config {config!r} describes a single .safetensors file, and {model!r} is not a file")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"folder {model!r} holds no model_index.json, so it is no diffusers checkpoint")
        return Source("demo" if model == "demo" else path.resolve().name, "folder", str(path), str(path))
    if model == "demo":
        raise ValueError("the demo checkpoint is not installed; python -m studies.training makes it")
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or not _HUB_NAME.fullmatch(model):
        raise ValueError(
            f"there is no file or folder {model!r}; a model is 'demo', a checkpoint folder, a .safetensors file, "
            f"or a hub name such as {_SINGLE_FILE_CONFIG!r}"
        )
    return Source(model, "hub", model, model)


def load_pipeline(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The pipeline, with weights from safetensors files alone.

    Raises:
        OSError: when files are missing or cannot be fetched.
        ValueError: when diffusers refuses the checkpoint.
    """
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

    if source.kind == "file":
        offline = Path(source.config).is_dir()
        pipe = StableDiffusionXLPipeline.from_single_file(
            source.weights, config=source.config, local_files_only=offline, dtype=dtype
        )
    else:
        pipe = DiffusionPipeline.from_pretrained(source.weights, use_safetensors=True, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def describe_pipeline(source: Source) -> Any:
    """The pipeline without weights, from configuration files alone: denoiser and autoencoder on PyTorch's meta device.

    Its other parts are None; ``list_layers`` takes it like a loaded one.

    Raises:
        OSError: when configuration files are missing or cannot be fetched.
        ValueError: when diffusers does not have a class that they name.
    """
    import torch
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(source.config)
        if not any(_class_name(index, name) for name in ("unet", "transformer")):
            raise OSError("model_index.json names no unet and no transformer")
        pipeline_class = _diffusers_class(source, index["_class_name"])
        parameters = inspect.signature(pipeline_class.__init__).parameters
        parts: dict[str, Any] = {
            name: None for name in list(parameters)[1:] if parameters[name].default is inspect.Parameter.empty
        }
        for name in ("unet", "transformer", "vae"):
            class_name = _class_name(index, name)
            if name in parameters and class_name is not None:
                model_class = _diffusers_class(source, class_name)
                config = model_class.load_config(source.config, subfolder=name)
                with torch.device("meta"):
                    parts[name] = model_class.from_config(config)
    except OSError as error:
        remote = not Path(source.config).is_dir()
        advice = "; a hub name needs a connection, or a copy in the cache" if remote else ""
        raise OSError(f"no denoiser's configuration found in {source.config!r}{advice} ({error})") from error
    if "requires_safety_checker" in parameters:
        parts["requires_safety_checker"] = False
    return pipeline_class(**parts)


def describe_unet_pipeline(source: Source) -> Any:
    """The same of a pipeline around a ``UNet2DConditionModel``, the only ones that the command line draws with.

    Raises:
        OSError: as :func:`describe_pipeline`.
        ValueError: as :func:`describe_pipeline`, and for a pipeline around another denoiser.
    """
    from diffusers import UNet2DConditionModel

    pipe = describe_pipeline(source)
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, UNet2DConditionModel):
        raise ValueError(
            f"the denoiser of {source.name!r} is a {type(denoiser).__name__}, and this command needs a "
            f"UNet2DConditionModel; segkern layers and, in Python, guide take others too"
        )
    return pipe


def _class_name(index: dict[str, Any], part: str) -> str | None:
    """The class of a component, as ``model_index.json`` names it."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, (list, tuple)) else None


def _diffusers_class(source: Source, name: str) -> Any:
    import diffusers

    if not hasattr(diffusers, name):
        raise ValueError(f"{source.name!r} has a {name}, which diffusers {diffusers.__version__} does not have")
    return getattr(diffusers, name)


def find_device(name: str) -> torch.device:
    """The device of that name, ``auto`` for CUDA where there is one and the CPU elsewhere.

    Raises:
        ValueError: for a device that is unknown or not there; the message lists those that are.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # also what only pretends to be a device fails here
    except (RuntimeError, AssertionError, NotImplementedError):
        fit = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"device {name!r} cannot be used here; {', '.join(fit)} can") from None
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name, ``auto`` for fp16 on CUDA and fp32 elsewhere.

    Raises:
        ValueError: for an unknown name; the message lists the others.
    """
    import torch

    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


@lru_cache(maxsize=1)
def quiet_libraries() -> None:
    """Keep diffusers and transformers from drawing bars and giving advice on our standard error."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()


def _find_config(config: str | None) -> str:
    if config is None:
        return _SINGLE_FILE_CONFIG
    if config == "demo":
        return str(DEMO)
    path = Path(config).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"config folder {config!r} holds no model_index.json")
        name = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        if name != "StableDiffusionXLPipeline":
            raise ValueError(f"config {config!r} describes a {name}; single files are loaded as SDXL only")
        return str(path)
    if path.exists() or not _HUB_NAME.fullmatch(config):
        raise ValueError(f"config must be a checkpoint folder or a hub name, got {config!r}")
    return config


def _check_single_file(path: Path) -> None:
    """Refuse what diffusers would refuse obscurely, or fill from elsewhere."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} is not a .safetensors file, and other weights are not loaded")
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{str(path)!r} is not a readable safetensors file: {error}") from None
    missing = [
        part
        for part, prefixes in _SINGLE_FILE_PARTS.items()
        if not any(key.startswith(prefix) for key in keys for prefix in prefixes)
    ]
    if missing:
        raise ValueError(
            f"{str(path)!r} is no SDXL checkpoint in the original single-file layout: it lacks {', '.join(missing)}"
        )

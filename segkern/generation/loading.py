# SPDX-License-Identifier: Apache-2.0
"""Loading of pipelines: the bundled model, checkpoint folders, Hugging Face Hub names and single files."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segkern.generation.calls import call_parameters, needs_image

if TYPE_CHECKING:
    import torch

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # our names and PyTorch's

# Configuration of a single file if none is given.
_SINGLE_FILE_CONFIG = "stabilityai/stable-diffusion-xl-base-1.0"
# Parts of an SDXL file in the original layout, and the prefixes of their keys.
_SINGLE_FILE_PARTS = {
    "the denoiser": ("model.diffusion_model.",),
    "the autoencoder": ("first_stage_model.", "vae."),
    "the first text encoder": ("conditioner.embedders.0.transformer.",),
    "the second text encoder": ("conditioner.embedders.1.model.",),
}
_HUB_SECONDS = 10.0
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Source:
    """The location of a model.

    Attributes:
        name: Name in messages and metadata.
        kind: ``"folder"``, ``"hub"`` or ``"file"``.
        weights: Folder, Hub name or file with the weights.
        config: Folder or Hub name with the configuration.
    """

    name: str
    kind: str
    weights: str
    config: str


def missing_packages(*packages: str) -> list[str]:
    """Return the missing packages, out of ``packages`` and the packages needed to load a pipeline."""
    needed = ("diffusers", "transformers", "accelerate", "safetensors", *packages)
    return [name for name in needed if importlib.util.find_spec(name) is None]


def find_model(model: str, config: str | None = None) -> Source:
    """Return the location of a model. Nothing is loaded or downloaded.

    Args:
        model: ``demo``, a checkpoint folder, a ``.safetensors`` file or a Hub name.
        config: Folder or Hub name with the configuration of a ``.safetensors`` file.

    Raises:
        ValueError: If the model or the configuration is invalid.

    Example:
        >>> find_model("stabilityai/stable-diffusion-xl-base-1.0").kind
        'hub'
    """
    path = DEMO if model == "demo" else Path(model).expanduser()
    if path.is_file():
        _check_single_file(path)
        return Source(path.name, "file", str(path), _find_config(config))
    if config is not None:
        raise ValueError(f"configuration {config!r} is only for .safetensors files, and {model!r} is not a file")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"folder {model!r} is not a diffusers checkpoint: it has no model_index.json")
        return Source("demo" if model == "demo" else path.resolve().name, "folder", str(path), str(path))
    if model == "demo":
        raise ValueError("the bundled model is missing; run python -m studies.training to train it")
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or not _HUB_NAME.fullmatch(model):
        raise ValueError(
            f"no file or folder {model!r}; use 'demo', a checkpoint folder, a .safetensors file or a Hub name such as "
            f"{_SINGLE_FILE_CONFIG!r}"
        )
    return Source(model, "hub", model, model)


def load_pipeline(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a pipeline. Only safetensors weights are loaded.

    Raises:
        OSError: If files are missing or cannot be downloaded.
        ValueError: If diffusers rejects the checkpoint.
    """
    from diffusers import DiffusionPipeline, StableDiffusionXLPipeline

    if source.kind == "file":
        pipe = StableDiffusionXLPipeline.from_single_file(
            source.weights, config=source.config, local_files_only=_is_local(source), dtype=dtype
        )
    else:
        pipe = DiffusionPipeline.from_pretrained(
            source.weights, use_safetensors=True, local_files_only=_is_local(source), dtype=dtype
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _is_local(source: Source) -> bool:
    """Return whether to use only files on this machine.

    The check avoids minutes of retries if the Hub cannot be reached.

    Raises:
        OSError: If the Hub cannot be reached and the configuration is not in its cache.
        ValueError: If the Hub has no such model.
    """
    if Path(source.config).is_dir():
        return True
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        HfApi().model_info(source.config, timeout=_HUB_SECONDS)
    except Exception as error:  # the class of a connection error depends on huggingface_hub's HTTP library
        if isinstance(try_to_load_from_cache(source.config, "model_index.json"), str):
            return True
        if isinstance(error, RepositoryNotFoundError):
            raise ValueError(
                f"the Hugging Face Hub has no model {source.config!r}, or you have no access to it; check the name, or "
                f"log in with hf auth login"
            ) from None
        advice = "; give a configuration folder to load the file offline" if source.kind == "file" else ""
        raise OSError(
            f"cannot reach the Hugging Face Hub, and {source.config!r} is not in the local cache{advice} ({error})"
        ) from None
    return False


def describe_pipeline(source: Source) -> Any:
    """Return the pipeline without weights, for ``list_layers``. Only configuration files are read.

    The denoiser and the autoencoder are on PyTorch's meta device. The other components are None.

    Raises:
        OSError: If configuration files are missing or cannot be downloaded.
        ValueError: If the installed diffusers lacks a class of the model.
    """
    import torch
    from diffusers import DiffusionPipeline

    local = _is_local(source)
    try:
        index = DiffusionPipeline.load_config(source.config, local_files_only=local)
        if not any(_class_name(index, name) for name in ("unet", "transformer")):
            raise OSError("model_index.json has neither a unet nor a transformer")
        pipeline_class = _diffusers_class(source, index["_class_name"])
        parameters = inspect.signature(pipeline_class.__init__).parameters
        parts: dict[str, Any] = {
            name: None for name in list(parameters)[1:] if parameters[name].default is inspect.Parameter.empty
        }
        # Settings such as is_distilled. Components are lists.
        parts |= {name: index[name] for name in parameters if name in index and not isinstance(index[name], list)}
        for name in ("unet", "transformer", "vae"):
            class_name = _class_name(index, name)
            if name in parameters and class_name is not None:
                model_class = _diffusers_class(source, class_name)
                config = model_class.load_config(source.config, subfolder=name, local_files_only=local)
                with torch.device("meta"):
                    parts[name] = model_class.from_config(config)
    except OSError as error:
        raise OSError(f"no configuration of a denoiser in {source.config!r}: {error}") from error
    if "requires_safety_checker" in parameters:
        parts["requires_safety_checker"] = False
    return pipeline_class(**parts)


def describe_image_pipeline(source: Source) -> Any:
    """Return a text-to-image pipeline without weights; see :func:`describe_pipeline`.

    Raises:
        OSError: If configuration files are missing or cannot be downloaded.
        ValueError: If the installed diffusers lacks a class of the model, or if the pipeline cannot be guided or is
            not a text-to-image pipeline.
    """
    from segkern.integrations.diffusers import list_layers

    pipe = describe_pipeline(source)
    try:
        list_layers(pipe)
    except ValueError as error:
        raise ValueError(f"{source.name!r} cannot be guided: {error}") from None
    parameters = call_parameters(pipe)
    if "num_frames" in parameters:
        raise ValueError(f"{source.name!r} generates videos; use a text-to-image model, or guide in Python")
    if needs_image(pipe):
        raise ValueError(
            f"{source.name!r} is a {type(pipe).__name__}, which works on an input image; use a text-to-image model, or "
            f"guide in Python"
        )
    needed = ("prompt", "width", "height", "num_inference_steps", "guidance_scale", "generator")
    missing = [name for name in needed if name not in parameters]
    if missing:
        raise ValueError(
            f"{source.name!r} is a {type(pipe).__name__}, whose call has no {missing[0]!r}; use a "
            f"text-to-image pipeline"
        )
    return pipe


def describe_unet_pipeline(source: Source) -> Any:
    """Return a text-to-image pipeline with a ``UNet2DConditionModel``; see :func:`describe_image_pipeline`.

    Raises:
        OSError: If configuration files are missing or cannot be downloaded.
        ValueError: As for :func:`describe_image_pipeline`, and if the denoiser is of another class.
    """
    from diffusers import UNet2DConditionModel

    pipe = describe_image_pipeline(source)
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if not isinstance(denoiser, UNet2DConditionModel):
        raise ValueError(
            f"{source.name!r} has a {type(denoiser).__name__}, and this command needs a UNet2DConditionModel; use "
            f"guide in Python for this model"
        )
    return pipe


def _class_name(index: dict[str, Any], part: str) -> str | None:
    """Return the class name of a component in ``model_index.json``."""
    entry = index.get(part)
    return entry[1] if isinstance(entry, (list, tuple)) else None


def _diffusers_class(source: Source, name: str) -> Any:
    import diffusers

    if not hasattr(diffusers, name):
        raise ValueError(f"{source.name!r} needs {name}, which diffusers {diffusers.__version__} does not have")
    return getattr(diffusers, name)


def find_device(name: str) -> torch.device:
    """Return the device with this name. ``auto`` is the GPU if there is one, else the CPU.

    Raises:
        ValueError: If the device is not available. The message lists the available devices.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # fails on the meta device
    except (RuntimeError, AssertionError, NotImplementedError):
        available = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {name!r} is not available; use one of {', '.join(available)}") from None
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype with this name. ``auto`` is fp16 on a GPU, else fp32.

    Raises:
        ValueError: If the name is unknown. The message lists the valid names.
    """
    import torch

    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype must be one of auto, {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, DTYPES[name])
    return dtype


@lru_cache(maxsize=1)
def quiet_libraries() -> None:
    """Turn off the progress bars of diffusers and transformers, and the advice of transformers."""
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
            raise ValueError(f"configuration folder {config!r} has no model_index.json")
        name = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        if name != "StableDiffusionXLPipeline":
            raise ValueError(f"configuration {config!r} is for a {name}, but single files must be SDXL checkpoints")
        return str(path)
    if path.exists() or not _HUB_NAME.fullmatch(config):
        raise ValueError(f"the configuration must be a checkpoint folder or a Hub name, got {config!r}")
    return config


def _check_single_file(path: Path) -> None:
    """Raise a ValueError for files that diffusers would reject with an unclear error or complete from elsewhere."""
    from safetensors import SafetensorError, safe_open

    if path.suffix != ".safetensors":
        raise ValueError(f"{str(path)!r} is not a .safetensors file; other formats are not supported")
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
            f"{str(path)!r} is not an SDXL checkpoint in the original single-file layout; it lacks {', '.join(missing)}"
        )

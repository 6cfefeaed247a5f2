# SPDX-License-Identifier: Apache-2.0
"""From what a user names (``demo``, a folder, a hub name, a single file) to a pipeline on a device."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).parents[1] / "checkpoints" / "demo"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

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


@dataclass(frozen=True)
class Outline:
    """What is known of a pipeline without its weights; ``list_layers`` takes it like a pipeline.

    Attributes:
        unet: the denoiser, on PyTorch's meta device.
        vae_scale_factor: pixels per latent, along each side.
    """

    unet: Any
    vae_scale_factor: int


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
        raise ValueError(f"--config describes a single .safetensors file, and {model!r} is not a file")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(f"folder {model!r} holds no model_index.json, so it is no diffusers checkpoint")
        return Source("demo" if model == "demo" else path.resolve().name, "folder", str(path), str(path))
    if model == "demo":
        raise ValueError("the demo checkpoint is not installed; python -m training makes it")
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


def outline(source: Source) -> Outline:
    """The denoiser without weights and the autoencoder's scale factor, from configuration files alone.

    Raises:
        OSError: when they are missing or cannot be fetched.
        ValueError: when the model has no ``UNet2DConditionModel``.
    """
    from diffusers import AutoencoderKL, UNet2DConditionModel

    try:
        config = UNet2DConditionModel.load_config(source.config, subfolder="unet")
    except OSError as error:
        if (Path(source.config) / "transformer").is_dir():
            raise ValueError(
                f"{source.name!r} has a transformer and no UNet2DConditionModel, which this command needs; "
                f"segkern layers and, in Python, guide take it"
            ) from None
        remote = not Path(source.config).is_dir()
        advice = "; a hub name needs a connection, or a copy in the cache" if remote else ""
        raise OSError(f"no denoiser's configuration found in {source.config!r}{advice} ({error})") from error
    if config.get("_class_name") != "UNet2DConditionModel":
        raise ValueError(f"the unet of {source.name!r} is a {config.get('_class_name')}, not a UNet2DConditionModel")
    vae = AutoencoderKL.load_config(source.config, subfolder="vae")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    return Outline(unet, 2 ** (len(vae["block_out_channels"]) - 1))


def image_size(pipe: Any, width: int | None, height: int | None) -> tuple[int, int]:
    """Width and height in pixels: the ones asked for, else the model's own.

    Args:
        pipe: a pipeline, or its outline.
        width: asked for.
        height: asked for.

    Raises:
        ValueError: for a size that the pipeline cannot draw; the message quotes it.
    """
    own = pipe.unet.config.sample_size
    if own is None:
        own = 64
    own_height, own_width = (own, own) if isinstance(own, int) else own
    factor = pipe.vae_scale_factor
    multiple = max(8, factor)  # diffusers takes no other size
    for name, value in (("width", width), ("height", height)):
        if value is not None and (value <= 0 or value % multiple):
            below = max(multiple, value // multiple * multiple)
            raise ValueError(f"--{name} must be a positive multiple of {multiple}, such as {below}, got {value}")
    return width or own_width * factor, height or own_height * factor


def find_device(name: str) -> torch.device:
    """The device of that name, ``auto`` for CUDA where there is one and the CPU elsewhere.

    Raises:
        ValueError: for a device that is unknown or not there; the message lists those that are.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).cpu()  # also what only pretends to be a device fails here
    except (RuntimeError, AssertionError, NotImplementedError):
        fit = ["auto", "cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        raise ValueError(f"--device {name!r} cannot be used here; {', '.join(fit)} can") from None
    return device


def find_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name, ``auto`` for fp16 on CUDA and fp32 elsewhere.

    Raises:
        ValueError: for an unknown name; the message lists the others.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"--dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


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
            raise ValueError(f"--config folder {config!r} holds no model_index.json")
        name = json.loads((path / "model_index.json").read_text(encoding="utf-8")).get("_class_name")
        if name != "StableDiffusionXLPipeline":
            raise ValueError(f"--config {config!r} describes a {name}; single files are loaded as SDXL only")
        return str(path)
    if path.exists() or not _HUB_NAME.fullmatch(config):
        raise ValueError(f"--config must be a checkpoint folder or a hub name, got {config!r}")
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

# SPDX-License-Identifier: Apache-2.0
"""Generation of images with and without guidance, their captions and their metadata."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from segkern.generation.calls import call_arguments, execution_device, step_callback
from segkern.generation.loading import Source
from segkern.generation.tables import percent
from segkern.version import __version__

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from segkern.integrations.diffusers import Report
    from segkern.integrations.specs.base import Spec
    from segkern.integrations.specs.layer_names import LayerInfo

Specs = tuple["Spec", ...]  # guidance specs of one image; empty for no guidance

_GLOBAL_SEEDS = 2**32  # added to an image's seed for PyTorch's global random numbers, which must differ from its noise
# Fields of a guidance spec that are always in the metadata. Other fields are included if they differ from the default.
_RECORDED_FIELDS = ("scale", "sigma", "layers", "layer", "start", "stop")


@dataclass(frozen=True)
class ImageRequest:
    """Settings of an image that do not depend on segkern's guidance.

    Attributes:
        prompt: Text prompt.
        negative_prompt: Negative prompt.
        width: Width in pixels.
        height: Height in pixels.
        seed: Seed of the initial noise.
        steps: Number of inference steps.
        guidance_scale: Scale of classifier-free guidance.
    """

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class ImageResult:
    """An image and the effect of guidance on it.

    Attributes:
        image: The image.
        report: Guidance report; None without guidance.
        seconds: Duration of the pipeline call, divided by its number of images.
    """

    image: Image
    report: Report | None
    seconds: float


def check_layers(pipe: Any, specs: Specs, device: torch.device, dtype: torch.dtype) -> None:
    """Check the layers of guidance specs before weights are loaded.

    Raises:
        ValueError: If a layer is unknown or the requested backend does not support it.
    """
    from segkern.core.dispatch import choose_backend
    from segkern.integrations.diffusers import list_layers
    from segkern.integrations.specs.base import AttentionSpec, LayeredSpec

    for spec in specs:
        layers = find_layers(list_layers(pipe), spec.layer_names) if isinstance(spec, LayeredSpec) else []
        if isinstance(spec, AttentionSpec):
            for layer in layers:
                choose_backend(device, dtype, layer.head_dim, spec.backend or "auto")


def find_layers(available: Sequence[LayerInfo], names: Sequence[str]) -> list[LayerInfo]:
    """Return the layers with these names.

    Raises:
        ValueError: If a name is unknown.
    """
    from segkern.integrations.specs.layer_names import select_layers

    try:
        return select_layers(available, names, "segkern layers lists every layer")
    except ValueError as error:
        raise ValueError(f"--layers: {error}") from None


def default_layers(pipe: Any, method: str = "seg") -> list[str]:
    """Return the default layers of a guidance method for a pipeline, with or without weights.

    For a UNet without a middle block, these are all parts.
    """
    from segkern.integrations.diffusers import list_layers
    from segkern.integrations.diffusers.models.layers import default_layers_of

    default = default_layers_of(pipe, method.upper())[0]
    if getattr(pipe, "unet", None) is None or default != "mid":
        return [default]
    parts = list(dict.fromkeys(layer.part for layer in list_layers(pipe)))
    return [default] if default in parts else parts


def draw(
    pipe: Any, request: ImageRequest, specs: Specs, on_step: Callable[..., Any] | None = None, *, share: bool = True
) -> ImageResult:
    """Generate one image; see :func:`draw_batch`."""
    return draw_batch(pipe, [request], specs, on_step, share=share)[0]


def draw_batch(
    pipe: Any,
    requests: Sequence[ImageRequest],
    specs: Specs,
    on_step: Callable[..., Any] | None = None,
    *,
    share: bool = True,
) -> list[ImageResult]:
    """Generate several images in one pipeline call.

    Each image has its own generator on the CPU, so its noise depends neither on the device nor on the other images. If
    ``on_step`` raises an exception, generation ends and guidance is removed from the pipeline.

    Args:
        pipe: Pipeline.
        requests: Settings of the images. Only prompts, seeds and negative prompts may differ. Either all negative
            prompts are empty or none is.
        specs: Guidance specs; empty for no guidance.
        on_step: Function for diffusers' ``callback_on_step_end``.
        share: Whether to share branches; see :func:`segkern.integrations.diffusers.guide`.

    Returns:
        One result per request. Its report describes only this image.

    Raises:
        SharedNoiseError: If the pipeline used noise that the generators of several images do not determine.
    """
    import torch

    from segkern.integrations.diffusers import GuidanceWarning, guide

    def run() -> list[Image]:
        arguments: dict[str, Any] = {"prompt": [request.prompt for request in requests]}
        arguments["generator"] = [torch.Generator("cpu").manual_seed(request.seed) for request in requests]
        if len(requests) == 1:
            arguments = {name: value[0] for name, value in arguments.items()}
        arguments |= call_arguments(pipe, requests[0])
        if "negative_prompt" in arguments and len(requests) > 1:
            arguments["negative_prompt"] = [request.negative_prompt for request in requests]
        if on_step is not None:
            arguments |= step_callback(pipe, on_step)
        with _own_noise(pipe, requests):
            images: list[Image] = pipe(**arguments).images
        if len(images) != len(requests):
            raise RuntimeError(f"{type(pipe).__name__} returned {len(images)} images for {len(requests)} prompts")
        return images

    begun = time.perf_counter()
    reports: list[Report | None] = [None] * len(requests)
    if not specs:
        images = run()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GuidanceWarning)  # the report contains the warning
            with guide(pipe, *specs, share=share) as guidance:
                images = run()
            reports = [guidance.report(index) for index in range(len(requests))]
    seconds = (time.perf_counter() - begun) / len(requests)
    return [ImageResult(image, report, seconds) for image, report in zip(images, reports, strict=True)]


class SharedNoiseError(RuntimeError):
    """A pipeline used PyTorch's global random numbers, which are not specific to an image, for several images."""


@contextmanager
def _own_noise(pipe: Any, requests: Sequence[ImageRequest]) -> Iterator[None]:
    """Seed PyTorch's global random numbers, which some schedulers use in place of generators, for one image.

    Raises:
        SharedNoiseError: If global random numbers were used for several images.
    """
    import torch

    device = execution_device(pipe)
    on_gpu = device.type == "cuda"

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_gpu else [])]

    with torch.random.fork_rng([device] if on_gpu else []):
        torch.manual_seed(requests[0].seed + _GLOBAL_SEEDS)
        before = states()
        yield
        if len(requests) > 1 and not all(map(torch.equal, before, states())):
            raise SharedNoiseError(
                f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} uses random numbers that do not come from "
                f"the generators of the images; use a batch size of 1"
            )


def denoiser_calls(pipe: Any, steps: int) -> int:
    """Return the number of denoiser calls. Some schedulers need two calls per inference step.

    Raises:
        ValueError: If the scheduler does not support the number of steps.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    return len(scheduler.timesteps)


def report_rows(
    plan: Sequence[Specs], results: Sequence[ImageResult], guidance_scale: float
) -> tuple[list[str], list[list[str]]]:
    """Return the guidance report of several images: the headings, and a row per image, guidance method and layer."""
    reports = [
        (label(specs, guidance_scale), result.report)
        for specs, result in zip(plan, results, strict=True)
        if result.report is not None
    ]
    several = any(len(report.specs) > 1 for _, report in reports)
    headings = ["image", *["guidance"] * several, "layer", "fired", "moved", "module"]
    rows = []
    for name, report in reports:
        for row in report.layers:
            guidance = [type(report.specs[row.spec]).__name__] if several else []
            fired = f"{row.fired} of {report.forwards}"
            rows.append([name, *guidance, row.layer, fired, percent(row.moved), row.module])
    return headings, rows


def label(specs: Specs, guidance_scale: float, *, brief: bool = False) -> str:
    """Return the caption of an image: its guidance methods with their main number.

    Args:
        specs: Guidance methods used for the image, in addition to classifier-free guidance (CFG).
        guidance_scale: CFG scale; 1 or less means no CFG, as in diffusers.
        brief: Whether to leave out the numbers of the guidance methods other than CFG.

    Example:
        >>> label((), 5.0), label((), 1.0)
        ('CFG 5', 'no guidance')
        >>> from segkern.integrations.diffusers import PAG, SEG
        >>> label((SEG(3.0, 4.0, "mid"), PAG(2.0)), 5.0)
        'CFG 5 + SEG sigma 4 + PAG 2'
        >>> label((SEG(3.0, 4.0, "mid"),), 5.0, brief=True)
        'CFG 5 + SEG'
    """
    names = [f"CFG {guidance_scale:g}"] if guidance_scale > 1 else []
    names += [type(spec).__name__ if brief else _label(spec) for spec in specs]
    return " + ".join(names) or "no guidance"


def _label(spec: Spec) -> str:
    name, sigma = type(spec).__name__, getattr(spec, "sigma", None)
    return f"SEG sigma {sigma:g}" if name == "SEG" and isinstance(sigma, float) else f"{name} {spec.scale:g}"


def image_metadata(
    source: Source, request: ImageRequest, specs: Specs, dtype: torch.dtype, scheduler: object
) -> dict[str, object]:
    """Return the settings needed to generate an image again, by name."""
    metadata: dict[str, object] = {
        "model": source.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": request.seed,
        "steps": request.steps,
        "width": request.width,
        "height": request.height,
        "guidance_scale": request.guidance_scale,
        "dtype": str(dtype).removeprefix("torch."),
        "scheduler": type(scheduler).__name__,
        "guidance": " + ".join(type(spec).__name__ for spec in specs) or "none",
    }
    for spec in specs:
        guidance = type(spec).__name__.lower()
        for name, value in spec.main_values(_RECORDED_FIELDS).items():
            if isinstance(value, tuple):
                value = ",".join(map(str, value))
            metadata[f"{guidance}_{name}"] = f"{value:g}" if name == "sigma" else value
    return metadata | _versions()


@lru_cache(maxsize=1)
def _versions() -> dict[str, object]:
    """Return the versions of the packages that determine an image. The look-up takes as long as reading an image."""
    from segkern.core.environment import version_of

    return {"segkern": __version__, **{name: version_of(name) for name in ("torch", "diffusers")}}

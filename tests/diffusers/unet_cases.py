# SPDX-License-Identifier: Apache-2.0
"""Cases of a UNet at a task: small random checkpoints, additional models, pipelines and their calls."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiAdapter, T2IAdapter, UNet2DConditionModel

from tests.diffusers.small_pipelines import tiny_pipeline

TEXT = 5  # tokens of a prompt
CHANNELS, POOLED = 24, 8  # size of its embeddings
IMAGE_EMBEDS = 8  # size of an image embedding
FACTOR = 2  # side of a latent pixel in pixels

Call = Callable[["Case", int, bool], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model at one task.

    Attributes:
        name: Name of the pipeline class, which defines the task.
        build: Creates the pipeline, without text encoders if it needs none.
        call: Returns call arguments for a number of samples, and whether to use classifier-free guidance.
        layers: Layers to guide, in the form that ``guide`` accepts.
        modules: Name patterns of the same modules.
        size: Latent size.
        steps: Steps of a run.
        scales: Values of ``guidance_scale`` with and without classifier-free guidance; None if there is no such run.
        frames: Number of video frames.
        samples: Batch size.
    """

    name: str
    build: Callable[[Case], Any]
    call: Call
    layers: Any = "mid"
    modules: tuple[str, ...] = ("mid_block.*",)
    size: tuple[int, int] = (8, 12)
    steps: int = 2
    scales: tuple[float | None, float | None] = (5.0, 1.0)
    frames: int = 0
    samples: int = 2
    pixels: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", (FACTOR * self.size[0], FACTOR * self.size[1]))


def unet(**options: Any) -> UNet2DConditionModel:
    """Return a small UNet in Stable Diffusion 1's layout by default, with attention far from uniform."""
    levels = len(options.get("block_out_channels", (16, 32)))
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "attention_head_dim": 2,  # diffusers uses this name for the number of heads
        "cross_attention_dim": CHANNELS,
    }
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = UNet2DConditionModel(**{**defaults, **options})
        for name, parameter in model.named_parameters():
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                parameter.data *= 3.0
    return model.eval().requires_grad_(False)


def unet_xl(ids: int = 6, **options: Any) -> UNet2DConditionModel:
    """Return a UNet in SDXL's layout: no attention at the first level, several transformer blocks at the second."""
    defaults = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": POOLED + 4 * ids,
    }
    return unet(**{**defaults, **options})


def scheduler(kind: str = "DDIMScheduler", **options: Any) -> Any:
    known = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if kind == "DDIMScheduler":
        known |= {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return getattr(diffusers, kind)(**known, **options)


def kind_of(name: str) -> Any:
    """Return the pipeline class. diffusers hides Kolors if sentencepiece, for its tokenizer, is missing."""
    hidden = {"KolorsPAGPipeline": "pag.pipeline_pag_kolors", "KolorsPipeline": "kolors.pipeline_kolors"}
    hidden["KolorsImg2ImgPipeline"] = "kolors.pipeline_kolors_img2img"
    module = importlib.import_module(f"diffusers.pipelines.{hidden[name]}") if name in hidden else diffusers
    return getattr(module, name)


def pipeline(case: Case, model: Any, noise: Any = None, **parts: Any) -> Any:
    """Return the case's pipeline with the tiny VAE and, unless given, no encoders of texts and images."""
    kind = kind_of(case.name)
    given = {"unet": model, "scheduler": noise or scheduler(), "vae": tiny_pipeline().components["vae"], **parts}
    taken = inspect.signature(kind.__init__).parameters
    if "requires_safety_checker" in taken:
        given["requires_safety_checker"] = False
    required = [name for name, p in taken.items() if p.default is p.empty and name not in ("self", "kwargs")]
    pipe = kind(**{**dict.fromkeys(required), **given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
    """Return embeddings of prompts and negative prompts, and the size if the pipeline accepts it."""
    taken = inspect.signature(kind_of(case.name).__call__).parameters
    given: dict[str, Any] = {}
    for seed, prefix in enumerate(("", "negative_") if cfg else ("",)):
        generator = torch.Generator().manual_seed(seed)
        given[f"{prefix}prompt_embeds"] = torch.randn(samples, TEXT, CHANNELS, generator=generator)
        if f"{prefix}pooled_prompt_embeds" in taken:
            given[f"{prefix}pooled_prompt_embeds"] = torch.randn(samples, POOLED, generator=generator)
    if "height" in taken:
        given |= {"height": case.pixels[0], "width": case.pixels[1]}
    return given


def with_options(**options: Any) -> Call:
    """Return a call with embeddings and options; functions among the options get the case and the number of samples."""

    def call(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
        more = {name: option(case, samples, cfg) if callable(option) else option for name, option in options.items()}
        return {**embeds(case, samples, cfg), **more}

    return call


def run(case: Case, pipe: Any, cfg: bool, **more: Any) -> torch.Tensor:
    """Return latents of a short run."""
    scale = case.scales[0 if cfg else 1]
    given = {"num_inference_steps": case.steps, "guidance_scale": scale, **case.call(case, case.samples, cfg)}
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(5), **more}
    output = pipe(**given)
    return output.frames if case.frames else output.images


def built_of(model: Callable[..., Any], noise: Any = None, parts: Any = None, **options: Any) -> Callable[[Case], Any]:
    """Return a function that builds a pipeline from a model with options and additional parts."""

    def build(case: Case) -> Any:
        torch.manual_seed(11)
        made = model(**options)
        return pipeline(case, made, noise and noise(), **(parts(made) if parts is not None else {}))

    return build


def changed(make: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Return a function that builds a pipeline and then changes it."""

    def build(case: Case) -> Any:
        pipe = make(case)
        change(pipe)
        return pipe

    return build


# Additional inputs and models: images, ControlNets, adapters, low-rank layers.


def image(case: Case, samples: int, cfg: bool, size: tuple[int, int] | None = None, seed: int = 3) -> torch.Tensor:
    """Return one image per sample, of the case's size in pixels unless another is given."""
    return torch.rand(samples, 3, *(size or case.pixels), generator=torch.Generator().manual_seed(seed))


def controls(case: Case, samples: int, cfg: bool) -> list[torch.Tensor]:
    """Return two kinds of control image."""
    return [image(case, samples, cfg), image(case, samples, cfg, seed=4)]


def mask(case: Case, samples: int, cfg: bool) -> torch.Tensor:
    """Return a mask of the part of each image to generate."""
    drawn = torch.zeros(samples, 1, *case.pixels)
    drawn[:, :, 4:12, 4:16] = 1.0
    return drawn


def depth(case: Case, samples: int, cfg: bool) -> torch.Tensor:
    return image(case, samples, cfg)[:, 0]


def controlnet(unet: Any, count: int = 1) -> dict[str, Any]:
    """Return one or several ControlNets whose residuals are not zero."""
    made = []
    for _ in range(count):
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8), conditioning_channels=3)
        if unet.config.in_channels != 4:  # it gets only the latents
            net.conv_in = torch.nn.Conv2d(4, unet.config.block_out_channels[0], 3, padding=1)
        made.append(seen(net))
    return {"controlnet": made if count > 1 else made[0]}


def controlnet_union(unet: Any) -> dict[str, Any]:
    first = unet.config.block_out_channels[0]
    own = {"num_trans_channel": first, "num_trans_head": 2, "num_proj_channel": first}
    given = {**unet.config, "conditioning_embedding_out_channels": (8, 8), "conditioning_channels": 3, **own}
    taken = inspect.signature(ControlNetUnionModel.__init__).parameters
    return {"controlnet": seen(ControlNetUnionModel(**{name: given[name] for name in taken if name in given}))}


def seen(net: Any) -> Any:
    """Give a new ControlNet non-zero residuals."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False)


def adapter(unet: Any, count: int = 1) -> dict[str, Any]:
    """Return one or several T2I-Adapters with one residual per level."""
    channels = list(unet.config.block_out_channels)
    made = [T2IAdapter(3, channels, 1, downscale_factor=2, adapter_type="full_adapter").eval() for _ in range(count)]
    return {"adapter": MultiAdapter(made) if count > 1 else made[0]}


def adapter_xl(unet: Any) -> dict[str, Any]:
    """Return a T2I-Adapter for SDXL, whose first residual is added after the first block, at half the size."""
    channels = [*unet.config.block_out_channels, unet.config.block_out_channels[-1]]
    return {"adapter": T2IAdapter(3, channels, 1, downscale_factor=4, adapter_type="full_adapter_xl").eval()}


def ip_adapter(pipe: Any) -> None:
    """Load a random IP-Adapter."""
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])


def ip_adapter_weights(unet: Any) -> dict[str, Any]:
    """Return a random IP-Adapter for image embeddings of 8 numbers and 4 image tokens."""
    generator = torch.Generator().manual_seed(0)
    text, weights = unet.config.cross_attention_dim, {}
    cross = [name for name in unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    for index, name in enumerate(cross):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            weights[f"{2 * index + 1}.to_{part}_ip.weight"] = torch.randn(channels, text, generator=generator) * 0.5
    proj = {
        "proj.weight": torch.randn(4 * text, IMAGE_EMBEDS, generator=generator),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": proj, "ip_adapter": weights}


def image_embeds(case: Case, samples: int, cfg: bool, images: int = 1) -> list[torch.Tensor]:
    """Return embeddings for a loaded IP-Adapter, for all samples; zero embeddings come first under CFG."""
    shape = (2 if cfg else 1, images, IMAGE_EMBEDS)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(1))]


def two_image_embeds(case: Case, samples: int, cfg: bool) -> list[torch.Tensor]:
    return image_embeds(case, samples, cfg, 2)


def image_masks(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
    """Return masks for two images: left and right."""
    halves = torch.zeros(1, 2, *case.pixels)
    halves[:, 0, :, : case.pixels[1] // 2] = 1.0
    halves[:, 1] = 1.0 - halves[:, 0]
    return {"ip_adapter_masks": [halves]}


class LowRank(torch.nn.Module):
    """A linear layer with a low-rank one, like PEFT's replacement of a layer."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 0.7 * self.up(self.down(x))


def low_rank(pipe: Any) -> None:
    """Replace every projection of every attention by such a layer."""
    for name, module in list(pipe.unet.named_modules()):
        if name.endswith(("attn1", "attn2")):
            for projection in ("to_q", "to_k", "to_v"):
                setattr(module, projection, LowRank(getattr(module, projection)))
            module.to_out[0] = LowRank(module.to_out[0])
    pipe.unet.requires_grad_(False)

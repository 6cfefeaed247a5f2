# SPDX-License-Identifier: Apache-2.0
"""A table of UNets and tasks: small random checkpoints, their pipelines, and how to call those."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers_tools import tiny_pipeline
from unet_parts import (
    adapter,
    controlnet,
    controlnet_union,
    controls,
    depth,
    image,
    image_embeds,
    image_masks,
    ip_adapter,
    low_rank,
    mask,
    two_image_embeds,
)

TEXT = 5  # tokens of a prompt
CHANNELS, POOLED = 24, 8  # of its embeddings
FACTOR = 2  # pixels along the side of a latent pixel

Call = Callable[["Case", int, bool], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model at one task.

    Attributes:
        name: of the pipeline's class, which is the task.
        build: makes the pipeline, without text encoders where it needs none.
        call: arguments of its call for so many samples, whether with classifier-free guidance.
        layers: where to guide, as ``guide`` takes it.
        modules: patterns of the names of the same modules.
        size: of the latents.
        steps: of a run.
        scales: values of ``guidance_scale`` with and without classifier-free guidance; None where there is no such run.
        frames: of a video.
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
    pixels: tuple[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pixels", (FACTOR * self.size[0], FACTOR * self.size[1]))


def unet(**options: Any) -> UNet2DConditionModel:
    """In Stable Diffusion 1's layout but small, unless the options tell otherwise; attention is far from uniform."""
    levels = len(options.get("block_out_channels", (16, 32)))
    defaults = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "attention_head_dim": 2,  # diffusers' name for the number of heads
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
    """In Stable Diffusion XL's layout: no attention at the first level, several transformer blocks at the second."""
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


def pipeline(case: Case, model: Any, noise: Any = None, **parts: Any) -> Any:
    """The case's pipeline with the tiny VAE and, unless given, no encoder of texts and images."""
    kind: Any = getattr(diffusers, case.name)
    given = {"unet": model, "scheduler": noise or scheduler(), "vae": tiny_pipeline().components["vae"], **parts}
    taken = inspect.signature(kind.__init__).parameters
    if "requires_safety_checker" in taken:
        given["requires_safety_checker"] = False
    required = [name for name, each in taken.items() if each.default is each.empty and name not in ("self", "kwargs")]
    pipe = kind(**{**dict.fromkeys(required), **given})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embeds(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
    """Embeddings of prompts and negative prompts; the size, where the pipeline takes one."""
    taken = inspect.signature(getattr(diffusers, case.name).__call__).parameters
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
    """A call with embeddings and more; functions among the options are told the case and the number of samples."""

    def call(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
        more = {name: each(case, samples, cfg) if callable(each) else each for name, each in options.items()}
        return {**embeds(case, samples, cfg), **more}

    return call


def run(case: Case, pipe: Any, cfg: bool, samples: int = 2, **more: Any) -> torch.Tensor:
    """Latents of a short run."""
    scale = case.scales[0 if cfg else 1]
    given = {"num_inference_steps": case.steps, "guidance_scale": scale, **case.call(case, samples, cfg)}
    given |= {"output_type": "latent", "generator": torch.Generator().manual_seed(5), **more}
    output = pipe(**given)
    return output.frames if case.frames else output.images


def _of(model: Callable[..., Any], noise: Any = None, parts: Any = None, **options: Any) -> Callable[[Case], Any]:
    """How to build a pipeline: of which model with which options, and with which parts beside it."""

    def build(case: Case) -> Any:
        torch.manual_seed(11)
        made = model(**options)
        return pipeline(case, made, noise and noise(), **(parts(made) if parts is not None else {}))

    return build


def _text_encoder(model: Any) -> dict[str, Any]:
    return {name: tiny_pipeline().components[name] for name in ("text_encoder", "tokenizer")}


def _prompts(case: Case, samples: int, cfg: bool) -> dict[str, Any]:
    prompts = ["a red fox", "two boats at dusk"][:samples]
    return {"prompt": prompts, "height": case.pixels[0], "width": case.pixels[1], "clip_skip": 1}


def _with(make: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    """A pipeline that is changed after it is built."""

    def build(case: Case) -> Any:
        pipe = make(case)
        change(pipe)
        return pipe

    return build


def _freeu(pipe: Any) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


_SD, _XL = "StableDiffusion", "StableDiffusionXL"
_IMAGE = {"image": image, "strength": 0.7, "num_inference_steps": 3}
_INPAINT = {"image": image, "mask_image": mask, "strength": 0.9, "num_inference_steps": 3}
_UP = {"layers": "up", "modules": ("up_blocks.*",)}
_EVERY = {"layers": ["down", "mid", "up"], "modules": ("*",)}
_FIRST = {"layers": "d0", "modules": ("down_blocks.0.attentions.0.transformer_blocks.0.*",)}
_V = {"prediction_type": "v_prediction"}
_PLAIN = with_options()
_FEW = {"scales": (None, 1.0)}


def _sd2(**options: Any) -> Any:
    return unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True, **options)


def _refiner() -> Any:
    """No attention at the innermost level, but in the middle; five numbers about the picture, not six."""
    return unet_xl(
        ids=5,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        transformer_layers_per_block=2,
    )


def _ssd() -> Any:
    """SSD-1B: transformers of different depths on the way up, and none in the middle."""
    return unet_xl(
        layers_per_block=2,
        transformer_layers_per_block=[1, [2, 1]],
        reverse_transformer_layers_per_block=[[1, 2, 1], 1],
        mid_block_type="UNetMidBlock2D",
    )


CASES = {
    "sd1": Case(f"{_SD}Pipeline", _of(unet), _PLAIN, **_EVERY),
    "sd1-odd-sizes": Case(f"{_SD}Pipeline", _of(unet, block_out_channels=(8, 16, 16)), _PLAIN, "mid", size=(12, 20)),
    "sd1-images-per-prompt": Case(f"{_SD}Pipeline", _of(unet), with_options(num_images_per_prompt=2), **_FIRST),
    "sd1-clip-skip": Case(f"{_SD}Pipeline", _of(unet, parts=_text_encoder, cross_attention_dim=32), _prompts),
    "sd1-freeu": Case(f"{_SD}Pipeline", _with(_of(unet), _freeu), _PLAIN, **_UP),
    "sd1-lora-layers": Case(f"{_SD}Pipeline", _with(_of(unet), low_rank), _PLAIN, **_EVERY),
    "sd1-image": Case(f"{_SD}Img2ImgPipeline", _of(unet), with_options(**_IMAGE), **_FIRST),
    "sd1-inpaint-4": Case(f"{_SD}InpaintPipeline", _of(unet), with_options(**_INPAINT)),
    "sd1-inpaint-9": Case(f"{_SD}InpaintPipeline", _of(unet, in_channels=9), with_options(**_INPAINT), **_UP),
    "sd1-lcm": Case(
        "LatentConsistencyModelPipeline",
        _of(unet, lambda: scheduler("LCMScheduler"), time_cond_proj_dim=8),
        with_options(guidance_scale=8.5),
        **_FEW,
    ),
    "sd1-lcm-image": Case(
        "LatentConsistencyModelImg2ImgPipeline",
        _of(unet, lambda: scheduler("LCMScheduler"), time_cond_proj_dim=8),
        with_options(image=image, strength=0.8, num_inference_steps=3, original_inference_steps=50),
        **_FEW,
        **_UP,
    ),
    "sd1-lcm-lora": Case(f"{_SD}Pipeline", _of(unet, lambda: scheduler("LCMScheduler")), _PLAIN),
    "sd2": Case(f"{_SD}Pipeline", _of(_sd2, lambda: scheduler(**_V)), _PLAIN, **_EVERY),
    "sd2-inpaint-9": Case(f"{_SD}InpaintPipeline", _of(_sd2, in_channels=9), with_options(**_INPAINT)),
    "sd2-depth": Case(
        f"{_SD}Depth2ImgPipeline", _of(_sd2, in_channels=5), with_options(**_IMAGE, depth_map=depth), **_UP
    ),
    "sd2-upscale": Case(
        f"{_SD}UpscalePipeline",
        _of(
            _sd2,
            lambda: scheduler(**_V),
            lambda _: {"low_res_scheduler": diffusers.DDPMScheduler()},
            in_channels=7,
            num_class_embeds=1000,
        ),
        with_options(image=lambda case, samples, cfg: image(case, samples, cfg, case.size), noise_level=20),
    ),
    "sdxl": Case(f"{_XL}Pipeline", _of(unet_xl), _PLAIN, **_EVERY),
    "sdxl-turbo": Case(
        f"{_XL}Pipeline",
        _of(unet_xl, lambda: scheduler("EulerAncestralDiscreteScheduler", timestep_spacing="trailing")),
        _PLAIN,
        steps=1,
        scales=(None, 0.0),
    ),
    "sdxl-lcm": Case(
        f"{_XL}Pipeline",
        _of(unet_xl, lambda: scheduler("LCMScheduler"), time_cond_proj_dim=8),
        with_options(guidance_scale=8.0),
        **_FEW,
        **_UP,
    ),
    "sdxl-image": Case(f"{_XL}Img2ImgPipeline", _of(unet_xl), with_options(**_IMAGE), **_UP),
    "sdxl-inpaint-9": Case(f"{_XL}InpaintPipeline", _of(unet_xl, in_channels=9), with_options(**_INPAINT)),
    "sdxl-refiner": Case(
        f"{_XL}Img2ImgPipeline",
        _of(_refiner, parts=lambda _: {"requires_aesthetics_score": True}),
        with_options(**_IMAGE, aesthetic_score=6.0),
        size=(16, 24),
        **_EVERY,
    ),
    "kolors": Case(
        "KolorsPipeline",
        _of(
            unet_xl, lambda: scheduler("EulerDiscreteScheduler"), encoder_hid_dim_type="text_proj", encoder_hid_dim=24
        ),
        _PLAIN,
        **_UP,
    ),
    "kolors-image": Case("KolorsImg2ImgPipeline", _of(unet_xl), with_options(**_IMAGE)),
    "ssd-1b": Case(f"{_XL}Pipeline", _of(_ssd), _PLAIN, **_UP),
    "bk-sdm-tiny": Case(f"{_SD}Pipeline", _of(unet, mid_block_type=None), _PLAIN, **_FIRST),
    "sd1-controlnet": Case(
        f"{_SD}ControlNetPipeline", _of(unet, parts=controlnet), with_options(image=image), **_FIRST
    ),
    "sd1-controlnet-guess": Case(
        f"{_SD}ControlNetPipeline", _of(unet, parts=controlnet), with_options(image=image, guess_mode=True)
    ),
    "sd1-controlnets": Case(
        f"{_SD}ControlNetPipeline",
        _of(unet, parts=lambda model: controlnet(model, 2)),
        with_options(image=controls, controlnet_conditioning_scale=[1.0, 0.5], control_guidance_end=[0.5, 1.0]),
        **_UP,
    ),
    "sd1-controlnet-image": Case(
        f"{_SD}ControlNetImg2ImgPipeline",
        _of(unet, parts=controlnet),
        with_options(**_IMAGE, control_image=image),
        **_FIRST,
    ),
    "sd1-controlnet-inpaint": Case(
        f"{_SD}ControlNetInpaintPipeline",
        _of(unet, parts=controlnet, in_channels=9),
        with_options(**_INPAINT, control_image=image),
    ),
    "sdxl-controlnet": Case(f"{_XL}ControlNetPipeline", _of(unet_xl, parts=controlnet), with_options(image=image)),
    "sdxl-controlnet-guess": Case(
        f"{_XL}ControlNetPipeline", _of(unet_xl, parts=controlnet), with_options(image=image, guess_mode=True), **_UP
    ),
    "sdxl-controlnet-union": Case(
        f"{_XL}ControlNetUnionPipeline",
        _of(unet_xl, parts=controlnet_union),
        with_options(control_image=controls, control_mode=[0, 3]),
        **_EVERY,
    ),
    "sdxl-controlnet-union-guess": Case(
        f"{_XL}ControlNetUnionPipeline",
        _of(unet_xl, parts=controlnet_union),
        with_options(control_image=controls, control_mode=[1, 2], guess_mode=True),
    ),
    "sd1-adapter": Case(f"{_SD}AdapterPipeline", _of(unet, parts=adapter), with_options(image=image), **_EVERY),
    "sd1-adapters": Case(
        f"{_SD}AdapterPipeline",
        _of(unet, parts=lambda model: adapter(model, 2)),
        with_options(image=controls, adapter_conditioning_scale=[0.8, 0.5]),
    ),
    "sdxl-adapter": Case(
        f"{_XL}AdapterPipeline",
        _of(unet_xl, parts=adapter),
        with_options(image=image, adapter_conditioning_factor=0.5),
        **_UP,
    ),
    "sd1-ip-adapter": Case(
        f"{_SD}Pipeline", _with(_of(unet), ip_adapter), with_options(ip_adapter_image_embeds=image_embeds), **_UP
    ),
    "sdxl-ip-adapter-masks": Case(
        f"{_XL}Pipeline",
        _with(_of(unet_xl), ip_adapter),
        with_options(ip_adapter_image_embeds=two_image_embeds, cross_attention_kwargs=image_masks),
        **_EVERY,
    ),
}

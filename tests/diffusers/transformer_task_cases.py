# SPDX-License-Identifier: Apache-2.0
"""Tasks other than text to image on the small transformers: image to image, inpainting, edits, ControlNets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers

from tests.diffusers.transformer_cases import (
    HEAD_DIM,
    HEADS,
    MODELS,
    WIDTH,
    TransformerCase,
    cogvideox,
    flux2,
    hunyuan_video,
    pipeline,
)


def _vae(channels: int = 4) -> Any:
    torch.manual_seed(20)
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=2,
        shift_factor=0.1,
        scaling_factor=1.2,
    ).eval()


def _video_vae() -> Any:
    torch.manual_seed(21)
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": [0.1, 0.0, -0.1, 0.0], "latents_std": [1.0, 1.1, 0.9, 1.0]}
    return diffusers.AutoencoderKLWan(**sizes, **statistics, temperal_downsample=[False, True, True]).eval()


def _qwen_vae() -> Any:
    torch.manual_seed(27)
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    statistics = {"latents_mean": [0.1, 0.0, -0.1, 0.0], "latents_std": [1.0, 1.1, 0.9, 1.0]}
    return diffusers.AutoencoderKLQwenImage(**sizes, **statistics, temperal_downsample=[False, True, True]).eval()


def picture(samples: int, height: int, width: int) -> torch.Tensor:
    """Return pixels in [0, 1]."""
    return torch.rand(samples, 3, height, width, generator=torch.Generator().manual_seed(30))


def _with(kind: type, build: Callable[[], Any], **parts: Any) -> Any:
    """Return another pipeline with the components of one."""
    components = {**build().components, **parts}
    for name in ("image_encoder", "feature_extractor"):  # a few pipelines do not have these
        if components.get(name, 0) is None:
            del components[name]
    pipe = kind(**components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def task(base: str, kind: str, call: Callable[[int, int, int], dict[str, Any]], **changes: Any) -> TransformerCase:
    """Return a task of a model: its pipeline class, and call arguments in addition to the model's own."""
    model = MODELS[base]
    parts = changes.pop("parts", dict)
    build = changes.pop("build", model.build)
    without = changes.pop("without", ())
    factor = model.factor

    def arguments(rows: int, columns: int, samples: int, cfg: bool) -> dict[str, Any]:
        given = model.call(rows, columns, samples, cfg) | call(samples, rows * factor, columns * factor)
        return {name: value for name, value in given.items() if name not in without}

    return replace(
        model, name=kind, build=lambda: _with(getattr(diffusers, kind), build, **parts()), call=arguments, **changes
    )


def _flux_control() -> dict[str, Any]:
    torch.manual_seed(22)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "joint_attention_dim": 12}
    net = diffusers.FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, pooled_projection_dim=10, axes_dims_rope=[2, 2, 4], **sizes
    )
    return {"vae": _vae(), "controlnet": _alive(net)}


def _sd3_control() -> dict[str, Any]:
    torch.manual_seed(23)
    sizes = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "joint_attention_dim": 12, "num_layers": 1}
    net = diffusers.SD3ControlNetModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=10,
        pos_embed_max_size=32,
        **sizes,
    )
    return {"vae": _vae(), "controlnet": _alive(net)}


def _alive(net: torch.nn.Module) -> torch.nn.Module:
    for parameter in net.parameters():  # a new ControlNet adds zeros
        if parameter.std() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


def _changed(pipe: Any, **sizes: int) -> Any:
    """Return the pipeline with a transformer of other sizes."""
    config = {name: value for name, value in pipe.transformer.config.items() if name != "_use_default_values"}
    transformer = type(pipe.transformer).from_config(config | sizes).eval()
    return type(pipe)(**{**pipe.components, "transformer": transformer})


def _flux_fill() -> Any:
    """Return a pipeline for latents, the masked image's latents, and a mask of 8 x 8 pixels per latent."""
    pipe = MODELS["flux"].build()
    torch.manual_seed(24)
    return _changed(pipe, in_channels=32 + 256, out_channels=16)


def _sd3_inpainting() -> Any:
    """Return the inpainting pipeline, which requires as many channels as the real model has."""
    pipe = MODELS["sd3.5"].build()
    torch.manual_seed(26)
    return _changed(pipe, in_channels=16, out_channels=16)


def _start(samples: int, height: int, width: int) -> dict[str, Any]:
    return {"image": picture(samples, height, width), "strength": 1.0}


def _mask(samples: int, height: int, width: int) -> dict[str, Any]:
    mask = torch.zeros(samples, 1, height, width)
    mask[..., : width // 2] = 1.0
    return {"image": picture(samples, height, width), "mask_image": mask}


def _video_start(samples: int, height: int, width: int) -> dict[str, Any]:
    return {"image": picture(1, height, width)}


def _wan_i2v() -> Any:
    """Return a pipeline for latents, a mask of 4 channels and the first frame's latents."""
    pipe = MODELS["wan"].build()
    torch.manual_seed(25)
    return _changed(pipe, in_channels=4 + 4 + 4)


def _chroma_inpainting() -> Any:
    """Return a pipeline whose transformer has a setting that diffusers' inpainting pipeline reads from checkpoints."""
    pipe = MODELS["chroma"].build()
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe


def _hunyuan_video_vae() -> Any:
    torch.manual_seed(29)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return vae.eval()


def _hunyuan_i2v(condition: str, channels: int) -> Callable[[], Any]:
    """Return a function that builds a pipeline for images as additional channels, or as the first frame."""
    return lambda: hunyuan_video(in_channels=channels, image_condition_type=condition)


def _framepack() -> Any:
    torch.manual_seed(31)
    model = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=12,
        pooled_projection_dim=10,
        rope_axes_dim=(2, 2, 4),
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=16, patch_size=8, **sizes))
    parts = {
        "vae": _hunyuan_video_vae(),
        "image_encoder": encoder.eval(),
        "feature_extractor": transformers.SiglipImageProcessor(size={"height": 16, "width": 16}),
    }
    return pipeline(
        diffusers.HunyuanVideoFramepackPipeline, model, diffusers.FlowMatchEulerDiscreteScheduler(), **parts
    )


def _cogvideox_vae() -> Any:
    torch.manual_seed(32)
    vae = diffusers.AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    return vae.eval()


def _clip(frames: int, height: int, width: int) -> list[Any]:
    """Return the frames of a video as PIL images."""
    images = picture(frames, height, width).permute(0, 2, 3, 1).mul(255).byte().numpy()
    return [PIL.Image.fromarray(image) for image in images]


TASKS = {
    "sd3 img2img": task("sd3", "StableDiffusion3Img2ImgPipeline", _start, parts=lambda: {"vae": _vae()}),
    "sd3 inpainting": task(
        "sd3.5",
        "StableDiffusion3InpaintPipeline",
        lambda *a: _mask(*a) | {"strength": 1.0},
        build=_sd3_inpainting,
        parts=lambda: {"vae": _vae(16)},
    ),
    "sd3 ControlNet": task(
        "sd3", "StableDiffusion3ControlNetPipeline", lambda *a: {"control_image": picture(*a)}, parts=_sd3_control
    ),
    "flux img2img": task("flux", "FluxImg2ImgPipeline", _start, parts=lambda: {"vae": _vae()}),
    "flux inpainting": task(
        "flux", "FluxInpaintPipeline", lambda *a: _mask(*a) | {"strength": 1.0}, parts=lambda: {"vae": _vae()}
    ),
    "flux ControlNet": task(
        "flux", "FluxControlNetPipeline", lambda *a: {"control_image": picture(*a)}, parts=_flux_control
    ),
    "flux Kontext": task(
        "flux",
        "FluxKontextPipeline",
        lambda _, height, width: {"image": picture(1, 64, 32), "_auto_resize": False, "max_area": height * width},
        parts=lambda: {"vae": _vae()},
    ),
    "flux Fill": task(
        "flux",
        "FluxFillPipeline",
        _mask,
        build=_flux_fill,
        without=("true_cfg_scale",),
        parts=lambda: {"vae": _vae()},
    ),
    "pixart-alpha": task("pixart-sigma", "PixArtAlphaPipeline", lambda *_: {}),
    "qwen img2img": task("qwen-image", "QwenImageImg2ImgPipeline", _start, parts=lambda: {"vae": _qwen_vae()}),
    "wan image to video": task(
        "wan",
        "WanImageToVideoPipeline",
        _video_start,
        build=_wan_i2v,
        parts=lambda: {"vae": _video_vae(), "image_encoder": None, "image_processor": None},
    ),
    "chroma img2img": task("chroma", "ChromaImg2ImgPipeline", _start, parts=lambda: {"vae": _vae()}),
    "chroma inpainting": task(
        "chroma",
        "ChromaInpaintPipeline",
        lambda *a: _mask(*a) | {"strength": 1.0},
        build=_chroma_inpainting,
        parts=lambda: {"vae": _vae()},
    ),
    "flux2": task("flux2-klein", "Flux2Pipeline", lambda *_: {}, build=lambda: flux2(guidance_embeds=True)),
    "flux2 editing": task(
        "flux2-klein",
        "Flux2Pipeline",
        lambda *_: {"image": _clip(1, 64, 80)},
        build=lambda: flux2(guidance_embeds=True),
    ),
    "flux2-klein editing": task("flux2-klein", "Flux2KleinPipeline", lambda *_: {"image": _clip(2, 64, 80)}),
    "flux2-klein inpainting": task(
        "flux2-klein",
        "Flux2KleinInpaintPipeline",
        lambda *a: _mask(*a) | {"strength": 1.0, "image_reference": picture(1, 48, 32)},
    ),
    "flux2-klein-kv": task("flux2-klein", "Flux2KleinKVPipeline", lambda *_: {}, without=("guidance_scale",)),
    "hunyuan-video image to video": task(
        "hunyuan-video",
        "HunyuanVideoImageToVideoPipeline",
        _video_start,
        build=_hunyuan_i2v("latent_concat", 4 + 4 + 1),
        parts=lambda: {"vae": _hunyuan_video_vae(), "image_processor": None},
    ),
    "hunyuan-video first frame": task(
        "hunyuan-video",
        "HunyuanVideoImageToVideoPipeline",
        _video_start,
        build=_hunyuan_i2v("token_replace", 4),
        parts=lambda: {"vae": _hunyuan_video_vae(), "image_processor": None},
    ),
    "skyreels": task(
        "hunyuan-video",
        "HunyuanSkyreelsImageToVideoPipeline",
        _video_start,
        build=lambda: hunyuan_video(in_channels=4 + 4),
        parts=lambda: {"vae": _hunyuan_video_vae()},
    ),
    "framepack": task(
        "hunyuan-video",
        "HunyuanVideoFramepackPipeline",
        lambda *a: _video_start(*a) | {"latent_window_size": 3},
        build=_framepack,
        start=2 * 6 * 4 + 1 * 3 * 2 + 4 * 2 * 1,  # the frames before, with patches of 2, 4 and 8 latents
        sequence=("transformer_blocks", "single_transformer_blocks"),
    ),
    "cogvideox image to video": task(
        "cogvideox",
        "CogVideoXImageToVideoPipeline",
        _video_start,
        build=lambda: cogvideox(in_channels=4 + 4, patch_size_t=2, ofs_embed_dim=8, patch_bias=False),
        parts=lambda: {"vae": _cogvideox_vae()},
        frames=2,
    ),
    "cogvideox video to video": task(
        "cogvideox",
        "CogVideoXVideoToVideoPipeline",
        lambda _, height, width: {"video": _clip(9, height, width), "strength": 1.0},
        without=("num_frames",),
        parts=lambda: {"vae": _cogvideox_vae()},
    ),
    "cogvideox control": task(
        "cogvideox",
        "CogVideoXFunControlPipeline",
        lambda _, height, width: {"control_video": _clip(9, height, width)},
        build=lambda: cogvideox(in_channels=4 + 4),
        without=("num_frames",),
        parts=lambda: {"vae": _cogvideox_vae()},
    ),
}
# Pipelines without a negative prompt: guidance is distilled into the model.
DISTILLED = ("flux Fill", "flux2", "flux2 editing", "flux2-klein-kv")

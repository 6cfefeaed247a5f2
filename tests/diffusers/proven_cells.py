# SPDX-License-Identifier: Apache-2.0
"""Names of the test cases of other modules in the tables of docs/models.md."""

from __future__ import annotations

import pytest

from tests.compatibility import proves

TRANSFORMERS = {
    "sd3": "Stable Diffusion 3",
    "sd3.5": "Stable Diffusion 3.5",
    "flux": "Flux.1",
    "qwen-image": "Qwen-Image",
    "z-image": "Z-Image",
    "pixart-sigma": "PixArt-Sigma",
    "hunyuan-dit": "Hunyuan-DiT",
    "chroma": "Chroma",
    "flux2-klein": "Flux.2 Klein",
    "lumina2": "Lumina 2",
}
VIDEO = {"wan": "Wan", "ltx-video": "LTX-Video", "hunyuan-video": "HunyuanVideo", "cogvideox": "CogVideoX"}

# By the prefix of a case's name; the longest match is used.
UNETS = {
    "sd1": "Stable Diffusion 1",
    "sd1-lcm": "Latent Consistency Model",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sdxl-lcm": "Latent Consistency Model XL",
    "sdxl-turbo": "Stable Diffusion XL Turbo",
    "sdxl-refiner": "Stable Diffusion XL refiner",
    "kolors": "Kolors",
    "ssd-1b": "SSD-1B",
    "bk-sdm-tiny": "BK-SDM Tiny",
    "animatediff": "AnimateDiff",
    "animatediff-xl": "AnimateDiff XL",
}
# By a substring of the name of a case or pipeline; the first match is used.
TASKS = {
    "ip-adapter": "IP-Adapter",
    "ControlNet": "ControlNet",
    "Adapter": "T2I-Adapter",
    "Inpaint": "inpainting",
    "Depth2Img": "depth to image",
    "Img2Img": "image to image",
    "Upscale": "upscaling",
    "VideoToVideo": "video to video",
    "AnimateDiff": "text to video",
    "Pipeline": "text to image",
}


def of_transformer(name: str, **more: str | tuple[str, ...]) -> pytest.MarkDecorator:
    """Return what a test of text to image or video proves for a case in ``transformer_cases``."""
    if name in VIDEO:
        return proves(**{"group": "Video", "model": VIDEO[name], "task": "text to video", **more})
    return proves(**{"group": "Transformers", "model": TRANSFORMERS[name], "task": "text to image", **more})


def of_unet(name: str, pipeline: str, **more: str | tuple[str, ...]) -> pytest.MarkDecorator:
    """Return what a test proves for a case in ``unet_image_cases`` or ``unet_video_cases`` with this pipeline class."""
    model = max((prefix for prefix in UNETS if f"{name}-".startswith(f"{prefix}-")), key=len)
    task = next(TASKS[word] for word in TASKS if word in name or word in pipeline)
    group = "Video" if model.startswith("animatediff") else "UNets"
    return proves(group=group, model=UNETS[model], task=task, **more)

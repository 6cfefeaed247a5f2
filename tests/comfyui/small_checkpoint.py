# SPDX-License-Identifier: Apache-2.0
"""A checkpoint file that ComfyUI's loaders recognise as Stable Diffusion 1.5: few layers, random weights.

The text encoder has full size, because ComfyUI does not read its size from the file.
"""

from __future__ import annotations

from pathlib import Path

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.sd1_clip
import comfy.taesd.taesd
import torch
from safetensors.torch import save_file

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "legacy": False,
}


def write_checkpoint(path: Path) -> None:
    """Write the checkpoint; about 300 MB."""
    operations = comfy.ops.disable_weight_init
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(**_UNET, operations=operations)
    text = comfy.sd1_clip.SDClipModel(device="cpu", dtype=torch.float16)
    parts = {
        "model.diffusion_model.": unet.state_dict(),
        "cond_stage_model.": text.state_dict(),
        "first_stage_model.": comfy.taesd.taesd.TAESD().state_dict(),
    }
    generator = torch.Generator().manual_seed(0)
    weights = {prefix + name: _weight(name, w, generator) for prefix, part in parts.items() for name, w in part.items()}
    save_file(weights, path)


def _weight(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return random values with a scale that keeps activations of order one."""
    if not like.is_floating_point() or like.ndim == 0:
        return like.clone()
    if like.ndim == 1:
        return torch.zeros(like.shape, dtype=torch.float16) if name.endswith("bias") else torch.ones_like(like).half()
    scale = 0.02 if "embedding" in name else like[0].numel() ** -0.5
    return (torch.randn(like.shape, generator=generator) * scale).half()

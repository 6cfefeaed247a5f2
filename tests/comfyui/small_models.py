# SPDX-License-Identifier: Apache-2.0
"""Small models of ComfyUI's classes with random weights, and runs of its samplers on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

CPU = torch.device("cpu")
_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "context_dim": 16,
    "use_spatial_transformer": True,
    "legacy": False,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd15": (
        "SD15",
        _UNET
        | {
            "transformer_depth": [1, 1],
            "transformer_depth_output": [1, 1, 1, 1],
            "transformer_depth_middle": 1,
            "num_heads": 4,
            "num_head_channels": -1,
            "use_linear_in_transformer": False,
            "adm_in_channels": None,
        },
    ),
    "sdxl": (
        "SDXL",
        _UNET
        | {
            "transformer_depth": [0, 2],
            "transformer_depth_output": [0, 0, 2, 2],
            "transformer_depth_middle": 3,
            "num_heads": -1,
            "num_head_channels": 16,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 24 + 6 * 256,
        },
    ),
    "flux": (
        "Flux",
        {
            "image_model": "flux",
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "vec_in_dim": 24,
            "context_in_dim": 16,
            "hidden_size": 64,
            "mlp_ratio": 2.0,
            "num_heads": 4,
            "depth": 3,
            "depth_single_blocks": 3,
            "axes_dim": [4, 6, 6],
            "theta": 10000,
            "qkv_bias": True,
            "guidance_embed": True,
            "txt_ids_dims": [],
        },
    ),
    "sd3": (
        "SD3",
        {
            "in_channels": 16,
            "patch_size": 2,
            "depth": 4,
            "num_blocks": 4,
            "input_size": None,
            "adm_in_channels": 24,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 16, "out_features": 256},
            },
            "num_patches": 4096,
            "pos_embed_max_size": 64,
            "pos_embed_scaling_factor": None,
            "qk_norm": "rms",
            "x_block_self_attn_layers": [0, 1],
        },
    ),
    "qwen": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 16,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "wan": (
        "WAN21_T2V",
        {
            "image_model": "wan2.1",
            "model_type": "t2v",
            "patch_size": (1, 2, 2),
            "text_len": 8,
            "in_dim": 16,
            "dim": 64,
            "ffn_dim": 128,
            "freq_dim": 32,
            "text_dim": 16,
            "out_dim": 16,
            "num_heads": 4,
            "num_layers": 3,
        },
    ),
    "lumina": (
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 64,
            "cap_feat_dim": 16,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 4,
            "n_kv_heads": 4,
            "qk_norm": True,
            "axes_dims": [4, 6, 6],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 1.0,
        },
    ),
}
POOLED = {"sdxl": 24, "flux": 24, "sd3": 24}
FRAMES = {"wan": 3}
IN_FIVE = ("wan", "qwen")


def make_model(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """Return a patcher of a small model with far from uniform attention and an optionally changed configuration."""
    kind, config = CONFIGS[name]
    description = getattr(comfy.supported_models, kind)(config | changes)
    description.set_inference_dtype(dtype, None)
    description.custom_operations = None
    torch.manual_seed(0)
    model = description.get_model({}, "", device=CPU)
    for parameter_name, parameter in model.diffusion_model.named_parameters():
        parameter.requires_grad_(False)
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.05)
        else:  # gains of norms
            torch.nn.init.normal_(parameter, mean=1.0, std=0.05)
        if any(part in parameter_name for part in ("to_q", "to_k", "qkv", "q_proj", "k_proj", ".q.", ".k.")):
            parameter.mul_(2.0)
    for buffer_name, buffer in model.diffusion_model.named_buffers():
        if buffer_name == "pos_embed":  # ComfyUI expects a checkpoint to fill this
            torch.nn.init.normal_(buffer, std=0.5)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def latents(name: str, height: int = 10, width: int = 14, batch: int = 2) -> torch.Tensor:
    """Return noise in the shape of a model's latents."""
    channels = CONFIGS[name][1].get("in_channels", 4)
    channels = 16 if name in ("qwen", "wan") else channels
    generator = torch.Generator().manual_seed(1)
    frames = (FRAMES.get(name, 1),) if name in IN_FIVE else ()
    return torch.randn((batch, channels, *frames, height, width), generator=generator)


def conditioning(name: str, seed: int, tokens: int = 5, **options: Any) -> list[list[Any]]:
    """Return conditioning in the form of a text encoder's output."""
    generator = torch.Generator().manual_seed(seed)
    entries: dict[str, Any] = dict(options)
    if name in POOLED:
        entries["pooled_output"] = torch.randn(1, POOLED[name], generator=generator)
    return [[torch.randn(1, tokens, 16, generator=generator), entries]]


def sample(
    model: Any,
    name: str,
    cfg: float = 4.0,
    steps: int = 3,
    sampler: str = "euler",
    scheduler: str = "simple",
    positive: Any = None,
    negative: Any = None,
    noise: torch.Tensor | None = None,
    latent: torch.Tensor | None = None,
    denoise: float = 1.0,
    **options: Any,
) -> torch.Tensor:
    """Return the latents of ComfyUI's KSampler."""
    noise = latents(name) if noise is None else noise
    latent = torch.zeros_like(noise) if latent is None else latent
    positive = conditioning(name, 2) if positive is None else positive
    negative = conditioning(name, 3) if negative is None else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, denoise=denoise,
        disable_pbar=True, seed=4, **options,
    )  # fmt: skip


@contextmanager
def forwards(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collect the outputs of all forward passes of the denoiser, in its own dtype."""
    outputs: list[torch.Tensor] = []
    handle = model.model.diffusion_model.register_forward_hook(lambda *given: outputs.append(given[-1].detach()))
    try:
        yield outputs
    finally:
        handle.remove()


def relative(x: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference divided by the largest expected value."""
    return float((x - expected).abs().max() / expected.abs().max())

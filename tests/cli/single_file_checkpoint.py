# SPDX-License-Identifier: Apache-2.0
"""Conversion of a diffusers SDXL checkpoint to a single file in the original layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Weights = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_ENDS = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write_single_file(folder: Path, out: Path) -> None:
    """Write the checkpoint in ``folder`` to the file ``out`` in the layout of the original SDXL release."""
    unet = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    per_block = json.loads((folder / "unet" / "config.json").read_text())["layers_per_block"]
    vae = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    clip = _without_wrapper(load_file(folder / "text_encoder" / "model.safetensors"))
    open_clip = _without_wrapper(load_file(folder / "text_encoder_2" / "model.safetensors"))
    parts = {
        "model.diffusion_model.": {_unet_key(key, per_block, unet): value for key, value in unet.items()},
        "first_stage_model.": _vae(vae),
        "conditioner.embedders.0.transformer.text_model.": clip,
        "conditioner.embedders.1.model.": _open_clip(open_clip),
    }
    whole = {prefix + key: value.contiguous() for prefix, part in parts.items() for key, value in part.items()}
    save_file(whole, out)


def _unet_key(key: str, per_block: int, unet: Weights) -> str:
    for old, new in _UNET_ENDS.items():
        if key.startswith(f"{old}."):
            return key.replace(old, new, 1)
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key):
        position = 2 * int(match[2]) + (match[1] == "attentions")
        return f"middle_block.{position}.{_resnet(match[3]) if match[1] == 'resnets' else match[3]}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key)
    assert match, key
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if side == "down":
        first = 1 + block * (per_block + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + per_block}.0.{rest.replace('conv', 'op', 1)}"
        place = f"input_blocks.{first + index}"
    else:
        first = block * (per_block + 1)
        if kind == "upsamplers":
            attends = any(name.startswith(f"up_blocks.{block}.attentions.") for name in unet)
            return f"output_blocks.{first + per_block}.{2 if attends else 1}.{rest}"
        place = f"output_blocks.{first + index}"
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def _resnet(rest: str) -> str:
    name, parameter = rest.rsplit(".", 1)
    return f"{_RESNET[name]}.{parameter}"


def _vae(vae: Weights) -> Weights:
    levels = 1 + max(int(key.split(".")[2]) for key in vae if key.startswith("decoder.up_blocks."))
    out: Weights = {}
    for key, value in vae.items():
        if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(\w+)", key):
            name = _VAE_ATTENTION[match[2]]
            # The original attention uses 1x1 convolutions.
            convolution = name != "norm" and match[3] == "weight"
            out[f"{match[1]}.mid.attn_1.{name}.{match[3]}"] = value[:, :, None, None] if convolution else value
            continue
        key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        key = re.sub(r"down_blocks\.(\d+)", r"down.\1", key)
        key = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", key)
        key = key.replace(".resnets.", ".block.").replace(".conv_shortcut.", ".nin_shortcut.")
        key = key.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")
        out[key.replace("conv_norm_out", "norm_out")] = value
    return out


def _open_clip(clip: Weights) -> Weights:
    out: Weights = {new: clip[old] for old, new in _OPEN_CLIP_ENDS.items()}
    out["text_projection"] = clip["text_projection.weight"].T
    for key, value in clip.items():
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.*)\.(weight|bias)", key)
        if not match:
            continue
        place = f"transformer.resblocks.{match[1]}"
        if match[2] in _OPEN_CLIP_LAYER:
            out[f"{place}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}"] = value
        elif match[2] == "self_attn.q_proj":
            packed = [clip[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            out[f"{place}.attn.in_proj_{match[3]}"] = torch.cat(packed)
    return out


def _without_wrapper(clip: Weights) -> Weights:
    """Remove the prefix ``text_model.``, which only some transformers releases write."""
    return {key.removeprefix("text_model."): value for key, value in clip.items()}

# SPDX-License-Identifier: Apache-2.0
"""How much of a denoiser's work each self-attention layer is, counted without data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNetMotionModel
from torch.utils.flop_counter import FlopCounterMode

from segkern.grid import Grid
from segkern.integrations.diffusers.models.layers import UNETS, find_model, latent_size, list_layers

_CLIP = 77  # tokens of a prompt where nothing else is known


def flop_shares(
    pipe: object, height: int, width: int, frames: int | None = None, text: int | None = None
) -> dict[str, float] | None:
    """Each self-attention layer's share of the floating-point operations of one forward, by module name.

    Matrix products and convolutions of a forward for one sample are counted, on a copy of the denoiser without data.
    A layer's are those of its attention module: the projections in it, which in a joint attention are of the text
    too, and the two products with queries, keys and values.

    Args:
        pipe: as :func:`~segkern.integrations.diffusers.list_layers` takes it for grids.
        height: of the image in pixels.
        width: of the image in pixels.
        frames: pictures in a video.
        text: tokens of the prompt that attention gets; if not given, as many as the pipeline takes at most, or 77.

    Returns:
        None for a denoiser whose other inputs are not known.

    Raises:
        ValueError: as ``list_layers``.
    """
    layers = list_layers(pipe, height, width, frames)
    inputs = _inputs(pipe, height, width, frames, _text(pipe) if text is None else text)
    if inputs is None:
        return None
    kind: Any = type(find_model(pipe))
    with torch.device("meta"):
        model = kind.from_config(find_model(pipe).config).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    total = counter.get_total_flops()
    counts = counter.get_flop_counts()
    return {layer.module: sum(counts[f"{kind.__name__}.{layer.module}"].values()) / total for layer in layers}


@dataclass(frozen=True)
class _Size:
    """Of the inputs: latents ``[frames, height, width]``, their tokens, and tokens of text."""

    frames: int
    height: int
    width: int
    grid: Grid
    text: int


def _text(pipe: object) -> int:
    """Tokens of a prompt at most, if the pipeline's call says so."""
    taken = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
    most = taken["max_sequence_length"].default if "max_sequence_length" in taken else None
    if not isinstance(most, int):
        return _CLIP
    both = type(find_model(pipe)).__name__ == "SD3Transformer2DModel"  # T5's and CLIP's, one after the other
    return most + _CLIP if both else most


def _inputs(pipe: object, height: int, width: int, frames: int | None, text: int) -> dict[str, Any] | None:
    model: Any = find_model(pipe)
    latent_frames, latent_height, latent_width = latent_size(pipe, height, width, frames)
    if isinstance(model, UNETS):
        size = (latent_frames,) if isinstance(model, UNetMotionModel) else ()
        return _unet(model, (*size, latent_height, latent_width), text)
    make = _TRANSFORMERS.get(type(model).__name__)
    if make is None:
        return None
    grid = list_layers(pipe, height, width, frames)[0].grid
    assert grid is not None
    with torch.device("meta"):
        return make(model, _Size(latent_frames, latent_height, latent_width, grid, text))


def _unet(unet: Any, size: tuple[int, ...], text: int) -> dict[str, Any] | None:
    config, frames = unet.config, size[0] if len(size) == 3 else 1
    channels = config.get("encoder_hid_dim") or config.cross_attention_dim
    projected = config.get("encoder_hid_dim_type") in (None, "text_proj")
    if not isinstance(channels, int) or not projected or config.addition_embed_type not in (None, "text_time"):
        return None
    given: dict[str, Any] = {
        "sample": torch.empty(1, config.in_channels, *size, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(frames, text, channels, device="meta"),  # of a video one for each
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, device="meta"),
            "time_ids": torch.empty(1, 6, device="meta"),
        }
    if getattr(unet, "class_embedding", None) is not None:
        if config.class_embed_type is not None:
            return None
        given["class_labels"] = torch.empty(1, dtype=torch.long, device="meta")
    return given


def _sd3(model: Any, size: _Size) -> dict[str, Any]:
    return {
        **_image(model, size),
        "encoder_hidden_states": torch.empty(1, size.text, model.config.joint_attention_dim),
        "pooled_projections": torch.empty(1, model.config.pooled_projection_dim),
    }


def _flux(model: Any, size: _Size) -> dict[str, Any]:
    config = model.config
    return {
        **_packed(model, size),
        "encoder_hidden_states": torch.empty(1, size.text, config.joint_attention_dim),
        "pooled_projections": torch.empty(1, config.pooled_projection_dim),
        "img_ids": torch.empty(size.grid.tokens, 3),
        "txt_ids": torch.empty(size.text, 3),
        "guidance": torch.empty(1) if config.guidance_embeds else None,
    }


def _qwen(model: Any, size: _Size) -> dict[str, Any]:
    return {
        **_packed(model, size),
        "encoder_hidden_states": torch.empty(1, size.text, model.config.joint_attention_dim),
        "encoder_hidden_states_mask": torch.empty(1, size.text, dtype=torch.long),
        "img_shapes": [[(1, size.grid.height, size.grid.width)]],
    }


def _z_image(model: Any, size: _Size) -> dict[str, Any]:
    image = torch.empty(model.config.in_channels, 1, size.height, size.width)
    return {"x": [image], "t": torch.empty(1), "cap_feats": [torch.empty(size.text, model.config.cap_feat_dim)]}


def _pixart(model: Any, size: _Size) -> dict[str, Any]:
    known = model.use_additional_conditions
    return {
        **_image(model, size),
        "encoder_hidden_states": torch.empty(1, size.text, model.config.caption_channels),
        "added_cond_kwargs": {
            "resolution": torch.empty(1, 2) if known else None,
            "aspect_ratio": torch.empty(1, 1) if known else None,
        },
    }


def _hunyuan_dit(model: Any, size: _Size) -> dict[str, Any]:
    config = model.config
    tokens, channels = size.grid.tokens, config.attention_head_dim
    return {
        **_image(model, size),
        "encoder_hidden_states": torch.empty(1, config.text_len, config.cross_attention_dim),
        "text_embedding_mask": torch.empty(1, config.text_len),
        "encoder_hidden_states_t5": torch.empty(1, config.text_len_t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.empty(1, config.text_len_t5),
        "image_meta_size": torch.empty(1, 6),
        "style": torch.empty(1, dtype=torch.long),
        "image_rotary_emb": (torch.empty(tokens, channels), torch.empty(tokens, channels)),
    }


def _wan(model: Any, size: _Size) -> dict[str, Any]:
    config = model.config
    return {
        "hidden_states": torch.empty(1, config.in_channels, size.frames, size.height, size.width),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, size.text, config.text_dim),
    }


def _ltx(model: Any, size: _Size) -> dict[str, Any]:
    return {
        "hidden_states": torch.empty(1, size.grid.tokens, model.config.in_channels),
        "timestep": torch.empty(1),
        "encoder_hidden_states": torch.empty(1, size.text, model.config.caption_channels),
        "encoder_attention_mask": torch.empty(1, size.text),
        "num_frames": size.grid.frames,
        "height": size.grid.height,
        "width": size.grid.width,
    }


def _image(model: Any, size: _Size) -> dict[str, Any]:
    """Latents as they are, and a timestep."""
    return {
        "hidden_states": torch.empty(1, model.config.in_channels, size.height, size.width),
        "timestep": torch.empty(1),
    }


def _packed(model: Any, size: _Size) -> dict[str, Any]:
    """Latents in patches, and a timestep."""
    return {
        "hidden_states": torch.empty(1, size.grid.tokens, model.config.in_channels),
        "timestep": torch.empty(1),
    }


_TRANSFORMERS: Mapping[str, Callable[[Any, _Size], dict[str, Any]]] = {
    "SD3Transformer2DModel": _sd3,
    "FluxTransformer2DModel": _flux,
    "QwenImageTransformer2DModel": _qwen,
    "ZImageTransformer2DModel": _z_image,
    "PixArtTransformer2DModel": _pixart,
    "HunyuanDiT2DModel": _hunyuan_dit,
    "WanTransformer3DModel": _wan,
    "LTXVideoTransformer3DModel": _ltx,
}

# SPDX-License-Identifier: Apache-2.0
"""Descriptions of transformers: their blocks, their image tokens, and how pipelines call them.

An architecture is a set of facts about argument names; :mod:`interception` intercepts the attention itself. Models are
recognised by class name, which requires no import.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Get = Callable[[str], Any]  # returns an argument of the denoiser's forward by name
Size = tuple[int, int, int]  # frames, height and width in tokens
Start = int | tuple[int, ...]  # first image token, the same for all samples or one per sample

_TEXT = frozenset({"hidden_states", "encoder_hidden_states", "temb"})
_JOINT = ("encoder_hidden_states", "hidden_states")  # returned by blocks that process text and image


@dataclass(frozen=True)
class Stage:
    """A list of transformer blocks.

    Attributes:
        blocks: Name of the list in the model.
        attentions: Names of the self-attention modules in a block. A block may lack all but the first.
        letter: First letter of the layers' short names.
        batched: Arguments of a block's forward that have one entry per sample.
        outputs: Arguments that a block returns, in this order.
        sequence: Whether a block's hidden states include the tokens before the image.
    """

    blocks: str
    attentions: tuple[str, ...]
    letter: str = "b"
    batched: frozenset[str] = _TEXT
    outputs: tuple[str, ...] = ("hidden_states",)
    sequence: bool = False


def _first(model: Any, get: Get) -> Start:
    return 0


@dataclass(frozen=True)
class Architecture:
    """A family of transformers.

    Attributes:
        model: Name of the class.
        users: Name of the model family for messages.
        stages: Lists of blocks in execution order.
        sample: Argument with the noisy image.
        batched: Arguments of the model's forward that have one entry per sample.
        size: Function that returns frames, height and width of the image in tokens.
        pixels: Function that returns the side of a token in latent pixels.
        start: Function that returns the first image token in every attention.
        listed: Arguments in ``batched`` that are lists with one item per sample.
        residuals: Arguments that are added between blocks. If one is given, branches join at the input.
        other: Argument that is given only in calls that are not a step of a run.
        prompt: Argument with the prompt embeddings.
        timestep: Argument with the timestep.
        units: Function from the scheduler's timestep to the model's.
        conditional_first: Whether the conditional samples are the first half of a batch with both texts.
        shift: Whether the pipeline's guidance scale is one less than usual, ``c + g (c - u)``.
        rescales: Whether the pipeline always rescales predictions to the norm of the conditional prediction under
            classifier-free guidance.
        default: Default layers, and the source that recommends them.
    """

    model: str
    users: str
    stages: tuple[Stage, ...]
    sample: str
    batched: frozenset[str]
    size: Callable[[Any, Get], Size]
    pixels: Callable[[Any], int]
    start: Callable[[Any, Get], Start] = _first
    listed: frozenset[str] = frozenset()
    residuals: frozenset[str] = frozenset()
    other: str | None = None
    prompt: str = "encoder_hidden_states"
    timestep: str = "timestep"
    units: Callable[[float], float] = float
    conditional_first: bool = False
    shift: bool = False
    rescales: bool = False
    default: tuple[str, str] | None = None


def _of_thousand(timestep: float) -> float:
    return timestep / 1000.0


def _patches(model: Any) -> int:
    return int(model.config.patch_size)


def _image(sample: str) -> Callable[[Any, Get], Size]:
    """Return a size function for latents ``[batch, channels, height, width]`` that are cut into square patches."""

    def size(model: Any, get: Get) -> Size:
        height, width = get(sample).shape[-2:]
        return 1, height // _patches(model), width // _patches(model)

    return size


def _after_text(model: Any, get: Get) -> Start:
    return int(get("encoder_hidden_states").shape[1])


def _after_captions(model: Any, get: Get) -> Start:
    """Return the number of text tokens of each sample, without padding. Synchronises, as the model itself does."""
    lengths = tuple(int(length) for length in get("encoder_attention_mask").sum(dim=1).tolist())
    return lengths[0] if len(set(lengths)) == 1 else lengths


def _after_history(model: Any, get: Get) -> Start:
    """Return the number of tokens of earlier frames, which are patched more coarsely the older they are."""
    tokens = 0
    for name, patch in (
        ("latents_clean", (1, 2, 2)),
        ("latents_history_2x", (2, 4, 4)),
        ("latents_history_4x", (4, 8, 8)),
    ):
        history = get(name)
        if history is not None:
            tokens += math.prod(-(-size // side) for size, side in zip(history.shape[2:], patch, strict=True))
    return tokens


def _position_ids(model: Any, get: Get) -> Size:
    """Return the size of packed latents from the rows of ``img_ids``.

    Rows of the generated image are (0, row, column); rows of other images begin with another number. If the tensor is
    on a GPU, this synchronises once per new tensor.
    """
    ids = get("img_ids")
    ids = ids[0] if ids.ndim == 3 else ids
    rows = ids[ids[:, 0] == ids[0, 0]]
    size = 1, int(rows[:, 1].max()) + 1, int(rows[:, 2].max()) + 1
    if int(ids[0, 0]) != 0 or len(rows) != size[1] * size[2]:
        raise ValueError(
            f"guide cannot read the image grid from img_ids: the first rows have number {int(ids[0, 0])} and "
            f"{len(rows)} rows with a grid of {size[1]} x {size[2]}; Flux numbers the generated image 0"
        )
    return size


def _position_ids_without_cache(model: Any, get: Get) -> Size:
    """Return the size from ``img_ids``. With a cache, reference images have no tokens of their own in most calls."""
    if get("kv_cache_mode") is not None:
        raise ValueError(
            f"guide does not support the key-value cache of a {type(model).__name__}, which stores tokens of reference "
            f"images for the pipeline's own batch; use a pipeline without this cache, such as Flux2KleinPipeline"
        )
    return _position_ids(model, get)


def _shapes(model: Any, get: Get) -> Size:
    """Return the size of the first image of the first sample. The source images of an edit come after it."""
    if getattr(model.config, "use_layer3d_rope", False):
        raise ValueError("guide cannot handle a layered Qwen-Image, which generates several images in one sequence")
    first = get("img_shapes")[0]
    frames, height, width = first if isinstance(first[0], int) else first[0]
    return frames, height, width


def _one_of_a_list(model: Any, get: Get) -> Size:
    """Return the size of latents in a list of ``[channels, frames, height, width]``."""
    images = get("x")
    patch, frame_patch = get("patch_size") or 2, get("f_patch_size") or 1
    frames, height, width = images[0].shape[1:]
    return frames // frame_patch, height // patch, width // patch


def _video_of_patches(model: Any, get: Get) -> Size:
    """Return the size of latents ``[batch, channels, frames, height, width]``, with the patch size in two settings."""
    frames, height, width = get("hidden_states").shape[2:]
    return frames // model.config.patch_size_t, height // _patches(model), width // _patches(model)


def _video_of_images(model: Any, get: Get) -> Size:
    """Return the size of latents ``[batch, frames, channels, height, width]``."""
    frames, _, height, width = get("hidden_states").shape[1:]
    return frames // (model.config.patch_size_t or 1), height // _patches(model), width // _patches(model)


def _video(model: Any, get: Get) -> Size:
    """Return the size of latents ``[batch, channels, frames, height, width]`` that are cut into boxes."""
    frames, height, width = get("hidden_states").shape[2:]
    by_frame, by_row, by_column = model.config.patch_size
    return frames // by_frame, height // by_row, width // by_column


def _told(model: Any, get: Get) -> Size:
    frames, height, width = size = get("num_frames"), get("height"), get("width")
    tokens = get("hidden_states").shape[1]
    if None in size or frames * height * width != tokens:
        raise ValueError(
            f"guide cannot read the grid of {tokens} tokens from num_frames={frames}, height={height}, width={width}: "
            f"the sequence has tokens that are not part of the video, for example conditions at given frames"
        )
    return frames, height, width


_SAMPLES = frozenset({"hidden_states", "encoder_hidden_states", "timestep"})
_CONTROL = frozenset({"controlnet_block_samples", "controlnet_single_block_samples"})


def _hunyuan_video(sequence: bool = False) -> tuple[Stage, Stage]:
    batched = _TEXT | {"attention_mask", "token_replace_emb"}
    outputs = ("hidden_states", "encoder_hidden_states")
    return (
        Stage("transformer_blocks", ("attn",), "b", batched, outputs, sequence),
        Stage("single_transformer_blocks", ("attn",), "s", batched, outputs, sequence),
    )


_ALL = (
    Architecture(
        "SD3Transformer2DModel",
        "Stable Diffusion 3, 3.5",
        (Stage("transformer_blocks", ("attn", "attn2"), batched=_TEXT | {"joint_attention_kwargs"}, outputs=_JOINT),),
        "hidden_states",
        _SAMPLES | {"pooled_projections", "block_controlnet_hidden_states", "joint_attention_kwargs"},
        _image("hidden_states"),
        _patches,
        residuals=frozenset({"block_controlnet_hidden_states"}),
        other="skip_layers",
        default=("7-9", "diffusers' guider for SEG, for Stable Diffusion 3.5 Medium"),
    ),
    Architecture(
        "FluxTransformer2DModel",
        "Flux.1",
        (
            Stage("transformer_blocks", ("attn",), "b", _TEXT | {"joint_attention_kwargs"}, _JOINT),
            Stage("single_transformer_blocks", ("attn",), "s", _TEXT | {"joint_attention_kwargs"}, _JOINT),
        ),
        "hidden_states",
        _SAMPLES | {"pooled_projections", "guidance", "joint_attention_kwargs"} | _CONTROL,
        _position_ids,
        lambda model: 2,
        start=_after_text,
        residuals=_CONTROL,
        units=_of_thousand,
    ),
    Architecture(
        "ChromaTransformer2DModel",
        "Chroma",
        (
            Stage("transformer_blocks", ("attn",), "b", _TEXT | {"attention_mask", "joint_attention_kwargs"}, _JOINT),
            Stage(
                "single_transformer_blocks",
                ("attn",),
                "s",
                _TEXT | {"attention_mask", "joint_attention_kwargs"},
                sequence=True,
            ),
        ),
        "hidden_states",
        _SAMPLES | {"attention_mask", "joint_attention_kwargs"} | _CONTROL,
        _position_ids,
        lambda model: 2,
        start=_after_text,
        residuals=_CONTROL,
        units=_of_thousand,
    ),
    Architecture(
        "Flux2Transformer2DModel",
        "Flux.2",
        (
            Stage(
                "transformer_blocks",
                ("attn",),
                "b",
                _TEXT | {"temb_mod_img", "temb_mod_txt", "joint_attention_kwargs"},
                _JOINT,
            ),
            Stage(
                "single_transformer_blocks",
                ("attn",),
                "s",
                _TEXT | {"temb_mod", "joint_attention_kwargs"},
                sequence=True,
            ),
        ),
        "hidden_states",
        _SAMPLES | {"guidance", "joint_attention_kwargs"},
        _position_ids_without_cache,
        lambda model: 2,
        start=_after_text,
        units=_of_thousand,
    ),
    Architecture(
        "QwenImageTransformer2DModel",
        "Qwen-Image",
        (
            Stage(
                "transformer_blocks",
                ("attn",),
                batched=_TEXT | {"encoder_hidden_states_mask", "modulate_index", "joint_attention_kwargs"},
                outputs=_JOINT,
            ),
        ),
        "hidden_states",
        _SAMPLES
        | {"encoder_hidden_states_mask", "guidance", "img_shapes", "additional_t_cond", "attention_kwargs"}
        | _CONTROL,
        _shapes,
        lambda model: 2,
        start=_after_text,
        listed=frozenset({"img_shapes"}),
        residuals=_CONTROL | {"additional_t_cond"},
        units=_of_thousand,
        rescales=True,
    ),
    Architecture(
        "ZImageTransformer2DModel",
        "Z-Image",
        (
            Stage(
                "layers",
                ("attention",),
                batched=frozenset(
                    {"x", "attn_mask", "freqs_cis", "adaln_input", "noise_mask", "adaln_noisy", "adaln_clean"}
                ),
                outputs=("x",),
            ),
        ),
        "x",
        frozenset({"x", "t", "cap_feats", "controlnet_block_samples"}),
        _one_of_a_list,
        lambda model: 2,
        listed=frozenset({"x", "cap_feats"}),
        residuals=frozenset({"controlnet_block_samples", "siglip_feats", "image_noise_mask"}),
        prompt="cap_feats",
        timestep="t",
        units=lambda timestep: (1000.0 - timestep) / 1000.0,
        conditional_first=True,
        shift=True,
    ),
    Architecture(
        "Lumina2Transformer2DModel",
        "Lumina 2",
        (
            Stage(
                "layers",
                ("attn",),
                batched=frozenset({"hidden_states", "attention_mask", "image_rotary_emb", "temb"}),
                sequence=True,
            ),
        ),
        "hidden_states",
        _SAMPLES | {"encoder_attention_mask"},
        _image("hidden_states"),
        _patches,
        start=_after_captions,
        units=lambda timestep: 1.0 - timestep / 1000.0,
    ),
    Architecture(
        "PixArtTransformer2DModel",
        "PixArt-alpha, PixArt-Sigma",
        (
            Stage(
                "transformer_blocks",
                ("attn1",),
                batched=_TEXT - {"temb"} | {"attention_mask", "encoder_attention_mask", "timestep"},
            ),
        ),
        "hidden_states",
        _SAMPLES | {"added_cond_kwargs", "attention_mask", "encoder_attention_mask"},
        _image("hidden_states"),
        _patches,
        default=("14", "diffusers' example for PAG on PixArt-Sigma"),
    ),
    Architecture(
        "HunyuanDiT2DModel",
        "Hunyuan-DiT",
        (Stage("blocks", ("attn1",), batched=_TEXT | {"skip"}),),
        "hidden_states",
        _SAMPLES
        | {"text_embedding_mask", "encoder_hidden_states_t5", "text_embedding_mask_t5", "image_meta_size", "style"}
        | {"controlnet_block_samples"},
        _image("hidden_states"),
        _patches,
        residuals=frozenset({"controlnet_block_samples"}),
        default=("14", "diffusers' example for PAG on Hunyuan-DiT"),
    ),
    Architecture(
        "WanTransformer3DModel",
        "Wan",
        (Stage("blocks", ("attn1",)),),
        "hidden_states",
        _SAMPLES | {"encoder_hidden_states_image"},
        _video,
        lambda model: int(model.config.patch_size[1]),
    ),
    Architecture(
        "LTXVideoTransformer3DModel",
        "LTX-Video",
        (Stage("transformer_blocks", ("attn1",), batched=_TEXT | {"image_rotary_emb", "encoder_attention_mask"}),),
        "hidden_states",
        _SAMPLES | {"encoder_attention_mask", "video_coords"},
        _told,
        lambda model: int(model.config.patch_size),
    ),
    Architecture(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo",
        _hunyuan_video(),
        "hidden_states",
        _SAMPLES | {"encoder_attention_mask", "pooled_projections", "guidance"},
        _video_of_patches,
        _patches,
    ),
    Architecture(
        "HunyuanVideoFramepackTransformer3DModel",
        "FramePack",
        _hunyuan_video(sequence=True),
        "hidden_states",
        _SAMPLES
        | {"encoder_attention_mask", "pooled_projections", "guidance", "image_embeds"}
        | {"latents_clean", "latents_history_2x", "latents_history_4x"},
        _video_of_patches,
        _patches,
        start=_after_history,
    ),
    Architecture(
        "CogVideoXTransformer3DModel",
        "CogVideoX",
        (
            Stage(
                "transformer_blocks",
                ("attn1",),
                batched=_TEXT | {"attention_kwargs"},
                outputs=("hidden_states", "encoder_hidden_states"),
            ),
        ),
        "hidden_states",
        _SAMPLES | {"timestep_cond", "attention_kwargs"},
        _video_of_images,
        _patches,
        start=_after_text,
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {architecture.model: architecture for architecture in _ALL}


def architecture_of(model: object) -> Architecture | None:
    """Return the architecture of a diffusers model or of a subclass of one; None for other models."""
    names = (base.__name__ for base in type(model).__mro__ if base.__module__.partition(".")[0] == "diffusers")
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)


# Models without softmax attention between image tokens, so there are no queries to blur.
LINEAR = {
    "SanaTransformer2DModel": "its self-attention is linear attention",
    "SanaVideoTransformer3DModel": "its self-attention is linear attention",
}


# Default layers of a UNet, and the source of that recommendation.
UNET_DEFAULT = ("mid", "the method's paper (arXiv 2408.00760) and its official implementation")
TPG_DEFAULT = ("d6-23", "TPG's official implementation for Stable Diffusion XL")
NO_ADVICE = "no published recommendation; the middle block"


def advised_layers(architecture: Architecture, blocks: int) -> tuple[str, str]:
    """Return the default layers, and the source of that recommendation; the middle block if there is none."""
    if architecture.default is not None and int(architecture.default[0].split("-")[-1]) < blocks:
        return architecture.default
    return str(blocks // 2), NO_ADVICE


def batch_of(sample: Any) -> torch.Tensor:
    """Return the noisy images of a batch, given as a tensor or a list of tensors, as one tensor.

    Raises:
        ValueError: If the images differ in size, or if there are several for one prompt.
    """
    if not isinstance(sample, list):
        return sample
    shapes = [tuple(getattr(image, "shape", ())) for image in sample]
    if len(set(shapes)) != 1 or not shapes[0]:
        raise ValueError(
            f"guide needs images of the same size and one image per prompt in a batch, got shapes {shapes}"
        )
    return torch.stack(sample)

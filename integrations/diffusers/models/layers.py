# SPDX-License-Identifier: Apache-2.0
"""The self-attention layers of a denoiser: names and grids."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from segkern.grid import Grid
from segkern.integrations.diffusers.models.architectures import (
    ARCHITECTURES,
    LINEAR,
    TPG_DEFAULT,
    UNET_DEFAULT,
    Architecture,
    advised_layers,
    architecture_of,
)
from segkern.integrations.specs.layer_names import PARTS, LayerInfo, select_layers

__all__ = ["PARTS", "UNETS", "LayerInfo", "execution_order", "find_unet", "list_layers", "select_layers"]

UNETS = (UNet2DConditionModel, UNetMotionModel)
_SDXL_DOWN_LAYERS = 24  # self-attention layers of Stable Diffusion XL in its down blocks


def list_layers(
    pipe_or_model: object, height: int | None = None, width: int | None = None, frames: int | None = None
) -> list[LayerInfo]:
    """Return the self-attention layers that guidance can act on, in execution order.

    ``guide`` supports all these layers in an unmodified diffusers model. Modified UNet layers, with a non-standard
    processor or under ``enable_free_noise_split_inference``, are also listed, but ``guide`` raises an error that
    explains the problem.

    Args:
        pipe_or_model: A pipeline with a ``UNet2DConditionModel``, a ``UNetMotionModel`` or a supported transformer, or
            that model. The model may be compiled.
        height: Image height in pixels. If height and width are given, every layer gets its grid; this requires a
            pipeline. The grid of a transformer starts at token 0 here; in a run it starts after the text tokens if the
            model puts them first.
        width: Image width in pixels.
        frames: Number of video frames, with height and width. Defaults to 1.

    Raises:
        ValueError: If there is no supported model, if only one of height and width is given, if a size is given without
            a pipeline to convert pixels into latents, or if frames are given for a pipeline that is not for videos.

    Source: the official implementation counts the ``attn1`` modules of each part in module order; ComfyUI nodes count
        transformers in each part, and blocks in each transformer.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8)
        >>> [layer.name for layer in list_layers(unet)]
        ['d0', 'm0', 'u0', 'u1']
    """
    if (height is None) != (width is None):
        raise ValueError(f"list_layers needs both height and width, got height={height!r}, width={width!r}")
    model = find_model(pipe_or_model)
    if frames is not None and height is None:
        raise ValueError(f"list_layers needs height and width with frames={frames!r}")
    latent: tuple[int, int, int] | None = None
    if height is not None and width is not None:
        latent = latent_size(pipe_or_model, height, width, frames)
    if isinstance(model, UNETS):
        return _of_unet(model, latent)
    return _of_transformer(model, _architecture(model), latent)


def _of_unet(unet: Any, latent: tuple[int, int, int] | None) -> list[LayerInfo]:
    grids = {} if latent is None else grids_of_unet(unet, *latent[1:])
    layers: list[LayerInfo] = []
    counts = dict.fromkeys(PARTS, 0)
    transformers: dict[str, list[str]] = {part: [] for part in PARTS}
    for module, block, attention in _self_attentions(unet):
        part = block.split("_")[0]
        transformer, _, number = module.removesuffix(".attn1").rpartition(".transformer_blocks.")
        if transformer not in transformers[part]:
            transformers[part].append(transformer)
        layers.append(
            LayerInfo(
                name=f"{part[0]}{counts[part]}",
                module=module,
                part=part,
                heads=attention.heads,
                head_dim=attention.inner_dim // attention.heads,
                grid=grids.get(block),
                comfyui=f"{part[0]}{len(transformers[part]) - 1}.{number}" if transformer else None,
            )
        )
        counts[part] += 1
    return layers


def _of_transformer(
    model: nn.Module, architecture: Architecture, latent: tuple[int, int, int] | None
) -> list[LayerInfo]:
    side, by_frame = architecture.pixels(model), _latents_of_a_token(model)
    grid = None if latent is None else Grid(latent[1] // side, latent[2] // side, frames=max(1, latent[0] // by_frame))
    layers: list[LayerInfo] = []
    before = 0  # number of blocks in earlier lists
    for stage in architecture.stages:
        blocks: Any = model.get_submodule(stage.blocks)
        for number, block in enumerate(blocks):
            kinds = [kind for kind in stage.attentions if getattr(block, kind, None) is not None]
            for kind in kinds:
                attention: Any = getattr(block, kind)
                inner_dim = getattr(attention, "inner_dim", None) or attention.to_q.out_features
                layers.append(
                    LayerInfo(
                        name=f"{stage.letter}{number}" + (f".{kind}" if len(kinds) > 1 else ""),
                        module=f"{stage.blocks}.{number}.{kind}",
                        part=stage.blocks,
                        heads=attention.heads,
                        head_dim=inner_dim // attention.heads,
                        grid=grid,
                        block=before + number,
                    )
                )
        before += len(blocks)
    return layers


def default_layers_of(pipe_or_model: object, method: str = "SEG") -> tuple[str, str]:
    """Return the default layers of a guidance method, and the source of that recommendation.

    Args:
        pipe_or_model: A pipeline or denoiser.
        method: Name of the spec. Only ``"TPG"`` has defaults of its own, for Stable Diffusion XL.
    """
    model = find_model(pipe_or_model)
    if isinstance(model, UNETS):
        down = sum(layer.part == "down" for layer in list_layers(model)) if method == "TPG" else 0
        return TPG_DEFAULT if down == _SDXL_DOWN_LAYERS else UNET_DEFAULT
    blocks = {layer.block for layer in list_layers(model)}
    return advised_layers(_architecture(model), len(blocks))


def latent_size(pipe: object, height: int, width: int, frames: int | None = None) -> tuple[int, int, int]:
    """Return the number of latent frames, the latent height and the latent width for a size in pixels and frames.

    Raises:
        ValueError: If the object has no scale factor between pixels and latents.
    """
    factor = _factor(pipe, _SPATIAL)
    if factor is None:
        raise ValueError(
            f"list_layers needs a pipeline to convert height={height!r} and width={width!r} into latents, "
            f"got a bare {type(pipe).__name__}"
        )
    of_unet = isinstance(find_model(pipe), UNETS)  # UNets do not compress along frames
    by_time = 1 if frames is None or of_unet else _factor(pipe, _TEMPORAL)
    if by_time is None:
        raise ValueError(f"list_layers needs a video pipeline for frames={frames!r}, got {type(pipe).__name__}")
    return ((frames or 1) - 1) // by_time + 1, height // factor, width // factor


def pixels(pipe: object) -> tuple[int, int]:
    """Return the side of a latent and of a token of the pipeline's transformer, in pixels.

    Raises:
        ValueError: If the pipeline cannot be guided or has no scale factor between pixels and latents.
    """
    model = find_model(pipe)
    factor = _factor(pipe, _SPATIAL)
    if factor is None:
        raise ValueError(f"a {type(pipe).__name__} has no attribute with the number of pixels per latent")
    return factor, factor * _architecture(model).pixels(model)


def _architecture(model: nn.Module) -> Architecture:
    architecture = architecture_of(model)
    assert architecture is not None
    return architecture


_SPATIAL = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
_TEMPORAL = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")


def _factor(pipe: object, names: tuple[str, ...]) -> int | None:
    """Return the number of pixels or frames per latent along an axis, under any of its attribute names."""
    return next((int(factor) for name in names if (factor := getattr(pipe, name, None)) is not None), None)


def _latents_of_a_token(model: Any) -> int:
    """Return the number of latent frames per token."""
    patch = model.config.get("patch_size")
    return int(patch[0]) if isinstance(patch, (list, tuple)) else int(model.config.get("patch_size_t") or 1)


def execution_order(unet: Any) -> list[tuple[str, nn.Module]]:
    """Return the denoiser's blocks with their module names, in execution order."""
    down = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    mid = [] if unet.mid_block is None else [("mid_block", unet.mid_block)]
    up = [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    return [*down, *mid, *up]


def find_model(pipe_or_model: object) -> nn.Module:
    """Return the supported model of a pipeline, or the given model, without the wrapper of ``torch.compile``.

    Raises:
        ValueError: If there is no supported model. The message quotes the type.
    """
    models = [getattr(pipe_or_model, name, None) for name in ("unet", "transformer", "transformer_2")]
    models = [model for model in models if model is not None] or [pipe_or_model]
    for model in (getattr(model, "_orig_mod", model) for model in models):
        if isinstance(model, UNETS) or architecture_of(model) is not None:
            assert isinstance(model, nn.Module)
            return model
    name = type(getattr(models[0], "_orig_mod", models[0])).__name__
    within = "" if models[0] is pipe_or_model else f" with a {name}"
    reason = f"; a {name} is not supported because {LINEAR[name]}" if name in LINEAR else ""
    if name in ARCHITECTURES:
        within += f" from {type(models[0]).__module__}, which is neither diffusers' class nor a subclass of it"
    known = ", ".join(architecture.users for architecture in ARCHITECTURES.values())
    raise ValueError(
        f"segkern guides pipelines with a UNet2DConditionModel (Stable Diffusion 1, 2, XL, Kolors), a UNetMotionModel "
        f"(AnimateDiff) and transformers ({known}), got {type(pipe_or_model).__name__}{within}{reason}"
    )


def find_unet(pipe_or_unet: object) -> UNet2DConditionModel:
    """Return the UNet of a pipeline, or the given UNet, without the wrapper of ``torch.compile``.

    Raises:
        ValueError: If it is not a ``UNet2DConditionModel``. The message quotes the type.
    """
    model = getattr(pipe_or_unet, "unet", pipe_or_unet)
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, UNet2DConditionModel):
        return model
    within = "" if model is pipe_or_unet else f" whose unet is a {type(model).__name__}"
    raise ValueError(
        f"this function needs a UNet2DConditionModel (Stable Diffusion 1, 2, XL), got "
        f"{type(pipe_or_unet).__name__}{within}"
    )


def _self_attentions(unet: Any) -> list[tuple[str, str, Attention]]:
    """Return every ``attn1`` over an image as (module name, block name, module), in execution order.

    Excluded are motion modules, which attend over frames; a few old blocks, which get a flat image without its shape;
    and layers that also attend to text, in blocks with only cross-attention or with text in addition to the image.
    """
    return [
        (f"{block_name}.{name}", block_name, module)
        for block_name, block in execution_order(unet)
        for name, module in block.named_modules()
        if name.split(".")[-1] == "attn1" and isinstance(module, Attention) and "motion_modules" not in name
        if type(block.get_submodule(name.rpartition(".")[0])).__name__ != "KAttentionBlock"
        if not module.is_cross_attention and module.added_kv_proj_dim is None
    ]


def grids_of_unet(unet: Any, height: int, width: int) -> dict[str, Grid]:
    """Return the grid of each block at this latent size. An up block has the grid of the down block it mirrors."""
    grids: dict[str, Grid] = {}
    levels = []
    for i, block in enumerate(unet.down_blocks):
        levels.append(Grid(height, width))
        grids[f"down_blocks.{i}"] = levels[-1]
        for sampler in getattr(block, "downsamplers", None) or ():
            # A 3x3 convolution of stride 2 rounds up with padding 1, and rounds down if only one side is padded.
            extra = 1 if getattr(sampler, "padding", 1) else 0
            height, width = (height + extra) // 2, (width + extra) // 2
    grids["mid_block"] = Grid(height, width)
    for i, _ in enumerate(unet.up_blocks):
        grids[f"up_blocks.{i}"] = levels[-1 - i]
    return grids

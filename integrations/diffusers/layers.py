# SPDX-License-Identifier: Apache-2.0
"""Which self-attention layers a denoiser has, what they are called, and on which grid each one works."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from segkern.grid import Grid

PARTS = (
    "down",
    "mid",
    "up",
)  # in execution order; a layer's official index begins with the part's first letter

_INDEX = re.compile(r"([dmu])(\d+)(?:-\1?(\d+))?")


@dataclass(frozen=True)
class LayerInfo:
    """One self-attention layer of a denoiser.

    Attributes:
        name: the official index: ``d4``, ``m0``, ``u29``.
        module: name of the attention module inside the denoiser.
        part: ``"down"``, ``"mid"`` or ``"up"``.
        heads: number of heads.
        head_dim: channels per head.
        grid: the tokens' grid at the height and width that were asked for; None when none were.
    """

    name: str
    module: str
    part: str
    heads: int
    head_dim: int
    grid: Grid | None = None


def list_layers(pipe_or_unet: object, height: int | None = None, width: int | None = None) -> list[LayerInfo]:
    """The self-attention layers that a guidance can act on, in execution order.

    Args:
        pipe_or_unet: a pipeline with a ``UNet2DConditionModel``, or that model (also when compiled).
        height: of the image in pixels; with ``width`` it gives every layer its grid, and needs a pipeline.
        width: of the image in pixels.

    Raises:
        ValueError: for an object without such a model, or when only one of height and width is given, or both
            without a pipeline to convert pixels into latents.

    Source: the official implementation counts the ``attn1`` modules of each part in module order.

    Example:
        >>> from diffusers import UNet2DConditionModel
        >>> unet = UNet2DConditionModel(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        ...     down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=2,
        ...     up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8)
        >>> [layer.name for layer in list_layers(unet)]
        ['d0', 'm0', 'u0', 'u1']
    """
    unet = find_unet(pipe_or_unet)
    if (height is None) != (width is None):
        raise ValueError(f"list_layers takes height and width together, got height={height!r}, width={width!r}")
    grids: dict[str, Grid] = {}
    if height is not None and width is not None:
        factor = getattr(pipe_or_unet, "vae_scale_factor", None)
        if factor is None:
            raise ValueError(
                f"list_layers needs the pipeline to turn height={height!r} and width={width!r} into latents, "
                f"got a bare {type(pipe_or_unet).__name__}"
            )
        grids = _grids(unet, height // factor, width // factor)
    found: list[LayerInfo] = []
    counts = dict.fromkeys(PARTS, 0)
    for module, block, attention in _self_attentions(unet):
        part = block.split("_")[0]
        found.append(
            LayerInfo(
                name=f"{part[0]}{counts[part]}",
                module=module,
                part=part,
                heads=attention.heads,
                head_dim=attention.inner_dim // attention.heads,
                grid=grids.get(block),
            )
        )
        counts[part] += 1
    return found


def select_layers(available: Sequence[LayerInfo], wanted: str | Iterable[str]) -> list[LayerInfo]:
    """The layers that the names in ``wanted`` stand for, each once, in execution order.

    Raises:
        ValueError: for a name that stands for none of the ``available`` layers; the message lists what would.
    """
    chosen: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        matches = [layer.module for layer in available if _matches(layer, name)]
        index = _INDEX.fullmatch(name)
        if not matches or (index is not None and len(matches) != _span(index)):
            raise ValueError(f"unknown layer {name!r}; {_what_is_valid(available)}")
        chosen.update(matches)
    return [layer for layer in available if layer.module in chosen]


def execution_order(unet: UNet2DConditionModel) -> list[tuple[str, nn.Module]]:
    """The denoiser's blocks with their module names, in the order in which its forward calls them."""
    down = [(f"down_blocks.{i}", block) for i, block in enumerate(unet.down_blocks)]
    mid = [] if unet.mid_block is None else [("mid_block", unet.mid_block)]
    up = [(f"up_blocks.{i}", block) for i, block in enumerate(unet.up_blocks)]
    return [*down, *mid, *up]


def find_unet(pipe_or_unet: object) -> UNet2DConditionModel:
    """The ``UNet2DConditionModel`` of a pipeline, or the one given, without ``torch.compile``'s wrapper.

    Raises:
        ValueError: when there is none; the message quotes the type.
    """
    model = getattr(pipe_or_unet, "unet", pipe_or_unet)
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, UNet2DConditionModel):
        return model
    within = "" if model is pipe_or_unet else f" whose unet is a {type(model).__name__}"
    raise ValueError(
        f"segkern guides pipelines whose unet is a UNet2DConditionModel (Stable Diffusion 1, 2, XL), "
        f"got {type(pipe_or_unet).__name__}{within}"
    )


def _self_attentions(unet: UNet2DConditionModel) -> list[tuple[str, str, Attention]]:
    """Every ``attn1`` as (module name, block name, module), in execution order."""
    return [
        (f"{block_name}.{name}", block_name, module)
        for block_name, block in execution_order(unet)
        for name, module in block.named_modules()
        if name.split(".")[-1] == "attn1" and isinstance(module, Attention)
    ]


def _grids(unet: UNet2DConditionModel, height: int, width: int) -> dict[str, Grid]:
    """Block name -> grid at this size of latents. An up block has the grid of the down block it mirrors."""
    grids: dict[str, Grid] = {}
    levels = []
    for i, block in enumerate(unet.down_blocks):
        levels.append(Grid(height, width))
        grids[f"down_blocks.{i}"] = levels[-1]
        for sampler in getattr(block, "downsamplers", None) or ():
            # A 3x3 convolution of stride 2 rounds up with a padding of 1, and down when it pads one side
            # only.
            extra = 1 if getattr(sampler, "padding", 1) else 0
            height, width = (height + extra) // 2, (width + extra) // 2
    grids["mid_block"] = Grid(height, width)
    for i, _ in enumerate(unet.up_blocks):
        grids[f"up_blocks.{i}"] = levels[-1 - i]
    return grids


def _matches(layer: LayerInfo, name: str) -> bool:
    if name in PARTS:
        return layer.part == name
    index = _INDEX.fullmatch(name)
    if index is not None:
        first, last = int(index[2]), int(index[3] or index[2])
        return layer.part[0] == index[1] and first <= int(layer.name[1:]) <= last
    if any(character in name for character in "*?["):
        return fnmatchcase(layer.module, name)
    return layer.module == name or layer.module.startswith(f"{name}.")


def _span(index: re.Match[str]) -> int:
    """How many layers an index or a range names."""
    return int(index[3] or index[2]) - int(index[2]) + 1


def _what_is_valid(available: Sequence[LayerInfo]) -> str:
    parts = []
    for part in PARTS:
        names = [layer.name for layer in available if layer.part == part]
        if names:
            parts.append(f"{part!r} ({names[0]})" if len(names) == 1 else f"{part!r} ({names[0]} to {names[-1]})")
    example = available[0].module.rsplit(".", 3)[0] if available else "mid_block.attentions.0"
    return (
        f"valid are {', '.join(parts) or 'no layers at all'}, ranges such as 'd0-1', module names and their "
        f"dotted prefixes such as {example!r}, and globs such as '*.attentions.0.*'; list_layers(pipe) lists "
        f"every layer"
    )

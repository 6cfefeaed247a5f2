# SPDX-License-Identifier: Apache-2.0
"""``segkern layers``: the names, sizes and token grids of a model's self-attention layers."""

from __future__ import annotations

from typing import Annotated

import typer

from segkern.cli.terminal import Config, Height, Model, Width, need_diffusers, refusing
from segkern.generation import loading
from segkern.generation.sizes import image_size, video_frames
from segkern.generation.tables import new_table, show


def layers(
    model: Model,
    width: Width = None,
    height: Height = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video. Default: the pipeline's.")] = None,
    config: Config = None,
) -> None:
    """List the self-attention layers of a model.

    Only the configuration files are needed. To select a layer, use its layer name, ComfyUI name or module name. A
    block number selects all layers of a block.
    """
    need_diffusers()
    from segkern.integrations.diffusers.models.layers import default_layers_of, list_layers, select_layers

    with refusing():
        source = loading.find_model(model, config)
        pipe = loading.describe_pipeline(source)
        size = image_size(pipe, width, height, prefix="--")
        frames_drawn = video_frames(pipe, frames)
        available = list_layers(pipe, size[1], size[0], frames_drawn)
    of_unet = any(layer.comfyui for layer in available)
    video = "" if frames_drawn is None else f", {frames_drawn} frames"
    table = new_table(
        "layer",
        "tokens",
        "heads\nx dim",
        "ComfyUI" if of_unet else "block",
        "module",
        title=f"{source.name}, {size[0]} x {size[1]} pixels{video}",
        gap=1,  # so that the rows of SDXL fit 80 columns
    )
    for layer in available:
        grid = f"{layer.grid.height}x{layer.grid.width}" if layer.grid else "?"
        if layer.grid and layer.grid.frames > 1:
            grid = f"{layer.grid.frames}x{grid}"
        other = layer.comfyui if of_unet else str(layer.block)
        table.add_row(layer.name, grid, f"{layer.heads}x{layer.head_dim}", other, layer.module)
    show(table)
    methods: dict[tuple[str, str], list[str]] = {}  # by default layers and their source
    for method in ("SEG", "PAG", "SLG", "TPG"):
        methods.setdefault(default_layers_of(pipe, method), []).append(method)
    for (names, source_of_names), sharing in methods.items():
        chosen = select_layers(available, names)
        count = f"{len(chosen)} layer{'s' if len(chosen) > 1 else ''}"
        blocks = "" if of_unet else "block " if len(names) == 1 else "blocks "
        listed = " and ".join(filter(None, [", ".join(sharing[:-1]), sharing[-1]]))
        typer.echo(f"Default layers of {listed}: {blocks}{names} ({count})\nSource: {source_of_names}")

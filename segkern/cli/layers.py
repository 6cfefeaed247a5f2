# SPDX-License-Identifier: Apache-2.0
"""``segkern layers``: which self-attention layers a model has, what they are called, and how much work they are."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from segkern.cli.terminal import Config, Height, Model, Width, need_diffusers, refusing
from segkern.generation import loading
from segkern.generation.sizes import image_size, video_frames
from segkern.generation.tables import percent, wide


def layers(
    model: Model,
    width: Width = None,
    height: Height = None,
    frames: Annotated[int | None, typer.Option(help="Of a video; the pipeline's own number if not given.")] = None,
    config: Config = None,
) -> None:
    """List the self-attention layers that a guidance can act on; needs configuration files only.

    Every name in the table selects its layer: the layer's, ComfyUI's, the module's; a block's number selects the
    block. FLOPs is a layer's share of the operations of one forward of the denoiser: matrix products and
    convolutions are counted, a layer's are those of its attention module, which are its projections, in a joint
    attention the text's too, and its two products with queries, keys and values. A prompt has as many tokens as the
    pipeline takes at most, or 77.
    """
    need_diffusers()
    from segkern.integrations.diffusers.models.costs import flop_shares
    from segkern.integrations.diffusers.models.layers import default_layers_of, list_layers, select_layers

    with refusing():
        source = loading.find_model(model, config)
        pipe = loading.describe_pipeline(source)
        size = image_size(pipe, width, height)
        frames_drawn = video_frames(pipe, frames)
        available = list_layers(pipe, size[1], size[0], frames_drawn)
    try:
        shares, unknown = flop_shares(pipe, size[1], size[0], frames_drawn) or {}, "its other inputs are not known"
    except RuntimeError as error:
        shares, unknown = {}, f"a forward at this size fails ({str(error).splitlines()[0]})"
    of_unet = any(layer.comfyui for layer in available)
    video = "" if frames_drawn is None else f", {frames_drawn} frames"
    table = Table(
        "layer",
        "part",
        "heads",
        "head dim",
        "tokens",
        "FLOPs",
        "ComfyUI" if of_unet else "block",
        "module",
        title=f"{source.name}, {size[0]} x {size[1]}{video}",
    )
    for layer in available:
        grid = f"{layer.grid.height}x{layer.grid.width}" if layer.grid else "?"
        if layer.grid and layer.grid.frames > 1:
            grid = f"{layer.grid.frames}x{grid}"
        numbers = str(layer.heads), str(layer.head_dim), grid, percent(shares.get(layer.module))
        other = layer.comfyui if of_unet else str(layer.block)
        table.add_row(layer.name, layer.part, *numbers, other, layer.module)
    wide(table).print(table)
    if not shares:
        typer.echo(f"FLOPs of this denoiser cannot be counted: {unknown}")
    names, advice = default_layers_of(pipe)
    chosen = select_layers(available, names)
    share = f", {percent(sum(shares[layer.module] for layer in chosen))} of the FLOPs" if shares else ""
    count = f"{len(chosen)} layer{'s' if len(chosen) > 1 else ''}"
    typer.echo(f"where no layers are named, SEG and PAG act in {names} ({count}{share}); {advice}")

# SPDX-License-Identifier: Apache-2.0
"""``segkern layers``: which self-attention layers a model has, and what they are called."""

from __future__ import annotations

from rich.table import Table

from segkern import loading
from segkern.tables import wide
from segkern.terminal import Config, Height, Model, Width, need_diffusers, refusing


def layers(model: Model, width: Width = None, height: Height = None, config: Config = None) -> None:
    """List the self-attention layers that a guidance can act on; needs configuration files only."""
    need_diffusers()
    from segkern.integrations.diffusers import list_layers

    with refusing():
        source = loading.find_model(model, config)
        outline = loading.outline(source)
        size = loading.image_size(outline, width, height)
    table = Table(
        "layer",
        "part",
        "heads",
        "head dim",
        "tokens",
        "module",
        title=f"{source.name}, {size[0]} x {size[1]}",
    )
    for layer in list_layers(outline, size[1], size[0]):
        grid = f"{layer.grid.height}x{layer.grid.width}" if layer.grid else "?"
        table.add_row(layer.name, layer.part, str(layer.heads), str(layer.head_dim), grid, layer.module)
    wide(table).print(table)

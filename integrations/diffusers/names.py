# SPDX-License-Identifier: Apache-2.0
"""What a self-attention layer is called, and which layers a name stands for. One resolver for all models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from segkern.grid import Grid

PARTS = ("down", "mid", "up")  # of a UNet, in execution order; a layer's official index begins with the first letter

_INDEX = re.compile(r"([a-z])(\d+)(?:-\1?(\d+))?")  # d4, u0-29, b7, s0-s5
_COMFYUI = re.compile(r"([dmu])(\d+)\.(\d+)(?:-(\d+))?")  # u0.4, d2.2-9
_NUMBER = re.compile(r"(\d+)(?:-(\d+))?")  # 7, 4-9


@dataclass(frozen=True)
class LayerInfo:
    """One self-attention layer of a denoiser.

    Attributes:
        name: the short one. Of a UNet the official index: ``d4``, ``m0``, ``u29``; of a transformer the block's
            letter and number: ``b7``, ``s3``; where a block has a second self-attention, ``b7.attn2``.
        module: name of the attention module inside the denoiser.
        part: ``"down"``, ``"mid"`` or ``"up"``; of a transformer its list of blocks.
        heads: number of heads.
        head_dim: channels per head.
        grid: the tokens' grid at the height and width that were asked for; None when none were.
        comfyui: of a UNet, the name in ComfyUI's nodes: ``u0.4`` is block 4 of the first transformer in ``up``.
        block: of a transformer, the number of its block, counted over all lists in execution order.
    """

    name: str
    module: str
    part: str
    heads: int
    head_dim: int
    grid: Grid | None = None
    comfyui: str | None = None
    block: int | None = None


def layer_name(layer: Any) -> str | None:
    """One name, from a name, a block's number or a range of them; None for anything else."""
    if isinstance(layer, str):
        return layer
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        return str(layer)
    if isinstance(layer, range) and layer and layer.step == 1 and layer.start >= 0:
        return f"{layer.start}-{layer.stop - 1}"
    return None


def select_layers(available: Sequence[LayerInfo], wanted: str | Iterable[str]) -> list[LayerInfo]:
    """The layers that the names in ``wanted`` stand for, each once, in execution order.

    Raises:
        ValueError: for a name that stands for none of the ``available`` layers; the message lists what would.
    """
    chosen: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        matches = _matches(available, name)
        if not matches:
            raise ValueError(f"unknown layer {name!r}; {_what_is_valid(available)}")
        chosen.update(layer.module for layer in matches)
    return [layer for layer in available if layer.module in chosen]


def _matches(available: Sequence[LayerInfo], name: str) -> list[LayerInfo]:
    """All that a name stands for; none if any end of a range is missing."""
    if any(layer.part == name for layer in available):
        return [layer for layer in available if layer.part == name]
    number = _NUMBER.fullmatch(name)
    if number is not None:
        return _range(available, number[1], number[2], lambda layer: layer.block)
    index = _INDEX.fullmatch(name)
    if index is not None:
        return _range(available, index[2], index[3], lambda layer: _after(layer.name, index[1]))
    comfyui = _COMFYUI.fullmatch(name)
    if comfyui is not None:
        return _range(
            available, comfyui[3], comfyui[4], lambda layer: _after(layer.comfyui, f"{comfyui[1]}{comfyui[2]}.")
        )
    if any(character in name for character in "*?["):
        return [layer for layer in available if fnmatchcase(layer.module, name)]
    return [layer for layer in available if name in (layer.module, layer.name) or layer.module.startswith(f"{name}.")]


def _range(
    available: Sequence[LayerInfo], first: str, last: str | None, number: Callable[[LayerInfo], int | None]
) -> list[LayerInfo]:
    """Layers whose number lies in a range, every number of which some layer must have."""
    wanted = range(int(first), int(last or first) + 1)
    found = [(number(layer), layer) for layer in available]
    if not wanted or {each for each, _ in found if each in wanted} != set(wanted):
        return []
    return [layer for each, layer in found if each in wanted]


def _after(name: str | None, prefix: str) -> int | None:
    """The number after a prefix; of ``b7.attn2`` the 7, since a block's second attention belongs to the block."""
    if name is None or not name.startswith(prefix):
        return None
    number = name[len(prefix) :].split(".")[0]
    return int(number) if number.isdecimal() else None


def _what_is_valid(available: Sequence[LayerInfo]) -> str:
    parts = []
    for part in dict.fromkeys(layer.part for layer in available):
        names = [layer.name for layer in available if layer.part == part]
        parts.append(f"{part!r} ({names[0]})" if len(names) == 1 else f"{part!r} ({names[0]} to {names[-1]})")
    example = available[0].module.rsplit(".", 1)[0] if available else "mid_block.attentions.0"
    letter = available[0].name[0] if available else "m"
    blocks = [layer.block for layer in available if layer.block is not None]
    numbers = f"block numbers 0 to {max(blocks)} and ranges such as '0-1', " if blocks else ""
    comfyui = "ComfyUI's names such as 'u0.4', " if available and available[0].comfyui is not None else ""
    return (
        f"valid are {', '.join(parts) or 'no layers at all'}, {numbers}ranges such as '{letter}0-1', {comfyui}module "
        f"names and their dotted prefixes such as {example!r}, and globs such as '*.{example.rsplit('.', 1)[-1]}.*'; "
        f"list_layers(pipe) lists every layer"
    )

# SPDX-License-Identifier: Apache-2.0
"""Names of self-attention layers, and the function that resolves them for all models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from segkern.grid import Grid

PARTS = ("down", "mid", "up")  # of a UNet, in execution order; the first letter begins a layer's official index

_INDEX = re.compile(r"([a-z])(\d+)(?:-\1?(\d+))?", re.ASCII)  # d4, u0-29, b7, s0-s5
_COMFYUI = re.compile(r"([dmu])(\d+)\.(\d+)(?:-(\d+))?", re.ASCII)  # u0.4, d2.2-9
_NUMBER = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)  # 7, 4-9


@dataclass(frozen=True)
class LayerInfo:
    """One self-attention layer of a denoiser.

    Attributes:
        name: Short name. UNet: the official index, such as ``d4``, ``m0`` or ``u29``. Transformer: the letter and
            number of the block, such as ``b7`` or ``s3``. If a block has two self-attentions, they are ``b7.attn`` and
            ``b7.attn2``, and ``b7`` selects both.
        module: Name of the attention module in the denoiser.
        part: ``"down"``, ``"mid"`` or ``"up"`` for a UNet; the list of blocks for a transformer.
        heads: Number of heads.
        head_dim: Number of channels per head.
        grid: Token grid at the requested height and width; None if no size was given.
        comfyui: UNet only: the name in ComfyUI nodes; ``u0.4`` is block 4 of the first transformer in ``up``.
        block: Transformer only: the block number, counted over all lists in execution order.
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
    """Return one name for a name, a block number or a range of block numbers; None for anything else."""
    if isinstance(layer, str):
        return layer
    if isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0:
        return str(layer)
    if isinstance(layer, range) and layer and layer.step == 1 and layer.start >= 0:
        return f"{layer.start}-{layer.stop - 1}"
    return None


def select_layers(
    available: Sequence[LayerInfo],
    wanted: str | Iterable[str],
    advice: str = "list_layers(pipe) lists every layer",
) -> list[LayerInfo]:
    """Return the layers that ``wanted`` names, each once, in execution order.

    ``advice`` is appended to the error message.

    Raises:
        ValueError: If a name matches none of the ``available`` layers. The message lists valid names.
    """
    chosen: set[str] = set()
    for name in [wanted] if isinstance(wanted, str) else wanted:
        matches = _matches(available, name)
        if not matches:
            raise ValueError(f"unknown layer {name!r}; {_what_is_valid(available)}; {advice}")
        chosen.update(layer.module for layer in matches)
    return [layer for layer in available if layer.module in chosen]


def _matches(available: Sequence[LayerInfo], name: str) -> list[LayerInfo]:
    """Return all layers that a name matches, or an empty list if a layer of a range is missing."""
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
    """Return the layers whose number is in a range, or an empty list if any number of the range has no layer."""
    wanted = range(int(first), int(last or first) + 1)
    numbered = [(n, layer) for layer in available if (n := number(layer)) is not None and n in wanted]
    complete = len({n for n, _ in numbered}) == len(wanted)
    return [layer for _, layer in numbered] if complete else []


def _after(name: str | None, prefix: str) -> int | None:
    """Return the number after a prefix. The number of ``b7.attn2`` is 7 because both attentions belong to the block."""
    if name is None or not name.startswith(prefix):
        return None
    number = name[len(prefix) :].split(".")[0]
    return int(number) if number.isdecimal() else None


def _what_is_valid(available: Sequence[LayerInfo]) -> str:
    """List valid names. Every example in the list matches a layer of this model."""
    if not available:
        return "this model has no self-attention layers"
    parts: dict[str, list[str]] = {}
    for layer in available:
        parts.setdefault(layer.part, []).append(layer.name.split(".")[0])
    valid = [f"{part!r} ({_ends(names)})" for part, names in parts.items()]
    numbers = [str(layer.block) for layer in available if layer.block is not None]
    if numbers:
        valid.append(f"block numbers {_ends(numbers)}")
    ranges = [f"{names[0]}-{names[-1].lstrip(names[0][0])}" for names in parts.values() if names[0] != names[-1]][:1]
    if len(set(numbers)) > 1:
        ranges.insert(0, f"{numbers[0]}-{numbers[-1]}")
    if ranges:
        valid.append(f"ranges such as {' and '.join(map(repr, ranges))}")
    if available[-1].comfyui is not None:
        valid.append(f"names as in ComfyUI such as {available[-1].comfyui!r}")
    prefix = available[0].module.rsplit(".", 1)[0]
    glob = f"*.{prefix.rsplit('.', 1)[-1]}.*" if "." in prefix else f"{prefix}.*"
    return (
        f"valid names are {', '.join(valid)}, module names and their dotted prefixes such as {prefix!r}, and globs "
        f"such as {glob!r}"
    )


def _ends(names: Sequence[str]) -> str:
    """Return the first and the last name.

    Example:
        >>> _ends(["d0", "d1", "d2"]), _ends(["m0"])
        ('d0 to d2', 'm0')
    """
    return names[0] if names[0] == names[-1] else f"{names[0]} to {names[-1]}"

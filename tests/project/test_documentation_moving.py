# SPDX-License-Identifier: Apache-2.0
"""``docs/moving.md``: old lines and new ones draw the same, and names of other programs stand for the same layers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from benchmarks.sdxl import SDXL
from segkern.integrations.diffusers import LayerInfo, list_layers
from segkern.integrations.diffusers.models.names import select_layers
from tests.project.documentation_models import replace_models
from tests.project.documentation_tools import ROOT, pairs, parsed

PAGE = ROOT / "docs" / "moving.md"
PAIRS = pairs(PAGE)
BLOCKS = [each for each in parsed(PAGE).examples() if each.parsed.language == "python"]
IMPORTS = "\n".join(re.findall(r"^(?:from|import) .*", "\n".join(each.parsed.source for each in BLOCKS), re.MULTILINE))


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_old_and_new_lines_draw_the_same(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The official script's pipeline is segkern's with the same arguments here, see ``replace_models``."""
    replace_models(monkeypatch, output_type="np")
    names: dict[str, Any] = {}
    for line in IMPORTS.splitlines():
        exec(line, names)
    pictures = []
    assert len(PAIRS[index]) >= 2
    for example in PAIRS[index]:
        torch.manual_seed(5)
        exec(example.parsed.source, names)
        pictures.append(names["image"])
    torch.manual_seed(5)
    prompt, scale = ([""], 1.0) if index == 0 else ("a red fox", 5.0)
    plain = names["pipe"](prompt, guidance_scale=scale).images[0]
    for picture in pictures[1:]:
        assert np.abs(picture - pictures[0]).max() < 1e-4
    assert np.abs(plain - pictures[0]).max() > 1e-2, "guidance would not be noticed"


def test_the_other_blocks_run() -> None:
    sources = {each.parsed.source for pair in PAIRS for each in pair}
    others = [each.parsed.source for each in BLOCKS if each.parsed.source not in sources]
    assert len(others) == 2
    for source in others:
        exec(source, {})


def in_comfyui(text: str, layers: list[LayerInfo]) -> list[LayerInfo]:
    """The layers that inputs of the node stand for: blocks are counted as ComfyUI's UNet counts them."""
    found = []
    if text.startswith("unet_block="):
        part, number = re.fullmatch(r"unet_block=(\w+), unet_block_id=(\d+)", text).groups()  # type: ignore[union-attr]
        for layer in layers:
            words = layer.module.split(".")
            if layer.part == "mid":
                here = part == "middle" and number == "0"
            else:
                level, transformer = int(words[1]), int(words[3])
                down = layer.part == "down"
                block = (1 if down else 0) + 3 * level + transformer  # after conv_in; three blocks a level
                here = part == ("input" if down else "output") and int(number) == block
            found += [layer] if here else []
        return found
    for item in text.removeprefix("unet_block_list=").split(","):
        part = {"d": "down", "m": "mid", "u": "up"}[item[0]]
        groups: dict[str, list[LayerInfo]] = {}
        for layer in layers:
            if layer.part == part:
                groups.setdefault(layer.module.split(".transformer_blocks.")[0], []).append(layer)
        blocks, _, inside = item[1:].partition(".")
        for group in _ranged(list(groups.values()), blocks):
            found += _ranged(group, inside) if inside else group
    return found


def _ranged(items: list, text: str) -> list:  # type: ignore[type-arg]
    first, _, last = text.partition("-")
    return items[int(first) : int(last or first) + 1]


def rows() -> list[tuple[str, str, int]]:
    """What the page says of ComfyUI's names."""
    table = PAGE.read_text(encoding="utf-8").split("<!-- comfyui -->")[1]
    found = re.findall(r"^\| (`unet.*?) \| (.*?) \| (\d+) \|$", table, re.MULTILINE)
    assert len(found) >= 10
    return [(old.replace("`", ""), new.replace("`", ""), int(count)) for old, new, count in found]


@pytest.fixture(scope="module")
def sdxl_layers() -> list[LayerInfo]:
    with torch.device("meta"):
        return list_layers(UNet2DConditionModel(**SDXL.config))


@pytest.mark.parametrize(("old", "new", "count"), rows())
def test_names_of_comfyui_stand_for_the_same_layers(
    old: str, new: str, count: int, sdxl_layers: list[LayerInfo]
) -> None:
    chosen = select_layers(sdxl_layers, eval(new))
    assert chosen == in_comfyui(old, sdxl_layers)
    assert len(chosen) == count

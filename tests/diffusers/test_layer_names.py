# SPDX-License-Identifier: Apache-2.0
"""Layer names, on layers of whole models and on generated lists of layers."""

from __future__ import annotations

import random
import re
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segkern.integrations.diffusers import LayerInfo, list_layers
from segkern.integrations.specs.layer_names import select_layers
from tests.diffusers.small_pipelines import tiny_pipeline
from tests.diffusers.transformer_cases import MODELS

BUILD = {"unet": tiny_pipeline, **{name: model.build for name, model in MODELS.items()}}


@lru_cache(maxsize=len(BUILD))
def layers_of(name: str) -> tuple[LayerInfo, ...]:
    return tuple(list_layers(BUILD[name]()))


def names(available: list[LayerInfo] | tuple[LayerInfo, ...], wanted: str | list[str]) -> list[str]:
    return [layer.name for layer in select_layers(available, wanted)]


@st.composite
def unets(draw: st.DrawFn) -> list[LayerInfo]:
    """Generate layers of a UNet with any number of transformers per part and blocks per transformer."""
    layers = []
    for letter, part in (("d", "down"), ("m", "mid"), ("u", "up")):
        count = 0
        for transformer, depth in enumerate(draw(st.lists(st.integers(1, 12), max_size=12))):
            for block in range(depth):
                module = f"{part}_blocks.{transformer}.transformer_blocks.{block}.attn1"
                comfyui = f"{letter}{transformer}.{block}"
                layers.append(LayerInfo(f"{letter}{count}", module, part, 1, 1, comfyui=comfyui))
                count += 1
    return layers


@st.composite
def transformers(draw: st.DrawFn) -> list[LayerInfo]:
    """Generate layers of one or two lists of blocks, some with two self-attentions per block."""
    layers: list[LayerInfo] = []
    before = 0
    for letter, part in draw(st.sampled_from([(("b", "blocks"),), (("b", "blocks"), ("s", "single_blocks"))])):
        for number, kinds in enumerate(draw(st.lists(st.integers(1, 2), min_size=1, max_size=14))):
            for kind in ("attn", "attn2")[:kinds]:
                name = f"{letter}{number}" + (f".{kind}" if kinds > 1 else "")
                layers.append(LayerInfo(name, f"{part}.{number}.{kind}", part, 1, 1, block=before + number))
        before = (layers[-1].block or 0) + 1
    return layers


def check_names(available: list[LayerInfo] | tuple[LayerInfo, ...]) -> None:
    """Assert that every name of a layer selects only that layer, and that a block number selects its block."""
    assert len({layer.name for layer in available}) == len({layer.module for layer in available}) == len(available)
    for layer in available:
        for name in filter(None, (layer.name, layer.comfyui, layer.module)):
            assert select_layers(available, name) == [layer], name
        if layer.block is not None:
            same = [other for other in available if other.block == layer.block]
            assert select_layers(available, str(layer.block)) == same
            assert select_layers(available, layer.name.split(".")[0]) == same
            assert select_layers(available, layer.module.rsplit(".", 1)[0]) == same


@pytest.mark.parametrize("name", BUILD)
def test_each_name_of_a_layer_selects_that_layer(name: str) -> None:
    check_names(layers_of(name))


@settings(max_examples=40)
@given(unets() | transformers())
def test_each_name_of_drawn_layers_selects_that_layer(available: list[LayerInfo]) -> None:
    check_names(available)


@settings(max_examples=40)
@given(unets() | transformers(), st.data())
def test_any_names_select_each_layer_once_in_execution_order(available: list[LayerInfo], data: st.DataObject) -> None:
    everything = [name for layer in available for name in (layer.name, layer.comfyui, layer.module, layer.part) if name]
    wanted = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=8)) if everything else []
    selected = select_layers(available, wanted)
    assert selected == [layer for layer in available if layer in selected]
    assert len({layer.module for layer in selected}) == len(selected)
    shuffled = random.Random(0).sample([*wanted, *wanted], 2 * len(wanted))
    assert select_layers(available, shuffled) == selected


@settings(max_examples=60)
@given(unets() | transformers(), st.sampled_from("dmubs"), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_a_range_is_its_numbers_and_all_of_them_exist(
    available: list[LayerInfo], letter: str, first: int, last: int, again: bool
) -> None:
    have = {layer.name.split(".")[0] for layer in available}
    inside = [f"{letter}{number}" for number in range(first, last + 1)]
    name = f"{letter}{first}-{letter if again else ''}{last}"
    if inside and have.issuperset(inside):
        assert select_layers(available, name) == select_layers(available, inside)
        return
    with pytest.raises(ValueError, match=f"unknown layer {re.escape(repr(name))}"):
        select_layers(available, name)


@settings(max_examples=40)
@given(transformers(), st.integers(0, 30), st.integers(0, 30))
def test_a_range_of_blocks_counts_over_all_lists(available: list[LayerInfo], first: int, last: int) -> None:
    count = (available[-1].block or 0) + 1
    if first <= last < count:
        chosen = [layer for layer in available if layer.block in range(first, last + 1)]
        assert select_layers(available, f"{first}-{last}") == chosen
        return
    with pytest.raises(ValueError, match=f"unknown layer '{first}-{last}'"):
        select_layers(available, f"{first}-{last}")


@settings(max_examples=40)
@given(unets() | transformers())
def test_what_an_error_calls_valid_is_valid(available: list[LayerInfo]) -> None:
    with pytest.raises(ValueError, match="unknown layer 'nothing'") as error:
        select_layers(available, ["nothing"])
    valid = str(error.value).partition("; ")[2].partition("; list_layers")[0]
    for name in re.findall(r"'([^']+)'", valid):
        assert select_layers(available, name), name
    for ends in re.findall(r"\((\S+)(?: to (\S+))?\)|block numbers (\d+)(?: to (\d+))?", valid):
        for name in filter(None, ends):
            assert select_layers(available, name), name
    assert bool(available) == bool(re.findall(r"'([^']+)'", valid))
    assert len(str(error.value)) < 500


def test_block_1_is_not_block_10() -> None:
    available = [LayerInfo(f"b{i}", f"blocks.{i}.attn1", "blocks", 1, 1, block=i) for i in range(12)]
    for name in ("1", "b1", "blocks.1", "blocks.1.attn1", "blocks.[1].*", "b1-1", "1-1"):
        assert names(available, name) == ["b1"], name
    assert names(available, "blocks") == [layer.name for layer in available]
    assert names(available, ["10", "1", "b10", "blocks.1"]) == ["b1", "b10"]


def test_comfyui_counts_blocks_within_a_transformer() -> None:
    layers = {layer.comfyui: layer for layer in layers_of("unet")}
    assert layers["u1.1"].module.endswith("attentions.1.transformer_blocks.1.attn1")
    assert select_layers(layers_of("unet"), "u1.0-1") == [layers["u1.0"], layers["u1.1"]]


RANGES = ("u0.0-9", "u0.1-", "0-1", "d0-", "-1", "d-1", "u7-9", "u4-2", "u0-d3", "u0-9999999999999")
WORDS = ("", "middle", "d6", "x0", "M0", "0", "d٣", "u9.0", "u0.", "mid_bloc", "mid_block.", "up_blocks.2", "*.attn2")


@pytest.mark.parametrize("name", RANGES + WORDS)
def test_names_that_no_layer_of_a_unet_has(name: str) -> None:
    """Includes long ranges, which are not expanded."""
    with pytest.raises(ValueError, match=f"unknown layer {re.escape(repr(name))}; valid names are ") as error:
        select_layers(layers_of("unet"), ["mid", name])
    assert "'down' (d0 to d5), 'mid' (m0 to m1), 'up' (u0 to u8)" in str(error.value)


def test_a_block_with_two_attentions_is_named_as_a_whole_and_in_parts() -> None:
    layers = layers_of("sd3.5")
    assert names(layers, "1") == names(layers, "b1") == ["b1.attn", "b1.attn2"]
    assert names(layers, "b1.attn2") == ["b1.attn2"]
    assert [layer.name for layer in layers][-1] == "b3"

# SPDX-License-Identifier: Apache-2.0
"""The node pack's files: tooltips, help pages, templates, and metadata for ComfyUI's registry."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
import segkern_pack
from comfy_config import config_parser

import segkern

from .server import PACK

TEMPLATES = sorted((PACK / "example_workflows").glob("*.json"))


def inputs(schema: Any) -> list[Any]:
    """Return a node's inputs, including those of combo options."""
    options = [option for given in schema.inputs for option in getattr(given, "options", None) or []]
    return [*schema.inputs, *(given for option in options for given in getattr(option, "inputs", ()))]


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    extension = asyncio.run(segkern_pack.comfy_entrypoint())
    schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
    return {schema.node_id: schema for schema in schemas}


def test_every_input_and_node_is_explained(schemas: dict[str, Any]) -> None:
    for schema in schemas.values():
        assert schema.description
        for given in inputs(schema):
            assert given.tooltip.endswith("."), (schema.node_id, given.id)


def test_every_node_has_a_help_page_that_names_its_inputs(schemas: dict[str, Any]) -> None:
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (PACK / "web" / "docs").iterdir()}
    assert pages.keys() == schemas.keys()
    for name, schema in schemas.items():
        assert pages[name].startswith(f"# {schema.display_name}\n")
        for given in inputs(schema):
            assert re.search(rf"^\| .*\b{given.id}\b.* \|", pages[name], re.MULTILINE), (name, given.id)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_templates_give_values_that_the_nodes_take(path: Path, schemas: dict[str, Any]) -> None:
    ours = [node for node in json.loads(path.read_text(encoding="utf-8"))["nodes"] if node["type"] in schemas]
    assert "GuidanceInfoSegkern" in [node["type"] for node in ours]
    for node in ours:
        widgets = [given for given in schemas[node["type"]].inputs if given.io_type not in ("MODEL", "LATENT")]
        for given, value in zip(widgets, node.get("widgets_values", []), strict=True):
            if given.io_type == "FLOAT":
                assert given.min <= value <= given.max, given.id


def test_the_registry_reads_the_pack() -> None:
    read = config_parser.extract_node_configuration(str(PACK))
    assert (read.project.name, read.project.version) == ("comfyui-segkern", segkern.__version__)
    assert read.project.dependencies == ["segkern"]
    assert read.project.license.text == "Apache-2.0"
    assert read.tool_comfy.publisher_id
    assert read.tool_comfy.display_name
    assert (PACK / read.tool_comfy.icon).is_file()

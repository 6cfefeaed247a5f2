# SPDX-License-Identifier: Apache-2.0
"""The node pack as ComfyUI imports it, and its files."""

from __future__ import annotations

import asyncio
from typing import Any

import segkern_pack


def nodes() -> list[Any]:
    """The pack's nodes."""
    extension = asyncio.run(segkern_pack.comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


def test_every_input_and_node_is_explained() -> None:
    for node in nodes():
        schema = node.GET_SCHEMA()
        assert schema.description
        assert all(given.tooltip for given in schema.inputs), schema.node_id

# SPDX-License-Identifier: Apache-2.0
"""ComfyUI node pack: a folder to link, clone or copy into ``custom_nodes``.

ComfyUI imports it by path, so its modules import each other relatively and ``segkern`` as an installed package.
"""

import logging
from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if find_spec("segkern") is None:
    logging.error(
        "segkern's nodes are not available because the package segkern is not installed in ComfyUI's Python; install "
        "it there as the pack's README.md describes, and restart ComfyUI"
    )
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
    __all__ = ["NODE_CLASS_MAPPINGS", "WEB_DIRECTORY"]
else:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

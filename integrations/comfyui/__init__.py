# SPDX-License-Identifier: Apache-2.0
"""Node pack for ComfyUI: a folder that is linked, cloned or copied into ``custom_nodes``.

ComfyUI imports it by path, so its modules import each other relatively, and ``segkern`` as the installed package.
"""

import logging
from importlib.util import find_spec

WEB_DIRECTORY = "./web"

if find_spec("segkern") is None:
    logging.error(
        "segkern's nodes are not available: the package segkern is not installed in ComfyUI's Python; "
        "install it with that Python's `-m pip install segkern` and restart ComfyUI"
    )
    NODE_CLASS_MAPPINGS: dict[str, type] = {}
    __all__ = ["NODE_CLASS_MAPPINGS", "WEB_DIRECTORY"]
else:
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

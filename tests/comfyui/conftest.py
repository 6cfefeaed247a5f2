# SPDX-License-Identifier: Apache-2.0
"""Set-up of tests against the real ComfyUI, in the environment that ``make test-comfyui`` creates.

In this environment ``comfy`` can be imported, and the node pack is ``segkern_pack``. In any other environment, these
tests are not collected.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import pytest

from .server import COMFYUI, DOUBLES, PACK, Server, link_pack, serving

collect_ignore_glob: list[str] = []


def _import_pack() -> None:
    """Import the pack by path, as ComfyUI does."""
    spec = importlib.util.spec_from_file_location("segkern_pack", PACK / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


if (COMFYUI / "main.py").is_file():
    sys.path += [str(DOUBLES), str(COMFYUI)]
    import comfy.cli_args

    comfy.cli_args.args.cpu = True  # read when comfy.model_management is imported
    _import_pack()
else:
    collect_ignore_glob.append("test_*.py")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with the node pack and a small checkpoint."""
    from .small_checkpoint import write_checkpoint

    base = tmp_path_factory.mktemp("comfyui")
    link_pack(base)
    checkpoints = base / "models" / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_checkpoint(checkpoints / "small.safetensors")
    (checkpoints / "sd_xl_base_1.0.safetensors").symlink_to("small.safetensors")  # the name in the templates
    user = base / "user" / "default"
    user.mkdir(parents=True)
    (user / "comfy.settings.json").write_text('{"Comfy.TutorialCompleted": true}')  # no dialog over the page
    with serving(base) as running:
        yield running

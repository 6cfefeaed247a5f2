# SPDX-License-Identifier: Apache-2.0
"""The real server of ComfyUI in a temporary folder, and jobs posted to it."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACK = Path(__file__).parents[2] / "integrations" / "comfyui"
COMFYUI = Path(sys.prefix).parent / "vendor" / "ComfyUI"
DOUBLES = Path(__file__).parent / "doubles"
PATIENCE = 120.0  # seconds, for a machine that is busy
Workflow = dict[str, Any]


def command(base: Path, *arguments: str) -> list[str]:
    """The server's command line, with models, nodes and outputs in ``base``."""
    return [
        sys.executable, str(COMFYUI / "main.py"), "--cpu", "--disable-api-nodes", "--base-directory", str(base),
        "--database-url", f"sqlite:///{base / 'comfyui.db'}", *arguments,
    ]  # fmt: skip


def environment(*path: Path) -> dict[str, str]:
    """Variables of the server's process, with folders to import from before all others."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return os.environ | nowhere | {"PYTHONPATH": os.pathsep.join(map(str, (*path, DOUBLES)))}


def link_pack(base: Path) -> None:
    """Link the node pack into ``custom_nodes``, as docs/comfyui.md says."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True)
    (nodes / "segkern").symlink_to(PACK, target_is_directory=True)


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        address: of its page.
        base: its folder.
        log: what it printed.
    """

    address: str
    base: Path
    log: Path

    def get(self, path: str) -> Any:
        """An answer in JSON."""
        return json.loads(self.text(path))

    def text(self, path: str, body: Any = None) -> str:
        """An answer; with a body, to a POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def post(self, workflow: Workflow) -> str:
        """Queue a workflow in API format; the job's id."""
        return json.loads(self.text("/prompt", {"prompt": workflow}))["prompt_id"]

    def finish(self, job: str) -> dict[str, Any]:
        """A job's entry of the history, as soon as there is one."""
        return wait_for(lambda: self.get(f"/history/{job}").get(job))

    def steps(self) -> int:
        """Steps that the sampler's progress bar, the last line of the log, counts."""
        bars = re.findall(r"(\d+)/\d+ \[", self.log.read_text().rsplit("got prompt", 1)[-1])
        return int(bars[-1]) if bars else 0

    def run(self, workflow: Workflow) -> dict[str, Any]:
        """Queue a workflow, and its entry of the history."""
        return self.finish(self.post(workflow))


def wait_for(condition: Any) -> Any:
    """The first true value of ``condition``, which is asked again and again."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"nothing happened in {PATIENCE:.0f} s")


@contextmanager
def serving(base: Path) -> Iterator[Server]:
    """The server on a free port, ended at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = base / "log.txt"
    server = Server(f"http://127.0.0.1:{port}", base, log)
    with log.open("w") as out:
        process = subprocess.Popen(
            command(base, "--port", str(port)), stdout=out, stderr=subprocess.STDOUT, env=environment(), cwd=base
        )
    try:

        def answers() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended: {log.read_text()}")
            try:
                return bool(server.get("/queue"))
            except urllib.error.URLError:
                return False

        wait_for(answers)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise

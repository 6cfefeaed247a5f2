# SPDX-License-Identifier: Apache-2.0
"""The real ComfyUI server in a temporary folder, and jobs posted to it."""

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
PATIENCE = 120.0  # seconds, for a busy machine
Workflow = dict[str, Any]


def command(base: Path, *arguments: str) -> list[str]:
    """Return the server's command line, with models, nodes and outputs in ``base``."""
    return [
        sys.executable, str(COMFYUI / "main.py"), "--cpu", "--disable-api-nodes", "--base-directory", str(base),
        "--database-url", f"sqlite:///{base / 'comfyui.db'}", *arguments,
    ]  # fmt: skip


def environment(*path: Path) -> dict[str, str]:
    """Return environment variables of the server process, with folders to import from first."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    return os.environ | nowhere | {"PYTHONPATH": os.pathsep.join(map(str, (*path, DOUBLES)))}


def link_pack(base: Path) -> None:
    """Link the node pack into ``custom_nodes``, as docs/comfyui.md says."""
    nodes = base / "custom_nodes"
    nodes.mkdir(parents=True)
    (nodes / "segkern").symlink_to(PACK, target_is_directory=True)


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        address: Address of its page.
        base: Its folder.
        log: File with its output.
    """

    address: str
    base: Path
    log: Path

    def get(self, path: str) -> Any:
        """Return a JSON response."""
        return json.loads(self.text(path))

    def text(self, path: str, body: Any = None) -> str:
        """Return a response; with a body, send a POST request."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=PATIENCE) as answer:
            return answer.read().decode()

    def post(self, workflow: Workflow) -> str:
        """Queue a workflow in API format and return the job id."""
        return json.loads(self.text("/prompt", {"prompt": workflow}))["prompt_id"]

    def finish(self, job: str) -> dict[str, Any]:
        """Wait for a job's history entry and return it."""
        return wait_for(lambda: self.get(f"/history/{job}").get(job))

    def steps(self) -> int:
        """Return the number of steps in the sampler's progress bar, which is the last line of the log."""
        bars = re.findall(r"(\d+)/\d+ \[", self.log.read_text().rsplit("got prompt", 1)[-1])
        return int(bars[-1]) if bars else 0

    def run(self, workflow: Workflow) -> dict[str, Any]:
        """Queue a workflow and return its history entry."""
        return self.finish(self.post(workflow))


def wait_for(condition: Any) -> Any:
    """Poll ``condition`` and return its first true value."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.05)
    raise TimeoutError(f"nothing happened in {PATIENCE:.0f} s")


@contextmanager
def serving(base: Path) -> Iterator[Server]:
    """Run the server on a free port inside this context."""
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

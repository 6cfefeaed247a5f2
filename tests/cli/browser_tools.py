# SPDX-License-Identifier: Apache-2.0
"""A real Chromium, and a playground served by the real command."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIZE = {"width": 1280, "height": 800}
PHONE = {"width": 390, "height": 844}
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 120.0  # seconds, for a busy machine


def find_chromium() -> str:
    """Return the path of an installed Chromium.

    Raises:
        RuntimeError: If Chromium is not installed.
    """
    for name in _NAMES:
        if (path := shutil.which(name)) is not None:
            return path
    raise RuntimeError(f"browser tests need Chromium, but none of {', '.join(_NAMES)} is installed")


@contextmanager
def chromium() -> Iterator[Any]:
    """Start a headless browser, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(_ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Run ``segkern ui`` on a free port; yield its address and its process, which is interrupted at the end.

    Requests to other machines go to a proxy that does not exist.
    """
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "segkern.cli", "ui", *arguments, "--no-open", "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | nowhere
    )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if (address := re.search(r"http://\S+", line)) is not None:
                yield address[0], process
                break
        else:
            raise RuntimeError(f"segkern ui failed: {said}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise

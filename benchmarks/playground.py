# SPDX-License-Identifier: Apache-2.0
"""The playground in a real browser: ``python -m benchmarks.playground`` takes the picture of it in ``docs/``."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

PICTURE = Path(__file__).parents[1] / "docs" / "playground.png"
SIZE = {"width": 1280, "height": 800}
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
PATIENCE = 120.0  # seconds, for a machine that is busy


def find_chromium() -> str:
    """The path of an installed Chromium.

    Raises:
        RuntimeError: when there is none.
    """
    found = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if found is None:
        raise RuntimeError(f"this needs a Chromium, and none of {', '.join(_NAMES)} is installed")
    return found


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser without a window, driven by playwright."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=list(_ARGUMENTS))
        yield browser
        browser.close()


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """``segkern ui`` on a free port: its address, and its process, which is asked to end at the end.

    Whatever it asks of other machines goes to a proxy that is not there.
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
            raise RuntimeError(f"segkern ui ended: {said}")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def main() -> None:
    """Draw with everything as it is at first, and take the picture."""
    begun = time.perf_counter()
    with serving() as (address, _), chromium() as browser:
        page = browser.new_page(viewport=SIZE)
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(address)
        draw = page.get_by_role("button", name="Draw")
        draw.wait_for()
        print(f"from the command to the page: {time.perf_counter() - begun:.1f} s, browser included")
        begun = time.perf_counter()
        draw.click()
        page.get_by_text("Drawn in").wait_for()
        page.wait_for_function("[...document.querySelectorAll('#plain img, #guided img')].every(i => i.naturalWidth)")
        print(
            f"from Draw to the pictures: {time.perf_counter() - begun:.1f} s; {page.locator('#message').inner_text()}"
        )
        page.get_by_role("tab", name="Energy").click()
        page.wait_for_function("document.querySelector('#maps img')?.naturalWidth > 0")
        page.mouse.move(0, 0)
        page.screenshot(path=str(PICTURE), animations="disabled")
    Image.open(PICTURE).convert("P", palette=Image.Palette.ADAPTIVE).save(PICTURE, optimize=True)
    print(f"wrote {PICTURE}, {PICTURE.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's page in a real Chromium: find, place and connect nodes, open and run a template, show an error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cli.browser_tools import PATIENCE, chromium

from .server import Server, wait_for

pytestmark = pytest.mark.browser

_MILLISECONDS = 1000 * PATIENCE
_SIZE = {"width": 1600, "height": 1000}
_SCREENSHOTS = Path(__file__).parents[2] / "build" / "comfyui"
# A node's input or output in the window.
_SLOT = """([type, input, slot]) => {
    const node = app.graph._nodes.find((node) => node.type === type);
    const [x, y] = node.getConnectionPos(input, slot);
    const { offset, scale } = app.canvas.ds;
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return [canvas.x + (x + offset[0]) * scale, canvas.y + (y + offset[1]) * scale];
}"""
_SET = """([type, name, value]) => {
    const node = app.graph._nodes.find((node) => node.type === type);
    const widget = node.widgets.find((widget) => widget.name === name);
    widget.value = value;
    widget.callback?.(value);
}"""
_REPORT = "() => app.graph._nodes.find((node) => node.type === 'GuidanceInfoSegkern').report.value"


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    with chromium() as browser:
        page = browser.new_page(viewport=_SIZE)
        page.set_default_timeout(_MILLISECONDS)
        page.goto(server.address)
        page.wait_for_function("() => !!window.app?.graph?._nodes?.length")  # the workflow that a first visit shows
        yield page


def place(page: Any, words: str, title: str, x: int, y: int) -> None:
    """Search for a node like a user, and place the first result, which must have this title."""
    field = page.get_by_placeholder("Add a node...")

    def opened() -> bool:  # the page does not respond immediately
        page.mouse.dblclick(x, y)
        page.wait_for_timeout(500)
        return field.is_visible()

    wait_for(opened)
    field.fill(words)
    page.locator("#result-item-0", has_text=title).click()
    field.wait_for(state="hidden")
    page.mouse.click(x, y)


def choose(page: Any, node: str, **values: Any) -> None:
    """Set widgets of a node."""
    for name, value in values.items():
        page.evaluate(_SET, [node, name, value])


def test_the_node_is_found_placed_and_connected(page: Any) -> None:
    page.evaluate("() => app.graph.clear()")
    place(page, "Load Checkpoint", "Load Checkpoint", 200, 200)
    place(page, "SEG", "Smoothed Energy Guidance (SEG)", 650, 200)
    source = page.evaluate(_SLOT, ["CheckpointLoaderSimple", False, 0])
    target = page.evaluate(_SLOT, ["SmoothedEnergyGuidanceSegkern", True, 0])
    page.mouse.move(*source)
    page.mouse.down()
    page.mouse.move(*target, steps=5)
    page.mouse.up()
    placed = "() => app.graph._nodes.find((node) => node.type === 'SmoothedEnergyGuidanceSegkern')"
    page.wait_for_function(f"{placed}.inputs[0].link !== null")
    names = f"{placed}.widgets.map((widget) => widget.name)"
    common = ["layers", "start_percent", "end_percent", "rescale"]
    assert page.evaluate(names) == ["scale", "blur", *common]
    choose(page, "SmoothedEnergyGuidanceSegkern", blur="finite")
    assert page.evaluate(names) == ["scale", "blur", "blur.sigma", *common]
    page.screenshot(path=_SCREENSHOTS / "nodes.png")


def test_the_template_opens_and_runs_and_an_error_is_shown(page: Any, server: Server) -> None:
    page.get_by_text("Templates", exact=True).first.click()
    page.get_by_text("segkern", exact=True).first.click()
    page.get_by_text("SDXL with SEG", exact=True).first.click()
    page.wait_for_function("() => app.graph._nodes.some((node) => node.type === 'SaveImage')")
    page.get_by_role("heading", name="All Templates").wait_for(state="hidden")
    choose(page, "EmptyLatentImage", width=192, height=128)
    choose(page, "KSampler", steps=3)
    run = page.get_by_test_id("queue-button")
    run.click()
    page.wait_for_function(_REPORT)
    report = page.evaluate(_REPORT)
    assert "SEG, scale 3, infinite sigma: acted in 3 of 3 evaluations" in report
    page.screenshot(path=_SCREENSHOTS / "page.png")

    choose(page, "SmoothedEnergyGuidanceSegkern", layers="d9")
    run.click()
    page.get_by_text("View details").click()
    page.get_by_text("unknown layer 'd9'").first.wait_for()
    page.screenshot(path=_SCREENSHOTS / "error.png")
    wait_for(lambda: not server.get("/queue")["queue_running"])

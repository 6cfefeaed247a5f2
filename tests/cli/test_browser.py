# SPDX-License-Identifier: Apache-2.0
"""The playground in a real Chromium, served by the real command."""

from __future__ import annotations

import io
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.cli.browser_tools import PATIENCE, SIZE, chromium, serving

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as window:
        yield window


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving() as (url, _):
        yield url


class Visit:
    """A page that somebody looks at, and what went wrong on it."""

    def __init__(self, browser: Any, address: str, size: dict[str, int] = SIZE) -> None:
        self.context = browser.new_context(viewport=size, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self._note(said.type in ("error", "warning"), said.text))
        self.page.on("pageerror", lambda error: self._note(True, error))
        self.page.on("response", lambda answer: self._note(answer.status >= 400, f"{answer.status} {answer.url}"))
        own = (address, "data:", "blob:")
        self.page.on("request", lambda asked: self._note(not asked.url.startswith(own), f"asked {asked.url}"))
        self.page.goto(address)
        self.button("Draw").wait_for()

    def _note(self, is_wrong: bool, what: object) -> None:
        if is_wrong:
            self.wrong.append(str(what))

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def field(self, label: str) -> Any:
        return self.page.get_by_label(label)

    def kind(self, name: str) -> Any:
        return self.page.get_by_role("checkbox", name=name, exact=True)

    def fill(self, label: str, text: str) -> None:
        self.field(label).first.fill(text)

    def few_steps(self, steps: int = 2) -> None:
        self.fill("Steps", str(steps))

    def message(self) -> str:
        return str(self.page.locator("#message").inner_text())

    def press_draw(self) -> None:
        self.button("Draw").click()

    def drawn(self) -> tuple[Any, Any]:
        """After a press of Draw that goes well: the pictures without and with guidance, from the page itself."""
        self.button("Draw").and_(self.page.locator(":disabled")).wait_for()
        self.page.locator("#message", has_text="Drawn in").wait_for()
        self.button("Draw").and_(self.page.locator(":enabled")).wait_for()
        return self.shown("plain"), self.shown("guided")

    def draw(self) -> tuple[Any, Any]:
        self.press_draw()
        return self.drawn()

    def shown(self, name: str) -> Any:
        source = self.page.locator(f"#{name} img").get_attribute("src")
        return opened(self.page.request.get(source).body())

    def downloaded(self, name: str) -> Any:
        with self.page.expect_download() as waited:
            self.button(name).click()
        return opened(Path(waited.value.path()).read_bytes())

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def program(self) -> str:
        """The Python of the page, as its button copies it."""
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.tab("Python")
        self.page.locator("#snippet").get_by_role("button", name=re.compile("copy", re.IGNORECASE)).click()
        return str(self.page.evaluate("navigator.clipboard.readText()"))


def opened(png: bytes) -> Any:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def same(first: Image.Image, second: Image.Image) -> bool:
    return first.size == second.size and first.tobytes() == second.tobytes()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Visit]:
    open_page = Visit(browser, address)
    yield open_page
    open_page.context.close()
    assert open_page.wrong == []


def test_the_page_is_named_and_every_input_labelled(visit: Visit) -> None:
    assert visit.page.title() == "segkern"
    unnamed = visit.page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select")]
        .filter(e => e.checkVisibility() && e.type != "hidden")
        .filter(e => !(e.getAttribute("aria-label") || [...(e.labels || [])].some(l => l.innerText.trim())))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_draw_shows_both_pictures_and_what_was_done(visit: Visit, tmp_path: Path) -> None:
    plain, guided = visit.draw()  # with everything as it is at first
    assert plain.size == guided.size == (64, 64)
    assert not same(plain, guided)
    text = visit.page.locator("#timing").inner_text()
    assert re.search(r"without guidance\s+\d+\.\d\d\s+1\.00\s+with guidance\s+\d+\.\d\d", text)
    assert re.search(r"m0\s+20 of 20\s+\d+\.\d%\s+mid_block", visit.page.locator("#report").inner_text())
    visit.tab("Energy")
    visit.page.wait_for_function("document.querySelector('#maps img')?.naturalWidth > 300")
    visit.page.screenshot(path=str(tmp_path / "drawn.png"))


def test_the_copied_program_draws_what_was_downloaded(
    visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit.few_steps()
    visit.fill("Negative prompt", 'a "blue" ring, grün')
    visit.kind("PAG").check()
    visit.field("PAG: scale").fill("1.5")
    plain, guided = visit.draw()
    files = {name: visit.downloaded(f"Download {name} guidance") for name in ("without", "with")}
    assert same(files["without"], plain)
    assert same(files["with"], guided)
    assert files["with"].text["guidance"] == "SEG + PAG"
    assert files["with"].text["pag_scale"] == "1.5"
    assert files["with"].text["negative_prompt"] == 'a "blue" ring, grün'
    assert files["without"].text["guidance"] == "none"
    program = visit.program()
    assert "PAG(scale=1.5" in program
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    with Image.open(tmp_path / "guided.png") as again:
        assert same(again, files["with"])


def test_sigma_changes_the_guided_picture_alone(visit: Visit) -> None:
    visit.few_steps()
    visit.field("Layers of SEG and PAG").click()
    visit.page.keyboard.type("u0-1")
    visit.page.keyboard.press("Enter")
    plain, infinite = visit.draw()
    slider = visit.page.locator("#sigma-slider input[type=range]")
    slider.focus()
    for _ in range(16):  # from infinity
        slider.press("ArrowLeft")
    expect(visit.field("SEG: sigma")).to_have_value("4.76")
    visit.page.keyboard.press("Tab")
    again, finite = visit.draw()
    assert same(plain, again)
    assert not same(infinite, finite)
    file = visit.downloaded("Download with guidance")
    assert (file.text["seg_sigma"], file.text["seg_layers"]) == ("4.76", "mid,u0-1")
    visit.fill("SEG: sigma", "inf")
    visit.page.keyboard.press("Tab")
    expect(slider).to_have_value("33")
    assert same(visit.draw()[1], infinite)


def test_an_error_is_said_and_the_picture_stays(visit: Visit) -> None:
    visit.few_steps()
    before = visit.draw()

    def refused(*words: str) -> None:
        visit.press_draw()
        alert = visit.page.locator("#message [role=alert]", has_text=words[0])
        alert.wait_for()
        assert all(word in alert.inner_text() for word in words)
        assert all(map(same, before, (visit.shown("plain"), visit.shown("guided"))))

    visit.fill("SEG: sigma", "wide")
    visit.page.keyboard.press("Tab")
    refused("sigma must be a number", "'wide'")
    visit.fill("SEG: sigma", "inf")
    visit.kind("SEG").uncheck()
    refused("choose at least one guidance")
    visit.page.get_by_role("button", name="Model").click()
    visit.fill("Checkpoint", "no/such/folder")
    refused("no file or folder 'no/such/folder'")
    visit.button("Load").click()
    visit.page.locator("#model-message [role=alert]", has_text="no file or folder 'no/such/folder'").wait_for()


def test_stop_ends_a_run_and_the_next_is_the_same(visit: Visit) -> None:
    visit.few_steps()
    before = visit.draw()
    visit.few_steps(400)
    visit.press_draw()
    visit.page.locator("#message progress").wait_for()
    visit.button("Stop").click()
    visit.page.locator("#message", has_text="Stopped").wait_for()
    assert all(map(same, before, (visit.shown("plain"), visit.shown("guided"))))
    visit.few_steps()
    assert all(map(same, before, visit.draw()))


def test_a_narrow_window_shows_everything(browser: Any, address: str, tmp_path: Path) -> None:
    visit = Visit(browser, address, {"width": 420, "height": 900})
    visit.few_steps()
    visit.draw()
    for name in ("Report", "Energy", "Python"):
        visit.tab(name)
        visit.page.wait_for_timeout(500)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 420
    visit.page.screenshot(path=str(tmp_path / "narrow.png"), full_page=True)
    visit.context.close()
    assert visit.wrong == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_command_ends_cleanly_while_it_draws(browser: Any, number: signal.Signals) -> None:
    with serving("demo") as (address, process):
        visit = Visit(browser, address)
        visit.few_steps(400)
        visit.press_draw()
        visit.page.locator("#message progress").wait_for()
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
        visit.context.close()
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert output.splitlines() == ["segkern ui: ended"]

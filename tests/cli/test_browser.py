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

from segkern.generation.demo import PROMPTED
from tests.cli.browser_tools import PATIENCE, PHONE, SIZE, chromium, serving

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
    """An open page, and everything that went wrong on it."""

    def __init__(self, browser: Any, address: str, size: dict[str, int] = SIZE) -> None:
        self.context = browser.new_context(viewport=size, accept_downloads=True, has_touch=size == PHONE)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE * 1000)
        self.wrong: list[str] = []
        self.page.on("console", lambda said: self._note(said.type in ("error", "warning"), said.text))
        self.page.on("pageerror", lambda error: self._note(True, error))
        self.page.on("response", lambda answer: self._note(answer.status >= 400, f"{answer.status} {answer.url}"))
        own = (address, "data:", "blob:")
        self.page.on("request", lambda asked: self._note(not asked.url.startswith(own), f"requested {asked.url}"))
        self.page.goto(address)
        self.button("Generate").wait_for()

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

    def section(self, title: str) -> None:
        self.page.get_by_role("button", name=title).click()

    def few_steps(self, steps: int = 2) -> None:
        if not self.field("Steps").is_visible():
            self.section("Image")
        self.fill("Steps", str(steps))

    def click_generate(self) -> None:
        self.button("Generate").click()

    def finished(self) -> tuple[Any, Any]:
        """Wait for a run; return the images before and after, as the page shows them."""
        self.button("Generate").and_(self.page.locator(":disabled")).wait_for()
        self.page.locator("#message", has_text="Generated in").wait_for()
        self.button("Generate").and_(self.page.locator(":enabled")).wait_for()
        return self.shown("before"), self.shown("after")

    def generate(self) -> tuple[Any, Any]:
        self.click_generate()
        return self.finished()

    def shown(self, name: str) -> Any:
        source = self.page.locator(f"#{name} img").evaluate("image => image.src")
        return opened(self.page.request.get(source).body())

    def downloaded(self, name: str) -> Any:
        with self.page.expect_download() as waited:
            self.page.get_by_role("link", name=name).click()
        return opened(Path(waited.value.path()).read_bytes())

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def program(self) -> str:
        """Return the Python code of the page, as its button copies it."""
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.tab("Python")
        self.page.locator("#snippet").get_by_role("button", name=re.compile("copy", re.IGNORECASE)).click()
        return str(self.page.evaluate("navigator.clipboard.readText()"))

    def top(self, selector: str) -> float:
        return float(self.page.locator(selector).first.evaluate("e => e.getBoundingClientRect().top + scrollY"))


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
    for title in ("Layers and steps of guidance", "Image", "Also measure", "Model"):
        visit.section(title)
    unnamed = visit.page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, select")]
        .filter(e => e.checkVisibility() && e.type != "hidden")
        .filter(e => !(e.getAttribute("aria-label") || [...(e.labels || [])].some(l => l.innerText.trim())))
        .map(e => e.outerHTML)"""
    )
    assert unnamed == []


def test_generate_shows_both_images_and_the_report(visit: Visit, tmp_path: Path) -> None:
    before, after = visit.generate()  # with the fields of a new page
    assert before.size == after.size == (64, 64)
    assert not same(before, after)
    assert visit.page.locator("#before figcaption").inner_text() == "Before: no guidance"
    assert visit.page.locator("#after figcaption").inner_text() == "After: SEG sigma inf"
    text = visit.page.locator("#timing").inner_text()
    assert re.search(r"no guidance\s+\d+\.\d\d\s+1\.00\s+SEG sigma inf\s+\d+\.\d\d", text)
    assert re.search(r"m0\s+20 of 20\s+\d+\.\d%\s+mid_block", visit.page.locator("#report").inner_text())
    visit.tab("Energy")
    visit.page.wait_for_function("document.querySelector('#maps img')?.naturalWidth > 300")
    visit.page.screenshot(path=str(tmp_path / "generated.png"))


def test_the_copied_program_generates_the_downloaded_image(
    visit: Visit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visit.few_steps()
    visit.fill("Negative prompt", 'a "blue" ring, grün')
    visit.fill("CFG scale", "3")
    visit.kind("PAG").check()
    visit.field("PAG scale").fill("1.5")
    before, after = visit.generate()
    files = {name: visit.downloaded(f"Download {name}") for name in ("before", "after")}
    assert same(files["before"], before)
    assert same(files["after"], after)
    assert files["after"].text["guidance"] == "SEG + PAG"
    assert files["after"].text["pag_scale"] == "1.5"
    assert files["after"].text["negative_prompt"] == 'a "blue" ring, grün'
    assert files["before"].text["guidance"] == "none"
    program = visit.program()
    assert "PAG(scale=1.5" in program
    monkeypatch.chdir(tmp_path)
    exec(program, {})
    with Image.open(tmp_path / "guided.png") as again:
        assert same(again, files["after"])


def test_sigma_changes_only_the_image_after_guidance(visit: Visit) -> None:
    visit.few_steps()
    visit.section("Layers and steps of guidance")
    visit.field(
        "Layers",
    ).first.click()
    visit.page.keyboard.type("u0-1")
    visit.page.keyboard.press("Enter")
    before, infinite = visit.generate()
    slider = visit.page.locator("#sigma-slider input[type=range]")
    expect(slider).to_have_attribute("aria-valuetext", "sigma infinite")
    slider.focus()
    for _ in range(16):  # from infinity
        slider.press("ArrowLeft")
    expect(visit.field("SEG sigma")).to_have_value("4.76")
    expect(slider).to_have_attribute("aria-valuetext", "sigma 4.76")
    visit.page.keyboard.press("Tab")
    again, finite = visit.generate()
    assert same(before, again)
    assert not same(infinite, finite)
    file = visit.downloaded("Download after")
    assert (file.text["seg_sigma"], file.text["seg_layers"]) == ("4.76", "mid,u0-1")
    visit.kind("SEG").uncheck()
    visit.kind("SEG").check()
    visit.fill("SEG sigma", "8")
    visit.page.keyboard.press("Tab")
    expect(slider).to_have_value("20")
    expect(slider).to_have_attribute("aria-valuetext", "sigma 8")
    visit.fill("SEG sigma", "inf")
    visit.page.keyboard.press("Tab")
    expect(slider).to_have_value("33")
    assert same(visit.generate()[1], infinite)


def test_the_divider_moves_by_keyboard_and_by_mouse(visit: Visit) -> None:
    visit.few_steps()
    visit.generate()
    visit.tab("Slider")
    divider = visit.page.get_by_role("slider", name="Divider")
    shown = visit.page.locator("#divided img.after")
    assert shown.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 50%)"
    divider.focus()
    divider.press("ArrowRight")
    assert shown.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 51%)"
    assert divider.get_attribute("aria-valuetext") == "51 percent"
    divider.press("Home")
    assert shown.evaluate("e => getComputedStyle(e).clipPath") == "inset(0px 0px 0px 0%)"
    box = divider.bounding_box()
    visit.page.mouse.click(box["x"] + 0.8 * box["width"], box["y"] + 0.9 * box["height"])
    assert 75 <= int(divider.input_value()) <= 85
    visit.tab("Difference")
    visit.page.wait_for_function("document.querySelector('#difference img')?.naturalWidth == 64")
    assert "amplified 4 times" in visit.page.locator("#difference").inner_text()


def test_everything_works_by_keyboard(visit: Visit) -> None:
    visit.few_steps()
    before = visit.generate()
    prompt = PROMPTED[0].prompt
    example = visit.button(prompt)
    example.focus()
    visit.page.keyboard.press("Enter")
    after = visit.finished()
    assert not same(before[1], after[1])
    expect(visit.field("Prompt").first).to_have_value(prompt)
    expect(visit.field("CFG scale")).to_have_value("3")
    visit.button("SEG + PAG").focus()
    visit.page.keyboard.press("Enter")
    expect(visit.kind("PAG")).to_be_checked()
    expect(visit.field("SEG scale")).to_have_value("1.5")
    expect(visit.field("PAG scale")).to_have_value("1.5")
    visit.field("Prompt").first.focus()
    visit.page.keyboard.press("Shift+Enter")
    visit.finished()
    history = visit.page.locator("#history button")
    expect(history).to_have_count(3)
    assert "CFG 3 + SEG sigma inf + PAG 1.5" in history.first.inner_text()
    history.last.focus()
    visit.page.keyboard.press("Enter")
    visit.page.locator("#message", has_text="Restored the settings of SEG sigma inf").wait_for()
    expect(visit.field("Prompt").first).to_have_value("")
    expect(visit.kind("PAG")).not_to_be_checked()
    expect(visit.field("SEG scale")).to_have_value("3")
    assert all(map(same, before, (visit.shown("before"), visit.shown("after"))))
    assert all(map(same, before, visit.generate()))


def test_an_error_leaves_the_images(visit: Visit) -> None:
    visit.few_steps()
    before = visit.generate()

    def refused(*words: str) -> None:
        visit.click_generate()
        alert = visit.page.locator("#message [role=alert]", has_text=words[0])
        alert.wait_for()
        assert all(word in alert.inner_text() for word in words)
        assert all(map(same, before, (visit.shown("before"), visit.shown("after"))))

    visit.fill("SEG sigma", "wide")
    visit.page.keyboard.press("Tab")
    refused("SEG sigma must be a number", "'wide'")
    visit.fill("SEG sigma", "inf")
    visit.kind("SEG").uncheck()
    refused("Guidance: select at least one")
    visit.section("Model")
    visit.fill("Checkpoint", "no/such/folder")
    refused("no file or folder 'no/such/folder'")
    visit.button("Load").click()
    visit.page.locator("#model-message [role=alert]", has_text="no file or folder 'no/such/folder'").wait_for()


def test_stop_ends_a_run_and_the_next_is_the_same(visit: Visit) -> None:
    visit.few_steps()
    before = visit.generate()
    visit.few_steps(400)
    visit.click_generate()
    visit.page.locator("#message", has_text=re.compile(r"Run 1 of 3, no guidance: step \d+ of 400")).wait_for()
    visit.button("Stop").click()
    visit.page.locator("#message", has_text="Stopped").wait_for()
    assert all(map(same, before, (visit.shown("before"), visit.shown("after"))))
    visit.few_steps()
    assert all(map(same, before, visit.generate()))


def test_a_phone_shows_controls_before_results_and_covers_nothing(browser: Any, address: str, tmp_path: Path) -> None:
    visit = Visit(browser, address, PHONE)
    width = PHONE["width"]
    assert visit.top("#message") < visit.top("#sigma-slider") < visit.top("#right")
    visit.few_steps()
    for _ in range(3):  # the history becomes wider than the page
        visit.generate()
    visit.page.wait_for_function("scrollY > 0")
    image = visit.page.locator("#after img").bounding_box()
    assert image["x"] + image["width"] <= width
    assert image["y"] >= 0
    assert image["y"] + image["height"] <= PHONE["height"]  # scrolled to the images
    for name in ("Slider", "Difference", "Side by side", "Report", "Energy", "Python"):
        visit.tab(name)
        visit.page.wait_for_timeout(300)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
    covered = visit.page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, a, #pair img")]
        .filter(e => e.checkVisibility() && !e.disabled && !e.closest("#history, .cm-editor, .visually-hidden"))
        .filter(e => {
            e.scrollIntoView({block: "center"});
            const box = e.getBoundingClientRect();
            const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return box.width && !(e.contains(hit) || hit?.contains(e));
        }).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert covered == []
    visit.page.screenshot(path=str(tmp_path / "phone.png"), full_page=True)
    visit.context.close()
    assert visit.wrong == []


def test_other_machines_need_the_printed_password(browser: Any) -> None:
    with serving("--host", "0.0.0.0") as (printed, process):
        address = printed.replace("0.0.0.0", "127.0.0.1")
        assert process.stdout is not None
        words = process.stdout.readline().split()
        name, password = words[words.index("as") + 1], words[-1]
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        addresses: list[str] = []
        page.on("request", lambda asked: addresses.append(asked.url))
        for path in ("config", "gradio_api/file=/etc/hostname", "gradio_api/queue/data?session_hash=a"):
            assert page.request.get(f"{address}{path}").status == 401
        page.goto(address)
        for given in (f"{password}x", password):
            page.get_by_label("username").fill(name)
            page.get_by_label("password").fill(given)
            page.get_by_role("button", name="Login").click()
            if given != password:
                page.get_by_text("Incorrect Credentials").wait_for()
        page.get_by_role("button", name="Generate", exact=True).click()
        page.locator("#message", has_text="Generated in").wait_for()
        page.wait_for_function("document.querySelector('#after img').naturalWidth == 64")
        assert not any(password in url for url in addresses)
        source = page.locator("#after img").evaluate("image => image.src")
        stranger = browser.new_context()
        assert stranger.request.get(source).status == 401
        stranger.close()
        context.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_the_command_stops_cleanly_during_a_run(browser: Any, number: signal.Signals) -> None:
    with serving("demo") as (address, process):
        visit = Visit(browser, address)
        visit.few_steps(400)
        visit.click_generate()
        visit.page.locator("#message progress").wait_for()
        process.send_signal(number)
        output, _ = process.communicate(timeout=PATIENCE)
        visit.context.close()
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert output.splitlines() == ["segkern ui: stopped"]

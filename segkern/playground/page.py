# SPDX-License-Identifier: Apache-2.0
"""The page at work: what its buttons do, and the server that it comes from."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr

from segkern.generation.drawing import Specs, label
from segkern.playground import choices, layout
from segkern.playground.form import Form, read, words
from segkern.playground.markup import STYLE, refused, table, told, under_way
from segkern.playground.models import Models, Named
from segkern.playground.runs import Result, Run, Stopped, carry_out

_FONTS = ("system-ui", "sans-serif")  # the page loads none
_FIXED_FONTS = ("ui-monospace", "monospace")
_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_AT_ONCE: dict[str, Any] = {**_QUIET, "queue": False}
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline", "api_visibility": "private"}
_KEPT_RUNS = 20
_KEPT_SECONDS = 24 * 3600  # of pictures that pages have shown


class Playground:
    """The page and the runs that its visitors asked for; models are shared, runs follow one another.

    Args:
        models: that draw.
        named: the model that a new page has.
        folder: for pictures.
    """

    def __init__(self, models: Models, named: Named, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._runs: dict[str, Run] = {}  # under way or waiting, by their tickets; one of each page
        self._taking = threading.Lock()
        self._done: deque[Path] = deque()  # folders of runs
        self._build(named)

    def _build(self, named: Named) -> None:
        described = self._models.describe(named)
        with gr.Blocks(
            title="segkern", analytics_enabled=False, delete_cache=(3600, _KEPT_SECONDS), fill_width=True
        ) as self.blocks:
            loaded, ticket = gr.State(named), gr.State("")
            gr.Markdown(
                "# segkern\nThe same picture with and without guidance by the model's own attention.",
                elem_id="heading",
            )
            with gr.Row(elem_id="main"):
                with gr.Column(scale=4, min_width=330, elem_id="left"):
                    self._controls = layout.controls(named, described)
                with gr.Column(scale=7, min_width=330, elem_id="right"):
                    self._shown = layout.results()
            self._connect(loaded, ticket)

    def _connect(self, loaded: Any, ticket: Any) -> None:
        at, shown = self._controls, self._shown
        buttons = [at.draw, at.halt]
        gr.on(
            [at.draw.click, at.form.prompt.submit],
            self._take,
            [loaded, at.model, at.config, *at.fields],
            [ticket, at.message, *buttons],
            concurrency_limit=None,  # in the queue, since a state has no change event elsewhere, but waiting for nobody
            **_QUIET,
        )
        results = [at.message, *vars(shown).values()]
        ticket.change(self._run, ticket, results, show_progress="hidden", **_ONE_AT_A_TIME).then(
            self._buttons, None, buttons, **_AT_ONCE
        )
        at.halt.click(self._stop, ticket, at.message, **_AT_ONCE)
        self.blocks.unload(self._leave)

        choose = [loaded, at.model_message, at.form.size, at.form.layers, at.examples]
        gr.on(
            [at.load.click, at.model.submit, at.config.submit],
            self._load,
            [at.model, at.config],
            choose,
            show_progress_on=at.model_message,
            **_ONE_AT_A_TIME,
        )
        at.sigma_slider.input(None, at.sigma_slider, at.form.sigma, js=layout.follow_slider(), **_QUIET)
        typed = [at.form.sigma.input, at.form.sigma.blur]  # the first comes with keys alone, not when text is pasted
        gr.on(typed, layout.follow_sigma, at.form.sigma, at.sigma_slider, **_AT_ONCE)
        of_kinds = [at.blur, at.form.pag_scale, at.form.sag_scale, at.form.layers]
        at.form.kinds.change(layout.shown_kinds, at.form.kinds, of_kinds, **_AT_ONCE)
        at.examples.click(lambda sample: sample[0], at.examples, at.form.prompt, **_AT_ONCE)
        at.another.click(lambda: secrets.randbelow(2**32), None, at.form.seed, **_AT_ONCE)

    def _take(self, request: gr.Request, named: Named, model: str, config: str, *values: Any) -> list[Any]:
        """Draw was pressed: check the fields, and let the run wait for its turn."""
        try:
            if Named(model.strip(), config.strip()) != named:
                raise ValueError(
                    f"the model {model.strip()!r} is not loaded yet: press Load, or Draw with {named.model!r}"
                )
            described = self._models.describe(named)
            settings = read(Form(*values), described.pipe, self._models.device, self._models.dtype)
        except (ValueError, OSError) as error:
            return [gr.skip(), refused(words(error)), gr.skip(), gr.skip()]
        ticket, owner = secrets.token_hex(8), request.session_hash or ""
        with self._taking:
            if self._busy(owner):  # Draw was pressed twice
                return [gr.skip()] * 4
            self._runs[ticket] = Run(named, settings, owner)
        return [ticket, told("Waiting for its turn."), gr.update(interactive=False), gr.update(interactive=True)]

    def _run(self, ticket: str) -> Iterator[dict[Any, Any]]:
        """Its turn has come: tell every step, then show what was drawn."""
        message = self._controls.message
        run = self._runs.get(ticket)
        if run is None:  # done: after two presses of Draw the page sends a ticket twice
            yield {message: gr.skip()}  # without anything gradio would empty the page
            return
        news: SimpleQueue[tuple[int, int, str] | None] = SimpleQueue()
        with ThreadPoolExecutor(1, "segkern-draw") as pool:
            drawing = pool.submit(carry_out, run, self._models, self._folder, lambda *each: news.put(each))
            drawing.add_done_callback(lambda _: news.put(None))
            try:
                for done, steps, what in iter(news.get, None):
                    if not run.stopping:
                        yield {message: under_way(done, steps, what)}
            finally:
                run.stop()  # of a page that was closed; nothing is left to stop of another
                del self._runs[ticket]
        try:
            yield self._show(run, drawing.result())
        except Stopped:
            yield {message: told("Stopped. What is shown is from before.")}
        except (ValueError, OSError) as error:
            yield {message: refused(words(error))}
        except Exception as error:
            yield {message: refused(f"Drawing failed: {words(error)}")}
            raise

    def _show(self, run: Run, result: Result) -> dict[Any, Any]:
        shown, enlarged = self._shown, ["enlarged"] if result.small else []
        specs = run.settings.specs
        done = f"Drawn in {result.seconds:.1f} s."
        message = refused(" ".join([done, *result.problems])) if result.problems else told(done)
        self._done.append(result.plain.parent)
        while len(self._done) > _KEPT_RUNS:  # gradio has copied what it serves
            shutil.rmtree(self._done.popleft())
        name = f"With guidance: {_caption(specs)}"
        return {
            self._controls.message: message,
            shown.plain: gr.update(value=str(result.plain), elem_classes=enlarged),
            shown.guided: gr.update(value=str(result.guided), elem_classes=enlarged, label=name),
            shown.plain_file: gr.update(value=str(result.plain), interactive=True),
            shown.guided_file: gr.update(value=str(result.guided), interactive=True),
            shown.timing: table("Time", ["picture", "seconds", "relative"], result.timing),
            shown.report: table("Where guidance acted", result.headings, result.report),
            shown.maps: None if result.maps is None else str(result.maps),
            shown.snippet: result.snippet,
        }

    def _busy(self, owner: str) -> bool:
        """Whether a page has a run under way or waiting."""
        return any(run.owner == owner for run in list(self._runs.values()))

    def _buttons(self, request: gr.Request) -> list[Any]:
        """Draw and Stop after a run."""
        busy = self._busy(request.session_hash or "")
        return [gr.update(interactive=not busy), gr.update(interactive=busy)]

    def _stop(self, ticket: str) -> Any:
        """Stop was pressed."""
        run = self._runs.get(ticket)
        if run is None:
            return gr.skip()
        run.stop()
        return told("Stopping after this step." if run.begun else "It will not be drawn; its turn had not come.")

    def _leave(self, request: gr.Request) -> None:
        """A page was closed or loaded again: nobody waits for its runs."""
        for run in list(self._runs.values()):
            if run.owner == request.session_hash:
                run.stop()

    def _load(self, model: str, config: str) -> list[Any]:
        """Load was pressed."""
        named = Named(model.strip(), config.strip())
        try:
            described = self._models.describe(named)
            self._models.load(named)
        except (ValueError, OSError) as error:
            return [gr.skip(), refused(words(error)), gr.skip(), gr.skip(), gr.skip()]
        except Exception as error:  # whatever diffusers meets in a configuration
            said = f"{named.model!r} cannot be loaded: {type(error).__name__} {words(error)}"
            return [gr.skip(), refused(said), gr.skip(), gr.skip(), gr.skip()]
        offered = [choices.named(size) for size in choices.sizes(described.pipe)]
        examples = layout.example_prompts(described)
        return [
            named,
            told(f"{named.model} is loaded."),
            gr.update(choices=offered, value=offered[0]),
            gr.update(choices=choices.layers(described.pipe), value=choices.usual_layers(described.pipe)),
            gr.update(samples=examples, visible=bool(examples)),
        ]

    def start(self, host: str, port: int) -> str:
        """Serve the page; returns its address."""
        with _no_proxy():
            return self._launch(host, port)

    def _launch(self, host: str, port: int) -> str:
        _, address, _ = self.blocks.queue(api_open=False).launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            run_history=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            footer_links=[],
            theme=_theme(),
            css=STYLE,
        )
        return str(address)

    def end(self) -> None:
        """Stop every run and the server."""
        for run in list(self._runs.values()):
            run.stop()
        self.blocks.close(verbose=False)


@contextmanager
def _no_proxy() -> Iterator[None]:
    """Starting, gradio asks its own server whether it is there, which a proxy of the machine's knows nothing of."""
    names = ("no_proxy", "NO_PROXY")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _caption(specs: Specs) -> str:
    """One guidance in a few words, such as ``SEG sigma 4`` or ``PAG 3``, several by name: there is little room."""
    kinds = [type(spec).__name__ for spec in specs]
    if len(kinds) > 1:
        return " + ".join(kinds)
    return f"{kinds[0]} {label(specs).removeprefix(kinds[0]).strip()}"


def _theme() -> Any:
    theme = gr.themes.Default(font=_FONTS, font_mono=_FIXED_FONTS, spacing_size="sm", text_size="md")
    faint = {"body_text_color_subdued": "*neutral_500", "block_info_text_color": "*neutral_500"}  # that can be read
    return theme.set(**faint)

# SPDX-License-Identifier: Apache-2.0
"""The page at work: the actions of its buttons, and its server."""

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
from segkern.generation.loading import Source, find_model
from segkern.playground import choices, layout
from segkern.playground.form import read
from segkern.playground.markup import STYLE, error_message, html_table, progress_message, status_message
from segkern.playground.models import Models
from segkern.playground.runs import Run, RunResult, Stopped, carry_out

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
        model: that a new page has, as a user names it.
        config: the configuration of a single file; empty for others.
        folder: for pictures.
    """

    def __init__(self, models: Models, model: str, config: str, folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._runs: dict[str, Run] = {}  # under way or waiting, by their tickets; one of each page
        self._taking = threading.Lock()
        self._past: deque[Path] = deque()  # folders of runs
        source = find_model(model, config or None)
        with gr.Blocks(
            title="segkern", analytics_enabled=False, delete_cache=(3600, _KEPT_SECONDS), fill_width=True
        ) as self.blocks:
            loaded, ticket = gr.State(source), gr.State("")
            gr.Markdown(
                "# segkern\nThe same picture with and without guidance by the model's own attention.",
                elem_id="heading",
            )
            with gr.Row(elem_id="main"):
                with gr.Column(scale=4, min_width=330, elem_id="left"):
                    self._fields, self._controls = layout.build_controls(source, models.describe(source), model, config)
                with gr.Column(scale=7, min_width=330, elem_id="right"):
                    self._results = layout.build_results()
            self._connect(loaded, ticket)

    def _connect(self, loaded: Any, ticket: Any) -> None:
        fields, controls = self._fields, self._controls
        buttons = [controls["draw"], controls["stop"]]
        gr.on(
            [controls["draw"].click, fields["prompt"].submit],
            self._take,
            [loaded, controls["model"], controls["config"], *fields.values()],
            [ticket, controls["message"], *buttons],
            concurrency_limit=None,  # in the queue, since a state has no change event elsewhere, but waiting for nobody
            **_QUIET,
        )
        outputs = [controls["message"], *self._results.values()]
        ticket.change(self._run, ticket, outputs, show_progress="hidden", **_ONE_AT_A_TIME).then(
            self._buttons, None, buttons, **_AT_ONCE
        )
        controls["stop"].click(self._stop, ticket, controls["message"], **_AT_ONCE)
        self.blocks.unload(self._leave)

        gr.on(
            [controls["load"].click, controls["model"].submit, controls["config"].submit],
            self._load,
            [controls["model"], controls["config"]],
            [loaded, controls["model_message"], fields["size"], fields["layers"], controls["examples"]],
            show_progress_on=controls["model_message"],
            **_ONE_AT_A_TIME,
        )
        slider, sigma = controls["sigma_slider"], fields["sigma"]
        slider.input(None, slider, sigma, js=layout.follow_slider(), **_QUIET)
        typed = [sigma.input, sigma.blur]  # the first comes with keys alone, not when text is pasted
        gr.on(typed, layout.follow_sigma, sigma, slider, **_AT_ONCE)
        of_guidances = [controls["blur"], fields["pag_scale"], fields["sag_scale"], fields["layers"]]
        fields["guidances"].change(layout.show_chosen, fields["guidances"], of_guidances, **_AT_ONCE)
        controls["examples"].click(lambda sample: sample[0], controls["examples"], fields["prompt"], **_AT_ONCE)
        controls["another_seed"].click(lambda: secrets.randbelow(2**32), None, fields["seed"], **_AT_ONCE)

    def _take(self, request: gr.Request, loaded: Source, model: str, config: str, *values: Any) -> list[Any]:
        """Draw was pressed: check the fields, and let the run wait for its turn."""
        try:
            source = find_model(model.strip(), config.strip() or None)
            if source != loaded:
                raise ValueError(f"{source.name!r} is not loaded yet: press Load, or Draw with {loaded.name!r}")
            fields = dict(zip(self._fields, values, strict=True))
            settings = read(fields, self._models.describe(loaded), self._models.device, self._models.dtype)
        except (ValueError, OSError) as error:
            return [gr.skip(), error_message(str(error)), gr.skip(), gr.skip()]
        ticket, owner = secrets.token_hex(8), request.session_hash or ""
        with self._taking:
            if self._busy(owner):  # Draw was pressed twice
                return [gr.skip()] * 4
            self._runs[ticket] = Run(loaded, settings, owner)
        waiting = status_message("Waiting for its turn.")
        return [ticket, waiting, gr.update(interactive=False), gr.update(interactive=True)]

    def _run(self, ticket: str) -> Iterator[dict[Any, Any]]:
        """Its turn has come: show every step, then the pictures."""
        message = self._controls["message"]
        run = self._runs.get(ticket)
        if run is None:  # done: after two presses of Draw the page sends a ticket twice
            yield {message: gr.skip()}  # without anything gradio would empty the page
            return
        news: SimpleQueue[tuple[int, int, str] | None] = SimpleQueue()
        with ThreadPoolExecutor(1, "segkern-draw") as pool:
            drawing = pool.submit(carry_out, run, self._models, self._folder, lambda *step: news.put(step))
            drawing.add_done_callback(lambda _: news.put(None))
            try:
                for done, steps, name in iter(news.get, None):
                    if not run.stopping:
                        yield {message: progress_message(done, steps, name)}
            finally:
                run.stop()  # of a page that was closed; nothing is left to stop of another
                del self._runs[ticket]
        try:
            yield self._show(run, drawing.result())
        except Stopped:
            yield {message: status_message("Stopped. What is shown is from before.")}
        except (ValueError, OSError) as error:
            yield {message: error_message(str(error))}
        except Exception as error:
            yield {message: error_message(f"Drawing failed: {error}")}
            raise

    def _show(self, run: Run, result: RunResult) -> dict[Any, Any]:
        results, enlarged = self._results, ["enlarged"] if result.small else []
        done = f"Drawn in {result.seconds:.1f} s."
        message = error_message(" ".join([done, *result.problems])) if result.problems else status_message(done)
        self._past.append(result.plain.parent)
        while len(self._past) > _KEPT_RUNS:  # gradio has copied what it serves
            shutil.rmtree(self._past.popleft())
        name = f"With guidance: {_caption(run.settings.specs, run.settings.request.guidance_scale)}"
        return {
            self._controls["message"]: message,
            results["plain"]: gr.update(value=str(result.plain), elem_classes=enlarged),
            results["guided"]: gr.update(value=str(result.guided), elem_classes=enlarged, label=name),
            results["plain_file"]: gr.update(value=str(result.plain), interactive=True),
            results["guided_file"]: gr.update(value=str(result.guided), interactive=True),
            results["timing"]: html_table("Time", ["picture", "seconds", "relative"], result.timing),
            results["report"]: html_table("Where guidance acted", result.headings, result.report),
            results["maps"]: None if result.maps is None else str(result.maps),
            results["snippet"]: result.snippet,
        }

    def _busy(self, owner: str) -> bool:
        """Tell if a page has a run under way or waiting."""
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
        return status_message(
            "Stopping after this step." if run.begun else "It will not be drawn; its turn had not come."
        )

    def _leave(self, request: gr.Request) -> None:
        """A page was closed or loaded again: nobody waits for its runs."""
        for run in list(self._runs.values()):
            if run.owner == request.session_hash:
                run.stop()

    def _load(self, model: str, config: str) -> list[Any]:
        """Load was pressed."""
        try:
            source = find_model(model.strip(), config.strip() or None)
            pipe = self._models.describe(source)
            self._models.load(source)
        except (ValueError, OSError) as error:
            return [gr.skip(), error_message(str(error)), *[gr.skip()] * 3]
        except Exception as error:  # whatever diffusers meets in a configuration
            message = error_message(f"{source.name!r} cannot be loaded: {type(error).__name__} {error}")
            return [gr.skip(), message, *[gr.skip()] * 3]
        sizes, examples = choices.sizes(pipe), layout.example_prompts(source)
        layers = choices.layers(pipe)
        return [
            source,
            status_message(f"{source.name} is loaded."),
            gr.update(choices=sizes, value=sizes[0]),
            gr.update(choices=layers, value=choices.usual_layers(pipe)),
            gr.update(samples=examples, visible=bool(examples)),
        ]

    def start(self, host: str, port: int) -> str:
        """Serve the page; returns its address."""
        with _no_proxy():
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


def _caption(specs: Specs, guidance_scale: float) -> str:
    """Return a short caption such as ``CFG 5 + SEG sigma 4``; several methods are named without numbers."""
    return label(specs, guidance_scale, brief=len(specs) > 1)


def _theme() -> Any:
    theme = gr.themes.Default(font=_FONTS, font_mono=_FIXED_FONTS, spacing_size="sm", text_size="md")
    faint = {"body_text_color_subdued": "*neutral_500", "block_info_text_color": "*neutral_500"}  # that can be read
    return theme.set(**faint)

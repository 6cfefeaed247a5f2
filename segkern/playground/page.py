# SPDX-License-Identifier: Apache-2.0
"""The page: actions of its buttons, and the runs that its visitors start."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import gradio as gr

from segkern.generation.drawing import default_layers
from segkern.generation.loading import Source, find_model
from segkern.generation.options import GUIDANCES
from segkern.playground import choices, layout, markup
from segkern.playground.form import read
from segkern.playground.history import History
from segkern.playground.markup import error_message, html_table, progress_message, status_message
from segkern.playground.models import Models
from segkern.playground.presets import PRESETS
from segkern.playground.runs import Progress, Run, RunResult, Stopped, generate
from segkern.playground.server import serve

_QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_UNQUEUED: dict[str, Any] = {**_QUIET, "queue": False}
_ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "pipeline", "api_visibility": "private"}
_REPORT = "Guided layers (fired: denoiser calls with guidance, moved: relative change of the layer's output)"
# On a narrow page the images are below the controls.
_SHOW_IMAGES = """() => {
  if (innerWidth <= 760 && document.querySelector("#message .done")) document.querySelector("#right").scrollIntoView();
}"""


class Playground:
    """The page and the runs of its visitors, who share the models and take turns.

    Args:
        models: Models that generate images.
        model: Model of a new page, as the user names it.
        config: Configuration of a single file; empty for other models.
        folder: Folder for the files of runs.
    """

    def __init__(self, models: Models, model: str, config: str, folder: Path) -> None:
        self._models = models
        self._folder = folder.resolve()
        self._runs: dict[str, Run] = {}  # running or waiting, by ticket; at most one per page
        self._taking = threading.Lock()
        self._history = History()
        source = find_model(model, config or None)
        with gr.Blocks(title="segkern", analytics_enabled=False, fill_width=True) as self.blocks:
            loaded, ticket = gr.State(source), gr.State("")
            gr.Markdown(
                "# segkern\nGenerate the same image with and without Smoothed Energy Guidance (SEG) or a related "
                "method.",
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
        buttons = [controls["generate"], controls["stop"]]
        take: dict[str, Any] = {
            "fn": self._take,
            "inputs": [loaded, controls["model"], controls["config"], *fields.values()],
            "outputs": [ticket, controls["message"], *buttons],
            "concurrency_limit": None,  # queued, because only then the ticket's change event fires, but without waiting
            **_QUIET,
        }
        gr.on([controls["generate"].click, fields["prompt"].submit], **take)
        filled = [fields["prompt"], fields["guidance_scale"]]
        controls["examples"].click(lambda sample: sample, controls["examples"], filled, **_UNQUEUED).then(**take)
        outputs = [controls["message"], *self._results.values()]
        ticket.change(self._run, ticket, outputs, show_progress="hidden", **_ONE_AT_A_TIME).then(
            self._buttons, None, buttons, js=_SHOW_IMAGES, **_UNQUEUED
        )
        controls["stop"].click(self._stop, ticket, controls["message"], **_UNQUEUED)
        self.blocks.unload(self._leave)

        slider, sigma = controls["sigma_slider"], fields["sigma"]
        history = self._results["history"]
        restored = [*outputs, controls["model"], controls["config"], *fields.values(), slider]
        history.click(self._restore, [history, loaded], restored, **_UNQUEUED)
        set_by_preset = [fields[name] for name in ("guidances", "seg_scale", "pag_scale", "layers", "start", "stop")]
        controls["presets"].click(
            self._preset,
            [controls["presets"], loaded],
            [controls["message"], sigma, slider, *set_by_preset],
            **_UNQUEUED,
        )
        gr.on(
            [controls["load"].click, controls["model"].submit, controls["config"].submit],
            self._load,
            [controls["model"], controls["config"], fields["guidances"]],
            [
                loaded,
                controls["model_message"],
                *(fields[name] for name in ("size", "layers", "guidances", "energy", "guidance_scale")),
                controls["examples"],
            ],
            show_progress_on=controls["model_message"],
            **_ONE_AT_A_TIME,
        )
        slider.input(None, slider, sigma, js=layout.follow_slider(), **_QUIET)
        gr.on([slider.change, self.blocks.load], None, slider, None, js=layout.announce_sigma(), **_QUIET)
        typed = [sigma.input, sigma.blur]  # pasting sends no input event
        gr.on(typed, layout.follow_sigma, sigma, slider, **_UNQUEUED)
        scales = [fields[f"{name}_scale"] for name in GUIDANCES[1:]]
        of_guidances = [controls["blur"], *scales, fields["layers"]]
        fields["guidances"].change(layout.show_chosen, fields["guidances"], of_guidances, **_UNQUEUED)
        controls["another_seed"].click(lambda: secrets.randbelow(2**32), None, fields["seed"], **_UNQUEUED)

    def _take(self, request: gr.Request, loaded: Source, model: str, config: str, *values: Any) -> list[Any]:
        """Validate the fields after a click of Generate, and queue the run."""
        try:
            source = find_model(model.strip(), config.strip() or None)
            if source != loaded:
                raise ValueError(
                    f"{source.name!r} is not loaded; click Load, or change Checkpoint back to {loaded.name!r}"
                )
            fields = dict(zip(self._fields, values, strict=True))
            settings = read(fields, self._models.describe(loaded), self._models.device, self._models.dtype)
        except (ValueError, OSError) as error:
            return [gr.skip(), error_message(str(error)), gr.skip(), gr.skip()]
        ticket, owner = secrets.token_hex(8), request.session_hash or ""
        with self._taking:
            if self._busy(owner):  # Generate was clicked twice
                return [gr.skip()] * 4
            self._runs[ticket] = Run(loaded, settings, owner, (model, config, *values))
        waiting = status_message("Waiting for another run to finish.")
        return [ticket, waiting, gr.update(interactive=False), gr.update(interactive=True)]

    def _run(self, ticket: str) -> Iterator[dict[Any, Any]]:
        """Show every step of a run, then its results."""
        message = self._controls["message"]
        run = self._runs.get(ticket)
        if run is None:  # finished: after two clicks of Generate the page sends a ticket twice
            yield {message: gr.skip()}  # gradio would clear the page if nothing were returned
            return
        news: SimpleQueue[Progress | None] = SimpleQueue()
        with ThreadPoolExecutor(1, "segkern-generate") as pool:
            generating = pool.submit(generate, run, self._models, self._folder, news.put)
            generating.add_done_callback(lambda _: news.put(None))
            try:
                for progress in iter(news.get, None):
                    if not run.stopping:
                        yield {message: progress_message(progress)}
            finally:
                run.stop()  # if the page was closed; otherwise the run has ended
                del self._runs[ticket]
        try:
            result = generating.result()
            self._history.add(run, result)
            entries = [[markup.history_entry(*kept)] for kept in self._history.runs(run.owner)]
            yield self._show(result) | {self._results["history"]: gr.update(samples=entries, visible=True)}
        except Stopped:
            yield {message: status_message("Stopped. The images shown are from the previous run.")}
        except (ValueError, OSError) as error:
            yield {message: error_message(str(error))}
        except Exception as error:
            yield {message: error_message(f"Generation failed: {error}")}
            raise

    def _show(self, result: RunResult) -> dict[Any, Any]:
        """Return updates that show the results of a run."""
        results = self._results
        done = f"Generated in {result.seconds:.1f} s."
        problems = error_message(" ".join([done, *result.problems]))
        return {
            self._controls["message"]: problems if result.problems else markup.done_message(done),
            results["pair"]: markup.side_by_side(result),
            results["divided"]: markup.divided(result),
            results["difference"]: markup.difference_view(result),
            results["timing"]: html_table("Time", ["image", "seconds", "relative"], result.timing),
            results["report"]: html_table(_REPORT, result.headings, result.report),
            results["maps"]: markup.energy_maps(result.maps),
            results["snippet"]: result.snippet,
        }

    def _restore(self, request: gr.Request, index: int, loaded: Source) -> dict[Any, Any]:
        """Show a run of the history again, and return its settings to the fields."""
        message = self._controls["message"]
        kept = self._history.find(request.session_hash or "", index)
        if kept is None:
            return {message: error_message("This run is no longer available.")}
        run, result = kept
        model, config, *values = run.fields
        fields = dict(zip(self._fields, values, strict=True))
        load = "" if run.source == loaded else f" Click Load under Model to use {run.source.name} again."
        return {
            **self._show(result),
            message: status_message(f"Restored the settings of {result.captions[1]}.{load}"),
            self._controls["model"]: model,
            self._controls["config"]: config,
            self._controls["sigma_slider"]: layout.follow_sigma(fields["sigma"]),
            **{self._fields[name]: value for name, value in fields.items()},
        }

    def _preset(self, index: int, loaded: Source) -> list[Any]:
        """Return a preset's settings to the fields."""
        preset = PRESETS[index]
        layers = default_layers(self._models.describe(loaded))
        return [
            status_message(f"{preset.name}: {preset.describe()}. Click Generate."),
            preset.sigma,
            layout.follow_sigma(preset.sigma),
            list(preset.guidances),
            preset.seg_scale,
            preset.pag_scale,
            layers,
            0,
            1,
        ]

    def _busy(self, owner: str) -> bool:
        """Return whether a page has a run that is running or waiting."""
        return any(run.owner == owner for run in list(self._runs.values()))

    def _buttons(self, request: gr.Request) -> list[Any]:
        """Return updates of Generate and Stop after a run."""
        busy = self._busy(request.session_hash or "")
        return [gr.update(interactive=not busy), gr.update(interactive=busy)]

    def _stop(self, ticket: str) -> Any:
        """Stop the page's run."""
        run = self._runs.get(ticket)
        if run is None:
            return gr.skip()
        run.stop()
        return status_message("Stopping after this step." if run.begun else "Canceled before it started.")

    def _leave(self, request: gr.Request) -> None:
        """Stop the runs of a page that was closed or reloaded, and delete its history."""
        for run in list(self._runs.values()):
            if run.owner == request.session_hash:
                run.stop()
        self._history.forget(request.session_hash or "")

    def _load(self, model: str, config: str, chosen: list[str]) -> list[Any]:
        """Load a model, and update the fields whose choices depend on it."""
        try:
            source = find_model(model.strip(), config.strip() or None)
            pipe = self._models.describe(source)
            self._models.load(source)
        except (ValueError, OSError) as error:
            return [gr.skip(), error_message(str(error)), *[gr.skip()] * 6]
        except Exception as error:  # a damaged configuration can raise anything in diffusers
            message = error_message(f"{source.name!r} cannot be loaded: {type(error).__name__} {error}")
            return [gr.skip(), message, *[gr.skip()] * 6]
        sizes, layers, guidances = choices.sizes(pipe), choices.layers(pipe), choices.guidances(pipe)
        examples = layout.example_prompts(source)
        return [
            source,
            status_message(f"{source.name} is loaded."),
            gr.update(choices=sizes, value=sizes[0]),
            gr.update(choices=layers, value=default_layers(pipe)),
            gr.update(choices=guidances, value=[name for name in chosen if name in guidances] or ["SEG"]),
            gr.update(visible=choices.has_unet(pipe)),
            layout.default_cfg(source, pipe),
            gr.update(samples=examples, sample_labels=layout.example_labels(examples)),
        ]

    def start(self, host: str, port: int, password: str | None = None) -> str:
        """Serve the page and return its address; with a password, visitors must log in as ``segkern``."""
        return serve(self.blocks, self._folder, host, port, password)

    def end(self) -> None:
        """Stop all runs and the server."""
        for run in list(self._runs.values()):
            run.stop()
        self.blocks.close(verbose=False)

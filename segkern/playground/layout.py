# SPDX-License-Identifier: Apache-2.0
"""What stands where on the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from segkern.generation.demo import PROMPTED
from segkern.generation.guidance_options import NAMES
from segkern.playground import choices
from segkern.playground.form import Form, number
from segkern.playground.markup import told
from segkern.playground.models import Described, Named

KINDS = tuple(name.upper() for name in NAMES)
_FIRST = PROMPTED[1]  # the bundled model draws a star too few of it without guidance
_HINT = "Press Draw: the same noise becomes a picture without and one with guidance."
_ENERGY = (
    "Where attention's energy is high and low without guidance, token by token: a row for each layer that guidance "
    "changes or reads, a column for the first, the middle and the last step."
)
# Positions of the slider as texts, so that the field follows it at once.
_SIGMAS = json.dumps([f"{choices.sigma_at(place):g}" for place in range(choices.LAST + 1)])


@dataclass(frozen=True)
class Controls:
    """What a press of Draw reads, and what acts."""

    form: Form  # of components
    draw: Any
    halt: Any
    message: Any
    examples: Any
    another: Any
    sigma_slider: Any
    blur: Any
    model: Any
    config: Any
    load: Any
    model_message: Any

    @property
    def fields(self) -> list[Any]:
        """The form's components in its order."""
        return [getattr(self.form, field.name) for field in fields(Form)]


@dataclass(frozen=True)
class Shown:
    """Where results go."""

    plain: Any
    guided: Any
    plain_file: Any
    guided_file: Any
    timing: Any
    report: Any
    maps: Any
    snippet: Any


def example_prompts(described: Described) -> list[list[str]]:
    """Prompts for a model whose words are known; none for others."""
    return [[subject.prompt] for subject in PROMPTED] if described.source.name == "demo" else []


def controls(named: Named, described: Described) -> Controls:
    """The left column; on a narrow page its settings come after the results."""
    with gr.Column(elem_id="ask"):
        asked = _ask(described)
    with gr.Column(elem_id="settings"):
        with gr.Group():
            guidance = _guidance(described)
        with gr.Accordion("Picture", open=True):
            with gr.Group():
                picture = _size_and_noise(described)
            another = gr.Button("Another seed", size="sm")
        with gr.Accordion("Also measure", open=False), gr.Group():
            energy = gr.Checkbox(True, label="Map the energy of attention", info="One more run.")
            unshared = gr.Checkbox(False, label="Time guidance without sharing", info="One more run.")
        with gr.Accordion("Model", open=False):
            model = _model(named)
    found = {**asked, **guidance, **picture, **model, "another": another, "energy": energy, "unshared": unshared}
    form = Form(**{field.name: found.pop(field.name) for field in fields(Form)})
    return Controls(form=form, **found)


def _ask(described: Described) -> dict[str, Any]:
    """What is always needed, first."""
    examples = example_prompts(described)
    prompt = gr.Textbox(
        _FIRST.prompt if examples else "",
        label="Prompt",
        info="What the picture shows.",
        lines=2,
        max_lines=2,
        autofocus=True,
    )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", scale=3, min_width=120)
        halt = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=80)
    message = gr.HTML(told(_HINT), elem_classes="message", elem_id="message", padding=False)
    shown = gr.Dataset(
        components=[gr.Textbox(visible=False, label="Prompt")],
        samples=examples,
        visible=bool(examples),
        label="Prompts to try",
    )
    return {"prompt": prompt, "draw": draw, "halt": halt, "message": message, "examples": shown}


def _guidance(described: Described) -> dict[str, Any]:
    kinds = gr.CheckboxGroup(KINDS, value=["SEG"], label="Guidance", info="One or several; several add up.")
    with gr.Column() as blur:
        slider = gr.Slider(
            0,
            choices.LAST,
            value=choices.LAST,
            step=1,
            label="SEG: blur",
            info="From 0.25 tokens on the left to infinite on the right.",
            elem_id="sigma-slider",
            buttons=[],
        )
        with gr.Row():
            sigma = _number("inf", "SEG: sigma", "In tokens; inf is infinite.")
            seg = _number("3", "SEG: scale", "How strong.")
    with gr.Row():
        pag = _number("3", "PAG: scale", "How strong.", visible=False)
        sag = _number("0.75", "SAG: scale", "How strong.", visible=False)
    layers = gr.Dropdown(
        choices.layers(described.pipe),
        value=choices.usual_layers(described.pipe),
        multiselect=True,
        allow_custom_value=True,
        label="Layers of SEG and PAG",
        info="Choose some, or type such as u0-1 and press Enter.",
    )
    with gr.Row():
        start = gr.Slider(0, 1, value=0, step=0.05, label="Starts at", info="Fraction of the run.", min_width=120)
        stop = gr.Slider(0, 1, value=1, step=0.05, label="Stops at", info="Fraction of the run.", min_width=120)
    scales = {"seg_scale": seg, "pag_scale": pag, "sag_scale": sag}
    acting = {"kinds": kinds, "layers": layers, "start": start, "stop": stop}
    return {**scales, **acting, "sigma": sigma, "sigma_slider": slider, "blur": blur}


def _size_and_noise(described: Described) -> dict[str, Any]:
    sizes = [choices.named(each) for each in choices.sizes(described.pipe)]
    with gr.Row():
        size = gr.Dropdown(
            sizes,
            value=sizes[0],
            allow_custom_value=True,
            label="Size",
            info="In pixels; can be typed.",
            min_width=120,
        )
        steps = gr.Number(20, label="Steps", info="More take longer.", min_width=120)
    with gr.Row():
        seed = gr.Number(_FIRST.seed, label="Seed", info="Of the noise.", min_width=120)
        guidance_scale = _number("3", "Text guidance (CFG)", "1 is none.")
    negative = gr.Textbox("", label="Negative prompt", info="What the picture does not show.")
    return {
        "size": size,
        "steps": steps,
        "seed": seed,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative,
    }


def _model(named: Named) -> dict[str, Any]:
    with gr.Group():
        model = gr.Textbox(
            named.model, label="Checkpoint", info="demo, a folder, a hub name, or a .safetensors file (SDXL)."
        )
        config = gr.Textbox(
            named.config, label="Configuration", info="Of a .safetensors file alone: a folder or hub name, or nothing."
        )
    load = gr.Button("Load", size="sm")
    message = gr.HTML(told(f"{named.model} is loaded."), elem_classes="message", elem_id="model-message", padding=False)
    return {"model": model, "config": config, "load": load, "model_message": message}


def _number(value: str, label: str, info: str, visible: bool = True) -> Any:
    """A text, so that whatever was typed can be quoted."""
    return gr.Textbox(value, label=label, info=info, visible=visible, min_width=120)


def results() -> Shown:
    """The right column."""
    with gr.Row():
        with gr.Column(min_width=150):
            plain = _picture("Without guidance", "plain")
            plain_file = gr.DownloadButton("Download without guidance", size="sm", interactive=False)
        with gr.Column(min_width=150):
            guided = _picture("With guidance", "guided")
            guided_file = gr.DownloadButton("Download with guidance", size="sm", interactive=False)
    with gr.Tabs():
        with gr.Tab("Report"):
            timing = gr.HTML("", elem_id="timing", padding=False)
            report = gr.HTML("", elem_id="report", padding=False)
        with gr.Tab("Energy"):
            gr.Markdown(_ENERGY)
            maps = _picture("Energy of attention", "maps", height=None, show_label=False)
        with gr.Tab("Python"):
            snippet = gr.Code(
                "",
                language="python",
                label="Draws the guided picture again",
                interactive=False,
                wrap_lines=True,
                elem_id="snippet",
            )
    return Shown(plain, guided, plain_file, guided_file, timing, report, maps, snippet)


def _picture(label: str, name: str, height: int | None = 370, show_label: bool = True) -> Any:
    return gr.Image(
        label=label,
        format="png",
        type="filepath",
        interactive=False,
        height=height,
        show_label=show_label,
        buttons=["fullscreen"],
        elem_id=name,
        alt_text=label,
    )


def follow_slider() -> str:
    """JavaScript: the sigma of a position of the slider, as a text."""
    return f"(position) => {_SIGMAS}[position]"


def follow_sigma(text: Any) -> Any:
    """The slider at the place of a sigma that was typed; where it was for anything else."""
    try:
        sigma = number("sigma", text)
    except ValueError:
        return gr.skip()
    return choices.position_of(sigma) if sigma > 0 else gr.skip()


def shown_kinds(kinds: Sequence[str]) -> list[Any]:
    """Updates of SEG's fields, the scales of PAG and SAG, and the layers: what is not asked for is hidden."""
    seg, pag, sag = (kind in kinds for kind in KINDS)
    return [gr.update(visible=seg), gr.update(visible=pag), gr.update(visible=sag), gr.update(visible=seg or pag)]

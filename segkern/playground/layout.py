# SPDX-License-Identifier: Apache-2.0
"""What stands where on the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gradio as gr

from segkern.demo import PROMPTED
from segkern.energy_report import named as sigma_named
from segkern.playground import choices
from segkern.playground.form import Form
from segkern.playground.markup import told
from segkern.playground.models import Described, Named

KINDS = ("SEG", "PAG", "SAG")
_FIRST = PROMPTED[1]  # the bundled model draws a star too few of it without guidance
_HINT = "Press Draw: the same noise becomes a picture without and one with guidance."
# Positions of the slider as texts, so that the field follows it at once.
_SIGMAS = json.dumps([f"{choices.sigma_at(place):g}" for place in range(choices.LAST + 1)])


@dataclass(frozen=True)
class Controls:
    """What a press of Draw reads, and what acts."""

    form: Form  # of components
    draw: Any
    stop: Any
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
    """The left column."""
    examples = example_prompts(described)
    prompt = gr.Textbox(
        _FIRST.prompt if examples else "", label="Prompt", info="What the picture shows.", lines=2, autofocus=True
    )
    with gr.Row():
        draw = gr.Button("Draw", variant="primary", scale=3, min_width=120)
        stop = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=80)
    message = gr.HTML(told(_HINT), elem_classes="message", elem_id="message")
    dataset = gr.Dataset(
        components=[gr.Textbox(visible=False, label="Prompt")],
        samples=examples,
        visible=bool(examples),
        label="Prompts to try",
        elem_id="examples",
    )
    with gr.Group():
        kinds = gr.CheckboxGroup(KINDS, value=["SEG"], label="Guidance", info="One or several; several add up.")
        with gr.Column(visible=True) as blur:
            slider = gr.Slider(
                0,
                choices.LAST,
                value=choices.LAST,
                step=1,
                label="SEG: blur, from little to infinite",
                elem_id="sigma-slider",
                buttons=[],
            )
            with gr.Row():
                sigma = gr.Textbox("inf", label="SEG: sigma", info="In tokens; inf is the mean.", min_width=120)
                seg = gr.Textbox("3", label="SEG: scale", info="How strong.", min_width=120)
        with gr.Row():
            pag = gr.Textbox("3", label="PAG: scale", info="How strong.", visible=False, min_width=120)
            sag = gr.Textbox("0.75", label="SAG: scale", info="How strong.", visible=False, min_width=120)
        layers = gr.Dropdown(
            choices.layers(described.outline),
            value=["mid"],
            multiselect=True,
            allow_custom_value=True,
            label="Layers of SEG and PAG",
            info="Choose some, or type such as u0-1 and press Enter.",
        )
        with gr.Row():
            start = gr.Slider(0, 1, value=0, step=0.05, label="Start", info="Fraction of the run.", min_width=120)
            end = gr.Slider(0, 1, value=1, step=0.05, label="Stop", info="Fraction of the run.", min_width=120)
    with gr.Accordion("Picture", open=True), gr.Group():
        with gr.Row():
            size = gr.Dropdown(
                [choices.named(each) for each in choices.sizes(described.outline)],
                value=choices.named(choices.sizes(described.outline)[0]),
                allow_custom_value=True,
                label="Size",
                info="Width x height; others can be typed.",
                min_width=140,
            )
            steps = gr.Number(20, label="Steps", info="More take longer.", min_width=100)
        with gr.Row():
            seed = gr.Number(_FIRST.seed, label="Seed", info="Of the noise.", min_width=120)
            guidance_scale = gr.Textbox("3", label="Text guidance (CFG)", info="1 is none.", min_width=120)
        another = gr.Button("Another seed", size="sm")
        negative = gr.Textbox("", label="Negative prompt", info="What the picture does not show.")
    with gr.Accordion("Also measure", open=False), gr.Group():
        energy = gr.Checkbox(True, label="Map the energy of attention", info="One more run.")
        unshared = gr.Checkbox(False, label="Time guidance without sharing", info="One more run.")
    with gr.Accordion("Model", open=False), gr.Group():
        model = gr.Textbox(
            named.model, label="Checkpoint", info="demo, a folder, a hub name, or a .safetensors file (SDXL)."
        )
        config = gr.Textbox(
            named.config, label="Configuration", info="Of a .safetensors file alone: folder or hub name; may be empty."
        )
        load = gr.Button("Load", size="sm")
        model_message = gr.HTML(told(f"{named.model} is loaded."), elem_classes="message", elem_id="model-message")
    form = Form(
        prompt=prompt,
        negative_prompt=negative,
        seed=seed,
        steps=steps,
        guidance_scale=guidance_scale,
        size=size,
        kinds=kinds,
        sigma=sigma,
        seg_scale=seg,
        pag_scale=pag,
        sag_scale=sag,
        layers=layers,
        start=start,
        stop=end,
        energy=energy,
        unshared=unshared,
    )
    return Controls(form, draw, stop, message, dataset, another, slider, blur, model, config, load, model_message)


def results() -> Shown:
    """The right column."""
    with gr.Row():
        with gr.Column(min_width=240):
            plain = _picture("Without guidance", "plain")
            plain_file = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="plain-file")
        with gr.Column(min_width=240):
            guided = _picture("With guidance", "guided")
            guided_file = gr.DownloadButton("Download", size="sm", interactive=False, elem_id="guided-file")
    with gr.Tabs():
        with gr.Tab("What it did"):
            timing = gr.HTML("", elem_id="timing")
            report = gr.HTML("", elem_id="report")
        with gr.Tab("Energy"):
            maps = gr.Gallery(
                label="Energy of attention without guidance, by layer and step",
                columns=1,
                object_fit="contain",
                height="auto",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="maps",
            )
        with gr.Tab("Python"):
            snippet = gr.Code(
                "", language="python", label="Draws the guided picture again", interactive=False, elem_id="snippet"
            )
    return Shown(plain, guided, plain_file, guided_file, timing, report, maps, snippet)


def _picture(label: str, name: str) -> Any:
    return gr.Image(
        label=label,
        format="png",
        type="filepath",
        interactive=False,
        height=380,
        buttons=["fullscreen"],
        elem_id=name,
        elem_classes="picture",
        alt_text=label,
    )


def follow_slider() -> str:
    """JavaScript: the sigma of a position of the slider, as a text."""
    return f"(position) => {_SIGMAS}[position]"


def follow_sigma(text: Any) -> Any:
    """The slider at the place of a sigma that was typed; where it was for anything else."""
    try:
        sigma = float(str(text).replace("∞", "inf"))
    except ValueError:
        return gr.skip()
    return choices.position_of(sigma) if sigma > 0 and not math.isnan(sigma) else gr.skip()


def shown_kinds(kinds: Sequence[str]) -> list[Any]:
    """Updates of SEG's fields, the scales of PAG and SAG, and the layers: what is not asked for is hidden."""
    seg, pag, sag = (kind in kinds for kind in KINDS)
    return [gr.update(visible=seg), gr.update(visible=pag), gr.update(visible=sag), gr.update(visible=seg or pag)]


def sigma_words(sigma: float) -> str:
    """A sigma for a caption."""
    return f"σ = {sigma_named(sigma)}"

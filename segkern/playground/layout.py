# SPDX-License-Identifier: Apache-2.0
"""Components of the page and their places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from segkern.generation.demo import PROMPTED
from segkern.generation.loading import Source
from segkern.generation.options import GUIDANCES
from segkern.playground import choices
from segkern.playground.form import number
from segkern.playground.markup import status_message

_FIRST = PROMPTED[1]  # the bundled model draws a star too few of it without guidance
_HINT = "Press Draw: the same noise becomes a picture without and one with guidance."
_ENERGY = (
    "Where attention's energy is high and low without guidance, token by token: a row for each layer that guidance "
    "changes or reads, a column for the first, the middle and the last step."
)
# Positions of the slider as texts, so that the field follows it at once.
_SIGMAS = json.dumps([f"{choices.sigma_at(position):g}" for position in range(choices.LAST + 1)])


Components = dict[str, Any]  # by name


def example_prompts(source: Source) -> list[list[str]]:
    """Prompts for the bundled model, whose words are known; none for others."""
    return [[subject.prompt] for subject in PROMPTED] if source.name == "demo" else []


def build_controls(source: Source, pipe: Any, model: str, config: str) -> tuple[Components, Components]:
    """The left column; on a narrow page its settings come after the results.

    Args:
        source: of the model that a new page has.
        pipe: the model's pipeline, with or without weights.
        model: the words that name it.
        config: those that name its configuration.

    Returns:
        The fields that a press of Draw reads, by the names of :func:`segkern.playground.form.read`, and the others.
    """
    fields: Components = {}
    others: Components = {}
    with gr.Column(elem_id="ask"):
        _ask(example_prompts(source), fields, others)
    with gr.Column(elem_id="settings"):
        with gr.Group():
            _guidance(pipe, fields, others)
        with gr.Accordion("Picture", open=True):
            with gr.Group():
                _picture(pipe, fields)
            others["another_seed"] = gr.Button("Another seed", size="sm")
        with gr.Accordion("Also measure", open=False), gr.Group():
            fields["energy"] = gr.Checkbox(True, label="Map the energy of attention", info="One more run.")
            fields["unshared"] = gr.Checkbox(False, label="Time guidance without sharing", info="One more run.")
        with gr.Accordion("Model", open=False):
            _model(model, config, others)
    return fields, others


def _ask(examples: list[list[str]], fields: Components, others: Components) -> None:
    """The prompt and the buttons, which are always needed."""
    fields["prompt"] = gr.Textbox(
        _FIRST.prompt if examples else "",
        label="Prompt",
        info="What the picture shows.",
        lines=2,
        max_lines=2,
        autofocus=True,
    )
    with gr.Row():
        others["draw"] = gr.Button("Draw", variant="primary", scale=3, min_width=120)
        others["stop"] = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=80)
    others["message"] = gr.HTML(status_message(_HINT), elem_classes="message", elem_id="message", padding=False)
    others["examples"] = gr.Dataset(
        components=[gr.Textbox(visible=False, label="Prompt")],
        samples=examples,
        visible=bool(examples),
        label="Prompts to try",
    )


def _guidance(pipe: Any, fields: Components, others: Components) -> None:
    fields["guidances"] = gr.CheckboxGroup(
        [name.upper() for name in GUIDANCES], value=["SEG"], label="Guidance", info="One or several; several add up."
    )
    with gr.Column() as others["blur"]:
        others["sigma_slider"] = gr.Slider(
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
            fields["sigma"] = _number("inf", "SEG: sigma", "In tokens; inf is infinite.")
            fields["seg_scale"] = _number("3", "SEG: scale", "How strong.")
    with gr.Row():
        fields["pag_scale"] = _number("3", "PAG: scale", "How strong.", visible=False)
        fields["sag_scale"] = _number("0.75", "SAG: scale", "How strong.", visible=False)
    fields["layers"] = gr.Dropdown(
        choices.layers(pipe),
        value=choices.usual_layers(pipe),
        multiselect=True,
        allow_custom_value=True,
        label="Layers of SEG and PAG",
        info="Choose some, or type such as u0-1 and press Enter.",
    )
    with gr.Row():
        for name, value, title in (("start", 0, "Starts at"), ("stop", 1, "Stops at")):
            fields[name] = gr.Slider(
                0, 1, value=value, step=0.05, label=title, info="Fraction of the run.", min_width=120
            )


def _picture(pipe: Any, fields: Components) -> None:
    sizes = choices.sizes(pipe)
    with gr.Row():
        fields["size"] = gr.Dropdown(
            sizes,
            value=sizes[0],
            allow_custom_value=True,
            label="Size",
            info="In pixels; can be typed.",
            min_width=120,
        )
        fields["steps"] = gr.Number(20, label="Steps", info="More take longer.", min_width=120)
    with gr.Row():
        fields["seed"] = gr.Number(_FIRST.seed, label="Seed", info="Of the noise.", min_width=120)
        fields["guidance_scale"] = _number("3", "Text guidance (CFG)", "1 is none.")
    fields["negative_prompt"] = gr.Textbox("", label="Negative prompt", info="What the picture does not show.")


def _model(model: str, config: str, others: Components) -> None:
    with gr.Group():
        others["model"] = gr.Textbox(
            model, label="Checkpoint", info="demo, a folder, a hub name, or a .safetensors file (SDXL)."
        )
        others["config"] = gr.Textbox(
            config, label="Configuration", info="Of a .safetensors file alone: a folder or hub name, or nothing."
        )
    others["load"] = gr.Button("Load", size="sm")
    others["model_message"] = gr.HTML(
        status_message(f"{model} is loaded."), elem_classes="message", elem_id="model-message", padding=False
    )


def _number(value: str, label: str, info: str, visible: bool = True) -> Any:
    """A text, so that whatever was typed can be quoted."""
    return gr.Textbox(value, label=label, info=info, visible=visible, min_width=120)


def build_results() -> Components:
    """The right column."""
    results: Components = {}
    with gr.Row():
        for name, words in (("plain", "without guidance"), ("guided", "with guidance")):
            with gr.Column(min_width=150):
                results[name] = _image(words.capitalize(), name)
                results[f"{name}_file"] = gr.DownloadButton(f"Download {words}", size="sm", interactive=False)
    with gr.Tabs():
        with gr.Tab("Report"):
            results["timing"] = gr.HTML("", elem_id="timing", padding=False)
            results["report"] = gr.HTML("", elem_id="report", padding=False)
        with gr.Tab("Energy"):
            gr.Markdown(_ENERGY)
            results["maps"] = _image("Energy of attention", "maps", height=None, show_label=False)
        with gr.Tab("Python"):
            results["snippet"] = gr.Code(
                "",
                language="python",
                label="Draws the guided picture again",
                interactive=False,
                wrap_lines=True,
                elem_id="snippet",
            )
    return results


def _image(label: str, name: str, height: int | None = 370, show_label: bool = True) -> Any:
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


def show_chosen(guidances: Sequence[str]) -> list[Any]:
    """Updates of SEG's fields, the scales of PAG and SAG, and the layers: those of other guidances are hidden."""
    seg, pag, sag = (name.upper() in guidances for name in GUIDANCES)
    return [gr.update(visible=visible) for visible in (seg, pag, sag, seg or pag)]

# SPDX-License-Identifier: Apache-2.0
"""Components of the page and their arrangement."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from segkern.generation.calls import default_guidance_scale
from segkern.generation.demo import PROMPTED
from segkern.generation.drawing import default_layers
from segkern.generation.loading import Source
from segkern.generation.options import GUIDANCES, LAYERED
from segkern.playground import choices
from segkern.playground.form import LABELS, number
from segkern.playground.markup import empty_pair, status_message
from segkern.playground.presets import PRESETS

_HINT = "Click Generate to compare images with and without guidance from the same noise."
_ENERGY = (
    "Attention energy without guidance at every token: one row per layer that guidance changes or reads, one column "
    "each for the first, middle and last step."
)
_DEMO_CFG = "3"
# Text of every position of the slider, so that the number field follows immediately.
_SIGMAS = json.dumps([f"{choices.sigma_at(position):g}" for position in range(choices.LAST + 1)])


Components = dict[str, Any]  # by name


def example_prompts(source: Source) -> list[list[str]]:
    """Return the examples, each a prompt and its CFG scale: no prompt, and prompts for the bundled model."""
    prompts = [[subject.prompt, _DEMO_CFG] for subject in PROMPTED] if source.name == "demo" else []
    return [["", "1"], *prompts]


def default_cfg(source: Source, pipe: Any) -> str:
    """Return the CFG scale for prompts: the pipeline's default, or a lower one for the bundled model."""
    return _DEMO_CFG if source.name == "demo" else f"{default_guidance_scale(pipe):g}"


def example_labels(samples: Sequence[Sequence[str]]) -> list[str]:
    """Return the texts of the buttons of example prompts."""
    return [prompt or "No prompt, no CFG" for prompt, _ in samples]


def build_controls(source: Source, pipe: Any, model: str, config: str) -> tuple[Components, Components]:
    """Build the left column.

    Args:
        source: Model of a new page.
        pipe: The model's pipeline, with or without weights.
        model: Text that names the model.
        config: Text that names its configuration.

    Returns:
        Fields that Generate reads, by the names of :func:`segkern.playground.form.read`, and all other components.
    """
    fields: Components = {}
    others: Components = {}
    examples = example_prompts(source)
    _prompt(examples, fields, others)
    with gr.Group():
        _guidance(pipe, fields, others)
        # The bundled model starts without a prompt, where guidance changes most.
        scale = examples[0][1] if source.name == "demo" else default_cfg(source, pipe)
        fields["guidance_scale"] = _number(scale, "guidance_scale", "Strength of classifier-free guidance; 1 is off.")
    with gr.Accordion("Layers and steps of guidance", open=False), gr.Group():
        _where(pipe, fields)
    with gr.Accordion("Image", open=False):
        with gr.Group():
            _image(pipe, fields)
        others["another_seed"] = gr.Button("Random seed", size="sm")
    with gr.Accordion("Also measure", open=False), gr.Group():
        unet = choices.has_unet(pipe)
        fields["energy"] = gr.Checkbox(unet, label="Map the attention energy", info="Adds one run.", visible=unet)
        fields["unshared"] = gr.Checkbox(
            False, label="Time guidance without branch sharing", info="Adds one run without branch sharing."
        )
    with gr.Accordion("Model", open=False):
        _model(model, config, others)
    return fields, others


def _prompt(examples: list[list[str]], fields: Components, others: Components) -> None:
    fields["prompt"] = gr.Textbox(
        "",
        label="Prompt",
        info="Describe the image, or leave this empty. Shift+Enter generates.",
        lines=2,
        max_lines=2,
    )
    with gr.Row():
        others["generate"] = gr.Button("Generate", variant="primary", scale=3, min_width=120)
        others["stop"] = gr.Button("Stop", variant="stop", interactive=False, scale=1, min_width=80)
    others["message"] = gr.HTML(status_message(_HINT), elem_classes="words", elem_id="message", padding=False)
    others["examples"] = gr.Dataset(
        components=[gr.Textbox(visible=False, label="Prompt"), gr.Textbox(visible=False, label="CFG scale")],
        samples=examples,
        sample_labels=example_labels(examples),
        layout="gallery",
        label="Generate an example",
        elem_id="examples",
    )
    others["presets"] = gr.Dataset(
        components=[gr.Textbox(visible=False, label="Preset")],
        samples=[[preset.name] for preset in PRESETS],
        type="index",
        label="Guidance presets",
        elem_id="presets",
    )


def _guidance(pipe: Any, fields: Components, others: Components) -> None:
    fields["guidances"] = gr.CheckboxGroup(
        choices.guidances(pipe), value=["SEG"], label=LABELS["guidances"], info="The effects of several methods add up."
    )
    with gr.Column() as others["blur"]:
        others["sigma_slider"] = gr.Slider(
            0,
            choices.LAST,
            value=choices.LAST,
            step=1,
            label="SEG blur",
            info="From sigma 0.25 on the left to infinity on the right.",
            elem_id="sigma-slider",
            buttons=[],
        )
        with gr.Row():
            fields["sigma"] = _number("inf", "sigma", "Blur in tokens, or inf.")
            fields["seg_scale"] = _number("3", "seg_scale", "Strength of SEG.")
    with gr.Row():
        fields["pag_scale"] = _number("3", "pag_scale", "Strength of PAG.", visible=False)
        fields["sag_scale"] = _number("0.75", "sag_scale", "Strength of SAG.", visible=False)
        fields["slg_scale"] = _number("2.8", "slg_scale", "Strength of SLG.", visible=False)
        fields["tpg_scale"] = _number("3", "tpg_scale", "Strength of TPG.", visible=False)


def _where(pipe: Any, fields: Components) -> None:
    fields["layers"] = gr.Dropdown(
        choices.layers(pipe),
        value=default_layers(pipe),
        multiselect=True,
        allow_custom_value=True,
        label=LABELS["layers"],
        info="Layers of all methods except SAG. Select some, or type names such as u0-1 and press Enter.",
    )
    with gr.Row():
        for name, value, info in (
            ("start", 0, "0 is the first step."),
            ("stop", 1, "1 is the last step. With 0 and 1, SLG uses 0.01 to 0.2."),
        ):
            fields[name] = gr.Slider(0, 1, value=value, step=0.05, label=LABELS[name], info=info, min_width=120)


def _image(pipe: Any, fields: Components) -> None:
    sizes = choices.sizes(pipe)
    with gr.Row():
        fields["size"] = gr.Dropdown(
            sizes,
            value=sizes[0],
            allow_custom_value=True,
            label=LABELS["size"],
            info="Select or type pixels.",
            min_width=120,
        )
        fields["steps"] = gr.Number(20, label=LABELS["steps"], info="Inference steps.", min_width=120)
    fields["seed"] = gr.Number(1, label=LABELS["seed"], info="Seed for the initial noise.")
    fields["negative_prompt"] = gr.Textbox(
        "", label="Negative prompt", info="Content to avoid in the image. Needs CFG."
    )


def _model(model: str, config: str, others: Components) -> None:
    with gr.Group():
        others["model"] = gr.Textbox(
            model,
            label="Checkpoint",
            info="demo, a checkpoint folder, a Hugging Face Hub name, or an SDXL .safetensors file.",
        )
        others["config"] = gr.Textbox(
            config, label="Configuration", info="Configuration of a .safetensors file: a folder or Hub name. Optional."
        )
    others["load"] = gr.Button("Load", size="sm")
    others["model_message"] = gr.HTML(
        status_message(f"{model} is loaded."), elem_classes="words", elem_id="model-message", padding=False
    )


def _number(value: str, field: str, info: str, visible: bool = True) -> Any:
    """Return a text field, so that errors can quote any input."""
    return gr.Textbox(value, label=LABELS[field], info=info, visible=visible, min_width=120)


def build_results() -> Components:
    """Build the right column."""
    results: Components = {}
    with gr.Tabs(elem_id="views"):
        for title, name, value in (
            ("Side by side", "pair", empty_pair()),
            ("Slider", "divided", ""),
            ("Difference", "difference", ""),
        ):
            with gr.Tab(title):
                results[name] = _html(name, value)
    results["history"] = gr.Dataset(
        components=[gr.HTML(visible=False)],
        samples=[],
        type="index",
        samples_per_page=100,
        visible=False,
        label="History: click a run to restore its settings",
        elem_id="history",
    )
    with gr.Tabs():
        with gr.Tab("Report"):
            results["timing"] = _html("timing")
            results["report"] = _html("report")
        with gr.Tab("Energy"):
            gr.Markdown(_ENERGY)
            results["maps"] = _html("maps")
        with gr.Tab("Python"):
            results["snippet"] = gr.Code(
                "",
                language="python",
                label="Python code for the image after guidance",
                interactive=False,
                wrap_lines=True,
                elem_id="snippet",
            )
    return results


def _html(name: str, value: str = "") -> Any:
    return gr.HTML(value, elem_id=name, elem_classes="words", padding=False)


def follow_slider() -> str:
    """Return JavaScript that returns the sigma at a position of the slider, as text."""
    return f"(position) => {_SIGMAS}[position]"


def announce_sigma() -> str:
    """Return JavaScript that makes screen readers announce sigma, not the position of the slider."""
    return (
        f"(position) => {{ const sigma = {_SIGMAS}[position];"
        "document.querySelector('#sigma-slider input[type=range]')?.setAttribute('aria-valuetext', "
        "sigma == 'inf' ? 'sigma infinite' : 'sigma ' + sigma); }"
    )


def follow_sigma(text: Any) -> Any:
    """Return the slider position of a typed sigma; leave the slider unchanged if the text is not a sigma."""
    try:
        sigma = number("sigma", text)
    except ValueError:
        return gr.skip()
    return choices.position_of(sigma) if sigma > 0 else gr.skip()


def show_chosen(guidances: Sequence[str]) -> list[Any]:
    """Return updates that hide the fields of each guidance method that is not selected, and the layers."""
    chosen = [name in [guidance.lower() for guidance in guidances] for name in GUIDANCES]
    layers = any(name.lower() in LAYERED for name in guidances)
    # "hidden" keeps a component on the page, and with it the text that the slider announces.
    return [gr.update(visible=visible or "hidden") for visible in (*chosen, layers)]

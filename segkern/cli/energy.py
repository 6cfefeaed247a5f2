# SPDX-License-Identifier: Apache-2.0
"""``segkern energy``: the energy of self-attention during generation as maps, plots and JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from segkern.cli.terminal import (
    NUMBERS,
    Config,
    Device,
    DType,
    GuidanceScale,
    Height,
    Model,
    Seed,
    Steps,
    Width,
    draw_with_progress,
    need_diffusers,
    refusing,
    warn_of_unknown_words,
)
from segkern.generation import loading
from segkern.generation.calls import default_guidance_scale
from segkern.generation.drawing import ImageRequest, denoiser_calls, find_layers, image_metadata
from segkern.generation.options import check_finite, parse_list
from segkern.generation.pictures import check_target, save
from segkern.generation.sizes import image_size
from segkern.generation.tables import new_table, show

SIGMAS = "0.5,1,2,4,8,16,inf"
_STEPS = "first, middle, last and numbers from 0"
_PICTURE, _JSON, _OVER_SIGMA, _OVER_STEPS = "picture.png", "energy.json", "over-sigma.png", "over-steps.png"


def energy(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text prompt. Default: an empty prompt.")] = "",
    negative_prompt: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    layers: Annotated[
        str, typer.Option(help="all, or down, mid, up, d4, u0-29, globs; comma-separated. See segkern layers.")
    ] = "all",
    sigmas: Annotated[str, typer.Option(help="Sigmas to compare with no blur, in tokens, or inf.")] = SIGMAS,
    at: Annotated[
        str, typer.Option(help="Steps to plot: first, middle, last or numbers from 0.")
    ] = "first,middle,last",
    boundary: Annotated[str, typer.Option(help="Boundary of the blur: reflect, symmetric or circular.")] = "reflect",
    width: Width = None,
    height: Height = None,
    seed: Seed = 1,
    steps: Steps = 30,
    guidance_scale: GuidanceScale = None,
    dtype: DType = "auto",
    device: Device = "auto",
    config: Config = None,
    out: Annotated[Path, typer.Option(help="Output folder. It is created if needed.")] = Path("energy"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files.")] = False,
) -> None:
    """Plot the energy of self-attention during generation.

    Generates one image without segkern's guidance. Writes the image, maps of the energy, plots over sigma and over
    steps, and a JSON file.
    """
    from segkern.analysis import plots, report
    from segkern.core.gaussian import BOUNDARIES

    with refusing():
        values = tuple(value for value in parse_list("--sigmas", sigmas, float, NUMBERS) if value)
        for value in values:
            if not value > 0:
                raise ValueError(f"--sigmas accepts positive numbers and inf, got {value:g}")
        if boundary not in BOUNDARIES:
            raise ValueError(f"--boundary must be one of {', '.join(BOUNDARIES)}, got {boundary!r}")
        if guidance_scale is not None:
            check_finite("--guidance-scale", guidance_scale)
        torch_device = loading.find_device(device)
        torch_dtype = loading.find_dtype(dtype, torch_device)
    need_diffusers("matplotlib", extra="plots")
    from segkern.integrations.diffusers import list_layers, record_energy

    names = None if layers.strip() == "all" else [name.strip() for name in layers.split(",")]
    with refusing():
        _steps(at, sys.maxsize)  # the number of denoiser calls is known once the scheduler is loaded
        source = loading.find_model(model, config)
        description = loading.describe_unet_pipeline(source)
        size = image_size(description, width, height, prefix="--")
        cfg = default_guidance_scale(description) if guidance_scale is None else guidance_scale
        available = list_layers(description)
        count = len(available if names is None else find_layers(available, names))
        files = (_PICTURE, _JSON, _OVER_SIGMA, _OVER_STEPS, *plots.map_files(count))
        for name in files:
            if (out / name).exists() and not overwrite:
                raise ValueError(f"{str(out / name)!r} exists; use --overwrite or another --out")
        pipe = loading.load_pipeline(source, torch_dtype, torch_device)
        chosen = _steps(at, denoiser_calls(pipe, steps))
        out.mkdir(parents=True, exist_ok=True)
        for name in files:
            if name != _JSON:
                check_target(out / name, overwrite)
        recorder = record_energy(pipe, names, values, chosen, boundary=boundary)
    warn_of_unknown_words(source, prompt, negative_prompt)
    request = ImageRequest(prompt, negative_prompt, *size, seed, steps, cfg)
    with recorder:
        picture = draw_with_progress(pipe, request, [()])[0].image

    details = image_metadata(source, request, (), torch_dtype, pipe.scheduler)
    summary = report.summary(recorder, details, boundary)
    save(picture, out / _PICTURE, details)
    report.write(out / _JSON, summary)
    sheets = plots.plot_maps(summary, out, picture)
    plots.plot_over_sigma(summary, out / _OVER_SIGMA)
    plots.plot_over_steps(summary, out / _OVER_STEPS)

    step = report.chosen_steps(summary)[-1]
    blurred = [f"σ {report.sigma_label(sigma)}" for sigma in summary["sigmas"][1:]]
    title = f"Mean energy per query in nats at step {step}, and its change with blur"
    table = new_table("layer", "tokens", "energy", *blurred, title=title)
    for row in report.table_rows(summary, step):
        table.add_row(*row)
    show(table)
    for path in (out / _PICTURE, out / _JSON, *sheets, out / _OVER_SIGMA, out / _OVER_STEPS):
        typer.echo(f"wrote {path}")


def _steps(text: str, steps: int) -> tuple[int, ...]:
    """Return the distinct step indices in a list such as ``first,10,last``.

    Raises:
        ValueError: If an item is invalid or not less than ``steps``.
    """
    known = {"first": 0, "middle": steps // 2, "last": steps - 1}
    calls: list[int] = []
    for word in parse_list("--at", text, str, _STEPS):
        if word not in known and not word.isdecimal():
            raise ValueError(f"--at accepts {_STEPS}, got {word!r}")
        step = known[word] if word in known else int(word)
        if step >= steps:
            raise ValueError(f"--at must be less than the {steps} denoiser calls, got {step}")
        if step not in calls:
            calls.append(step)
    return tuple(calls)

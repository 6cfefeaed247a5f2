# SPDX-License-Identifier: Apache-2.0
"""Run the evaluation of the bundled model with ``python -m studies.evaluation``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segkern.cli.terminal import SIGMAS, need_diffusers, refusing
from segkern.generation import loading

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model of the drawings: 'demo' or a checkpoint folder.")] = "demo",
    images: Annotated[int, typer.Option(min=8, help="Per setting and seed.")] = 256,
    seeds: Annotated[str, typer.Option(help="Reported: mean and spread are over these.")] = "1,2,3",
    selection_seeds: Annotated[
        str, typer.Option(help="On which a setting is chosen to be reported too; empty for none.")
    ] = "101",
    modes: Annotated[str, typer.Option(help="unconditional, prompts, or both.")] = "unconditional,prompts",
    scales: Annotated[str, typer.Option(help="Of SEG.")] = "0.25,0.5,1,2,3,4",
    sigmas: Annotated[str, typer.Option(help="Of SEG, in tokens of the model's own grid.")] = SIGMAS,
    cfg_scales: Annotated[str, typer.Option(help="Of classifier-free guidance, with prompts.")] = "1.5,2,3,5",
    layers: Annotated[str, typer.Option(help="That SEG guides.")] = "mid",
    steps: Annotated[int, typer.Option(min=1, help="Of the scheduler.")] = 10,
    batch: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16; auto is fp16 on CUDA.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 and so on.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for JSON, table, plot and what is measured on the way.")] = Path(
        "outputs/evaluation"
    ),
) -> None:
    """Measure what guidance does to samples: fidelity, diversity, captions. What was cut off goes on."""
    need_diffusers("torchmetrics", "matplotlib", extra="evaluate")
    from studies.evaluation import command

    with refusing():
        design = command.design(modes, scales, sigmas, cfg_scales, layers, seeds, selection_seeds)
        where = loading.find_device(device)
        kind = loading.find_dtype(dtype, where)
        source = loading.find_model(model)
        study = command.prepare(source, design, kind, where, out, images, steps, batch)
    command.run(study, design, source, out)


if __name__ == "__main__":
    app()

# SPDX-License-Identifier: Apache-2.0
"""``segkern generate``: a picture with guidance, a comparison on one sheet, or many pictures into a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segkern.cli.terminal import NUMBERS, SIGMAS, Config, Height, Model, Width, need_diffusers, refusing
from segkern.generation import loading, prompt_batches
from segkern.generation.drawing import Job, Specs, check_layers, describe, draw_all, label, report_table
from segkern.generation.guidance_options import names_of, refuse_blur, scales_of, specs_of
from segkern.generation.options import listed, stride
from segkern.generation.pictures import Row, Tile, check_target, contact_sheet, save
from segkern.generation.sizes import image_size
from segkern.generation.tables import wide


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="What the picture shows; or give --prompts.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file, a prompt on each line: pictures go to the folder --out.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="With --prompts: of each prompt, seeds from --seed on.")] = 1,
    negative_prompt: Annotated[str, typer.Option(help="What it does not show.")] = "",
    sigma: Annotated[
        str | None, typer.Option(help="Blur in tokens, such as 4; inf, the mean query, if not given.")
    ] = None,
    guidance: Annotated[str, typer.Option(help="seg, pag, sag; several with commas add up.")] = "seg",
    scale: Annotated[float | None, typer.Option(help="Strength of seg; the paper's gamma - 1. 3 if not given.")] = None,
    pag_scale: Annotated[float | None, typer.Option(help="Strength of pag; 3 if not given.")] = None,
    sag_scale: Annotated[float | None, typer.Option(help="Strength of sag; 0.75 if not given.")] = None,
    layers: Annotated[str, typer.Option(help="down, mid, up, d4, u0-29, globs; several with commas.")] = "mid",
    width: Width = None,
    height: Height = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the initial noise.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Of the scheduler.")] = 30,
    guidance_scale: Annotated[float, typer.Option(help="Of classifier-free guidance.")] = 5.0,
    start: Annotated[float, typer.Option(help="Fraction of the run at which guidance begins.")] = 0.0,
    stop: Annotated[float, typer.Option(help="Fraction of the run at which it ends.")] = 1.0,
    schedule: Annotated[str, typer.Option(help="Of the scales over the run: constant, linear or cosine.")] = "constant",
    boundary: Annotated[str, typer.Option(help="reflect, symmetric or circular.")] = "reflect",
    backend: Annotated[str, typer.Option(help="auto, triton or torch.")] = "auto",
    query_stride: Annotated[
        str, typer.Option(help="Of a finite sigma: 1, every row; 4 or 2,3, rows so far apart.")
    ] = "1",
    reuse: Annotated[
        int, typer.Option(min=1, help="Steps for which a perturbed branch serves: 1 is exact, more an approximation.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16; auto is fp16 on CUDA.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 and so on.")] = "auto",
    config: Config = None,
    out: Annotated[
        Path | None, typer.Option(help="File to write, out.png; PNG keeps all settings as text. Folder for --prompts.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    no_guidance: Annotated[bool, typer.Option("--no-guidance", help="The stock pipeline, same seed.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="One picture: without, and each of --sigmas.")] = False,
    sigmas: Annotated[str | None, typer.Option(help=f"For --compare; {SIGMAS} if not given.")] = None,
) -> None:
    """Draw a picture with Smoothed Energy Guidance or its relatives, compare several, or draw many.

    Many pictures of --prompts are split among the processes of accelerate launch, and a run that was interrupted goes
    on where it was.
    """
    with refusing():
        if (prompt is None) == (prompts is None):
            raise ValueError("generate takes a prompt, or --prompts FILE with a prompt on each line")
        if prompts is None:
            out = Path("out.png") if out is None else out
            check_target(out, overwrite)
            if images != 1:
                raise ValueError(f"--images {images} needs --prompts")
        elif compare:
            raise ValueError("--compare draws one prompt, so it does not go with --prompts")
        lines = [] if prompts is None else prompt_batches.read_prompts(prompts)
        chosen = names_of(guidance)
        scales = scales_of(chosen, {"seg": scale, "pag": pag_scale, "sag": sag_scale})
        if "seg" not in chosen:
            refuse_blur(guidance, compare, sigma, boundary, backend, query_stride)
        if compare and no_guidance:
            raise ValueError("--compare draws with and without guidance, so it does not go with --no-guidance")
        if sigmas is not None and not compare:
            raise ValueError(f"--sigmas {sigmas!r} needs --compare; one picture takes --sigma")
        if compare and sigma is not None:
            raise ValueError(f"--compare takes --sigmas, not --sigma {sigma!r}")
        if compare:
            values = listed("--sigmas", SIGMAS if sigmas is None else sigmas, float, NUMBERS)
        else:
            values = listed("--sigma", "inf" if sigma is None else sigma, float, NUMBERS)
        if len(values) > 1 and not compare:
            raise ValueError(f"--sigma takes one number, got {sigma!r}; several are for --compare --sigmas")
        workers = prompt_batches.Workers(device, many=prompts is not None)
        where = workers.device
        kind = loading.find_dtype(dtype, where)
    need_diffusers()
    from segkern.integrations.diffusers import guide

    names = [name.strip() for name in layers.split(",")]
    with refusing():
        rows = stride("--query-stride", query_stride)
        common = {"start": start, "stop": stop, "reuse": reuse, "schedule": schedule}
        blur = {"boundary": boundary, "backend": backend, "query_stride": rows}
        sets = [specs_of(chosen, scales, names, common, blur | {"sigma": value}) for value in values]
        source = loading.find_model(model, config)
        description = loading.describe_unet_pipeline(source)
        size = image_size(description, width, height)
        check_layers(description, sets[0], where, kind)
        pipe = loading.load_pipeline(source, kind, where)
        guide(pipe, *sets[0]).remove()  # refuses pipelines that cannot be guided
    job = Job(prompt or "", negative_prompt, *size, seed, steps, guidance_scale)
    if prompts is not None:
        specs, folder = () if no_guidance else sets[0], Path("out") if out is None else out

        def settings(one: Job) -> dict[str, object]:
            return describe(source, one, specs, kind)

        with refusing():
            wanted = prompt_batches.pieces(lines, job, images)
            mine = workers.share(lambda: prompt_batches.missing(folder, wanted, settings, overwrite))
        problems = prompt_batches.draw_missing(pipe, mine, specs, workers, folder, settings)
        for problem in problems:
            typer.echo(f"warning: {problem}", err=True)
        return

    assert out is not None
    plan: list[Specs] = [()] if no_guidance else [(), *sets] if compare else sets
    drawn = draw_all(pipe, job, plan)
    details = describe(source, job, () if no_guidance else sets[0], kind)
    if compare:
        details["seg_sigma"] = ", ".join(f"{value:g}" for value in values)
        tiles = [Tile(one.image, label(specs)) for one, specs in zip(drawn, plan, strict=True)]
        image = contact_sheet(
            [Row(tiles)],
            job.prompt,
            f"{source.name}, {size[0]} x {size[1]}, seed {seed}, {steps} steps, "
            f"guidance scale {guidance_scale:g}, SEG scale {scales['seg']:g} in {layers}",
        )
    else:
        image = drawn[0].image
    kept = save(image, out, details)

    if not no_guidance:
        table, problems = report_table(plan, drawn)
        wide(table).print(table)
        for problem in problems:
            typer.echo(f"warning: {problem}", err=True)
    typer.echo(f"wrote {out}" + ("" if kept else " (only PNG keeps the settings as text)"))

# SPDX-License-Identifier: Apache-2.0
"""``segkern generate``: one image with guidance, a comparison on a contact sheet, or a folder of images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from segkern.cli.terminal import (
    NUMBERS,
    SIGMAS,
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
)
from segkern.generation import loading, prompt_batches
from segkern.generation.drawing import (
    ImageRequest,
    Specs,
    check_layers,
    image_metadata,
    label,
    report_rows,
)
from segkern.generation.options import guidance_scales, make_specs, parse_guidance, parse_list
from segkern.generation.pictures import Row, Tile, check_target, contact_sheet, save
from segkern.generation.sizes import image_size
from segkern.generation.tables import wide


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text prompt. For several prompts, use --prompts.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Text file with one prompt per line. Images are written to the folder --out.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, metavar="<int>", help="Images per prompt with --prompts. Seeds count up from --seed.")
    ] = 1,
    negative_prompt: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    guidance: Annotated[str, typer.Option(help="seg, pag, sag, a comma-separated list of them, or none.")] = "seg",
    sigma: Annotated[
        str | None,
        typer.Option(
            help="Blur of SEG in tokens, such as 4, or inf; comma-separated with --compare. "
            f"Default: inf, or {SIGMAS} with --compare."
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Scale of SEG (gamma - 1 in the paper). Default: 3.")] = None,
    pag_scale: Annotated[float | None, typer.Option(help="Scale of PAG. Default: 3.")] = None,
    sag_scale: Annotated[float | None, typer.Option(help="Scale of SAG. Default: 0.75.")] = None,
    layers: Annotated[
        str,
        typer.Option(
            help="Layers of SEG and PAG: down, mid, up, d4, u0-29, globs; comma-separated. See segkern layers."
        ),
    ] = "mid",
    start: Annotated[float, typer.Option(help="Fraction of the steps after which guidance starts.")] = 0.0,
    stop: Annotated[float, typer.Option(help="Fraction of the steps after which guidance stops.")] = 1.0,
    schedule: Annotated[
        str, typer.Option(help="constant, linear or cosine. linear and cosine reduce the scale to 0 at --stop.")
    ] = "constant",
    width: Width = None,
    height: Height = None,
    seed: Seed = 1,
    steps: Steps = 30,
    guidance_scale: GuidanceScale = 5.0,
    dtype: DType = "auto",
    device: Device = "auto",
    config: Config = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Output file, or folder with --prompts. Default: out.png, or out. PNG files contain all settings."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Make a contact sheet: without SEG, and one image per --sigma.")
    ] = False,
) -> None:
    """Generate an image, a comparison or a batch of images.

    With --prompts, the processes of accelerate launch share the images. If a batch is interrupted, run the command
    again to generate the missing images.
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
        names = parse_guidance(guidance)
        scales = guidance_scales(names, {"seg": scale, "pag": pag_scale, "sag": sag_scale})
        for option, given in (("--compare", compare), (f"--sigma {sigma}", sigma is not None)):
            if given and "seg" not in names:
                raise ValueError(f"{option} is of seg, which is not in --guidance {guidance}")
        _refuse_unused(names, guidance, layers, start, stop, schedule)
        usual = SIGMAS if compare else "inf"
        sigmas = parse_list("--sigma", usual if sigma is None else sigma, float, NUMBERS)
        if len(sigmas) > 1 and not compare:
            raise ValueError(f"--sigma takes one number, got {sigma!r}; several are for --compare")
        processes = prompt_batches.Processes(device, many=prompts is not None)
        torch_device = processes.device
        torch_dtype = loading.find_dtype(dtype, torch_device)
    need_diffusers()
    from segkern.integrations.diffusers import guide

    with refusing():
        layer_names = [name.strip() for name in layers.split(",")]
        guided = [make_specs(scales, layer_names, value, start=start, stop=stop, schedule=schedule) for value in sigmas]
        source = loading.find_model(model, config)
        description = loading.describe_unet_pipeline(source)
        size = image_size(description, width, height)
        check_layers(description, guided[0], torch_device, torch_dtype)
        pipe = loading.load_pipeline(source, torch_dtype, torch_device)
        if names:
            guide(pipe, *guided[0]).remove()  # refuses pipelines that cannot be guided
    request = ImageRequest(prompt or "", negative_prompt, *size, seed, steps, guidance_scale)

    def metadata(request: ImageRequest) -> dict[str, object]:
        return image_metadata(source, request, guided[0], torch_dtype)

    if prompts is not None:
        folder = Path("out") if out is None else out
        with refusing():
            items = prompt_batches.batch_items(lines, request, images)
            mine = processes.share(lambda: prompt_batches.find_missing(folder, items, metadata, overwrite))
        _draw_items(pipe, mine, guided[0], processes, folder, metadata)
        return

    assert out is not None
    plan = [(), *guided] if compare else guided
    results = draw_with_progress(pipe, request, plan)
    image, details = results[0].image, metadata(request)
    if compare:
        details["seg_sigma"] = ", ".join(f"{value:g}" for value in sigmas)
        image = contact_sheet(
            [
                Row(
                    [
                        Tile(result.image, label(specs, guidance_scale))
                        for result, specs in zip(results, plan, strict=True)
                    ]
                )
            ],
            request.prompt,
            f"{source.name}, {size[0]} x {size[1]}, seed {seed}, {steps} steps, "
            f"SEG scale {scales['seg']:g} in {layers}",
        )
    has_settings = save(image, out, details)
    if names:
        headings, rows = report_rows(plan, results, guidance_scale)
        table = Table(*headings, title="guidance report")
        for row in rows:
            table.add_row(*row)
        wide(table).print(table)
    _warn(problem for result in results if result.report is not None for problem in result.report.problems)
    typer.echo(f"wrote {out}" + ("" if has_settings else " (only PNG keeps the settings as text)"))


def _refuse_unused(names: Sequence[str], guidance: str, layers: str, start: float, stop: float, schedule: str) -> None:
    """Raise a ValueError for an option that is not at its default and that no guidance takes."""
    unused = {} if names else {"--start": (start, 0.0), "--stop": (stop, 1.0), "--schedule": (schedule, "constant")}
    if not {"seg", "pag"} & set(names):
        unused["--layers"] = layers, "mid"
    for option, (value, default) in unused.items():
        if value != default:
            raise ValueError(f"{option} {value} is for a guidance that is not in --guidance {guidance}")


def _draw_items(
    pipe: Any,
    items: Sequence[prompt_batches.BatchItem],
    specs: Specs,
    processes: prompt_batches.Processes,
    folder: Path,
    metadata: prompt_batches.Metadata,
) -> None:
    """Draw one process's part of many pictures, a line each."""
    problems: list[str] = []
    for number, item in enumerate(items, 1):
        (result,) = draw_with_progress(pipe, item.request, [specs], show=processes.is_main)
        prompt_batches.write(folder, item, result, metadata(item.request))
        typer.echo(f"wrote {folder / item.name}.png ({number} of {len(items)}{processes.place})")
        problems += () if result.report is None else result.report.problems
    if processes.is_main and not items:
        typer.echo(f"all pictures are in {folder} already")
    _warn(problems)


def _warn(problems: Iterable[str]) -> None:
    """Print each problem once."""
    for problem in dict.fromkeys(problems):
        typer.echo(f"warning: {problem}", err=True)

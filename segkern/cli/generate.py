# SPDX-License-Identifier: Apache-2.0
"""``segkern generate``: one image with guidance, a comparison on a contact sheet, or a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from segkern.cli.many_images import ManyImages, first_prompts, parse_batch_size
from segkern.cli.terminal import (
    NUMBERS,
    SIGMAS,
    Config,
    Device,
    DType,
    GuidanceScale,
    Height,
    Model,
    Problems,
    Seed,
    Steps,
    Width,
    draw_with_progress,
    need_diffusers,
    refusing,
    warn_of_unknown_words,
)
from segkern.generation import loading
from segkern.generation.calls import check_text_guidance, default_guidance_scale
from segkern.generation.drawing import (
    ImageRequest,
    check_layers,
    default_layers,
    image_metadata,
    label,
    report_rows,
)
from segkern.generation.engine import Job
from segkern.generation.options import LAYERED, check_finite, guidance_scales, make_specs, parse_guidance, parse_list
from segkern.generation.pictures import Row, Tile, check_target, contact_sheet, save
from segkern.generation.processes import Processes, launched_processes
from segkern.generation.prompt_files import count_rows
from segkern.generation.row_jobs import RowSettings
from segkern.generation.sizes import image_size
from segkern.generation.storage import LocalFolder, is_url, open_folder
from segkern.generation.tables import new_table, show


def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text prompt. For several prompts, use --prompts.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="<path or URL>",
            help="Text file with one prompt per line, or .jsonl or .parquet file with settings. Images are written to "
            "the folder --out.",
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=1, metavar="<int>", help="Images per prompt with --prompts. Seeds count up from --seed.")
    ] = 1,
    batch_size: Annotated[
        str,
        typer.Option(
            metavar="<int or auto>",
            help="Images that --prompts generates at once. auto uses the largest number that fits in memory.",
        ),
    ] = "1",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Generate --prompts on the Ray cluster at this address. Without an address, a cluster is started on "
            "this machine.",
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="<int>", help="With --ray, write WebDataset shards with this number of images each."
        ),
    ] = None,
    negative_prompt: Annotated[str, typer.Option(help="Negative prompt.")] = "",
    guidance: Annotated[
        str, typer.Option(help="seg, pag, sag, slg, tpg, a comma-separated list of them, or none.")
    ] = "seg",
    sigma: Annotated[
        str | None,
        typer.Option(
            help="Sigma of the SEG blur in tokens, such as 4, or inf; a comma-separated list with --compare. "
            f"Default: inf, or {SIGMAS} with --compare."
        ),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Scale of SEG (gamma - 1 in the paper). Default: 3.")] = None,
    pag_scale: Annotated[float | None, typer.Option(help="Scale of PAG. Default: 3.")] = None,
    sag_scale: Annotated[float | None, typer.Option(help="Scale of SAG. Default: 0.75.")] = None,
    slg_scale: Annotated[float | None, typer.Option(help="Scale of SLG. Default: 2.8.")] = None,
    tpg_scale: Annotated[float | None, typer.Option(help="Scale of TPG. Default: 3.")] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of all methods except SAG: down, mid, up, d4, u0-29, globs, or block numbers of a "
            "transformer; comma-separated. Default: see segkern layers."
        ),
    ] = None,
    start: Annotated[
        float | None, typer.Option(help="Fraction of the steps after which guidance starts. Default: 0.")
    ] = None,
    stop: Annotated[
        float | None,
        typer.Option(
            help="Fraction of the steps after which guidance stops. Default: 1. Without --start and --stop, SLG is "
            "active from 0.01 to 0.2."
        ),
    ] = None,
    schedule: Annotated[
        str, typer.Option(help="constant, linear or cosine. linear and cosine reduce the scale to 0 at --stop.")
    ] = "constant",
    width: Width = None,
    height: Height = None,
    seed: Seed = 1,
    steps: Steps = 30,
    guidance_scale: GuidanceScale = None,
    dtype: DType = "auto",
    device: Device = "auto",
    config: Config = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="<path or URL>",
            help="Output file. With --prompts, a folder or a URL. Default: out.png, or out. PNG files contain all "
            "settings.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Overwrite existing files.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Make a contact sheet: one image without SEG, and one per --sigma.")
    ] = False,
) -> None:
    """Generate an image, a comparison or a batch of images.

    With --prompts, the processes of accelerate launch or torchrun share the images; with --ray, the machines of a Ray
    cluster. To resume an interrupted run, or to try failed images again, repeat the command. Failed images are listed
    in failures.jsonl, and the exit code is 1.
    """
    with refusing():
        if prompt is not None and prompts is not None:
            raise ValueError("use either a prompt or --prompts, not both")
        if prompt is None and prompts is None:
            raise ValueError("a prompt is missing; give a prompt, or --prompts FILE with one prompt per line")
        if prompts is None:
            if ray is not None:
                raise ValueError("--ray needs --prompts")
            out = "out.png" if out is None else out
            if is_url(out):
                raise ValueError(f"--out {out!r} is a URL, which needs --prompts")
            check_target(Path(out), overwrite)
            if images != 1:
                raise ValueError(f"--images {images} needs --prompts; use --seed for another image of one prompt")
            if batch_size != "1":
                raise ValueError(f"--batch-size {batch_size} needs --prompts")
        elif compare:
            raise ValueError("use either --compare or --prompts, not both")
        if shards is not None and ray is None:
            raise ValueError(f"--shards {shards} needs --ray")
        lines = None if prompts is None else count_rows(prompts)
        at_once = parse_batch_size(batch_size)
        names = parse_guidance(guidance)
        given_scales = {"seg": scale, "pag": pag_scale, "sag": sag_scale, "slg": slg_scale, "tpg": tpg_scale}
        scales = guidance_scales(names, given_scales)
        for option, given in (("--compare", compare), (f"--sigma {sigma}", sigma is not None)):
            if given and "seg" not in names:
                raise ValueError(f"{option} has no effect without seg in --guidance, got --guidance {guidance}")
        _check_used(names, guidance, layers, start, stop, schedule)
        sigmas = parse_list("--sigma", (SIGMAS if compare else "inf") if sigma is None else sigma, float, NUMBERS)
        if len(sigmas) > 1 and not compare:
            raise ValueError(f"--sigma accepts a list only with --compare, got {sigma!r}")
        if guidance_scale is not None:
            check_finite("--guidance-scale", guidance_scale)
        if ray is not None:
            if launched_processes()[0] > 1:
                raise ValueError("use either --ray or several processes, not both")
            processes, torch_device = None, loading.find_device("cpu")  # only workers use the device
        else:
            processes = Processes(device, many=prompts is not None)
            torch_device = processes.device
        torch_dtype = loading.find_dtype(dtype, torch_device)
    if ray is None:
        need_diffusers()
    else:
        need_diffusers("ray", extra="cluster")
    from segkern.integrations.diffusers import guide

    with refusing():
        source = loading.find_model(model, config)
        description = loading.describe_image_pipeline(source)
        size = image_size(description, width, height, prefix="--")
        cfg = default_guidance_scale(description) if guidance_scale is None else guidance_scale
        check_text_guidance(description, cfg, negative_prompt, ("--guidance-scale", "--negative-prompt"))
        given_layers = None if layers is None else [name.strip() for name in layers.split(",")]
        layers_of = {name: given_layers or default_layers(description, name) for name in LAYERED}
        guided = [make_specs(scales, layers_of, value, start=start, stop=stop, schedule=schedule) for value in sigmas]
        check_layers(description, guided[0], torch_device, torch_dtype)
    request = ImageRequest(prompt or "", negative_prompt, *size, seed, steps, cfg)
    settings = RowSettings(request, images, scales, layers_of, sigmas[0], start, stop, schedule)
    if processes is None:
        from segkern.cli.cluster_images import generate_on_cluster

        assert prompts is not None
        assert ray is not None
        warn_of_unknown_words(source, negative_prompt, *first_prompts(prompts))
        generate_on_cluster(
            ray,
            prompts,
            out or "out",
            settings,
            model=model,
            config=config,
            dtype=dtype,
            device=device,
            batch_size=at_once,
            rows=lines,
            shards=shards,
            overwrite=overwrite,
        )
        return

    with refusing():
        pipe = loading.load_pipeline(source, torch_dtype, torch_device)
        if names:
            guide(pipe, *guided[0]).remove()  # raises a ValueError if the pipeline is not supported

    def metadata(job: Job) -> dict[str, object]:
        return image_metadata(source, job.request, job.specs, torch_dtype, pipe.scheduler)

    if prompts is not None:
        with refusing():
            folder = open_folder("out" if out is None else out)
            processes.start(folder.path if isinstance(folder, LocalFolder) else None, folder.prepare)
        if processes.is_main:
            warn_of_unknown_words(source, negative_prompt, *first_prompts(prompts))
        total = None if lines is None else lines * images
        ManyImages(pipe, settings, folder, metadata, overwrite, processes, at_once, total).generate(prompts)
        return

    warn_of_unknown_words(source, negative_prompt, request.prompt)
    assert out is not None
    plan = [(), *guided] if compare else guided
    results = draw_with_progress(pipe, request, plan)
    image, details = results[0].image, metadata(Job(request, guided[0]))
    if compare:
        details["seg_sigma"] = ", ".join(f"{value:g}" for value in sigmas)
        tiles = [Tile(result.image, label(specs, cfg)) for result, specs in zip(results, plan, strict=True)]
        details_text = f"{source.name}, {size[0]} x {size[1]}, seed {seed}, {steps} steps, "
        details_text += f"SEG scale {scales['seg']:g} in {','.join(layers_of['seg'])}"
        image = contact_sheet([Row(tiles)], request.prompt, details_text)
    has_settings = save(image, Path(out), details, sheet=compare)
    if names:
        headings, rows = report_rows(plan, results, cfg)
        table = new_table(*headings[:-1], title="Guidance report")  # without the module names, which are long
        for row in rows:
            table.add_row(*row[:-1])
        show(table)
    problems = Problems()
    for result in results:
        problems.add(result.report)
    problems.warn()
    typer.echo(f"wrote {out}" + ("" if has_settings else " (without its settings, which only PNG files contain)"))


def _check_used(
    names: Sequence[str], guidance: str, layers: str | None, start: float | None, stop: float | None, schedule: str
) -> None:
    """Raise a ValueError for an option that is not at its default and has no effect with this guidance."""
    unused: dict[str, tuple[object, object]] = {}
    if not names:
        unused = {"--start": (start, None), "--stop": (stop, None), "--schedule": (schedule, "constant")}
    if not LAYERED & set(names):
        unused["--layers"] = layers, None
    for option, (value, default) in unused.items():
        if value != default:
            raise ValueError(f"{option} {value} has no effect with --guidance {guidance}")

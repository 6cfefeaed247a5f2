# SPDX-License-Identifier: Apache-2.0
"""Images per second with and without batches: ``python -m benchmarks.batches``.

Both ways generate the same images with SEG, in turns. The first round is not timed.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

from segkern.generation.calls import default_guidance_scale
from segkern.generation.drawing import ImageRequest
from segkern.generation.engine import Job, generate_images
from segkern.generation.loading import find_device, find_dtype, find_model, load_pipeline, quiet_libraries
from segkern.generation.sizes import image_size
from segkern.generation.tables import new_table, show


def images_per_second(
    model: str, device: torch.device, batch_size: int, images: int, steps: int, rounds: int
) -> dict[int, float]:
    """Return the median number of images per second, by batch size."""
    from segkern.integrations.diffusers import SEG

    quiet_libraries()
    pipe = load_pipeline(find_model(model), find_dtype("auto", device), device)
    size, scale = image_size(pipe, None, None), default_guidance_scale(pipe)
    jobs = [Job(ImageRequest("an image", "", *size, seed, steps, scale), (SEG(),)) for seed in range(images)]
    seconds: dict[int, list[float]] = {1: [], batch_size: []}
    for _ in range(rounds + 1):
        for size_of_batch, times in seconds.items():
            begun = time.perf_counter()
            failures = [outcome.reason for outcome in generate_images(pipe, jobs, size_of_batch) if outcome.reason]
            times.append(time.perf_counter() - begun)
            if failures:
                raise RuntimeError(failures[0])
    return {size_of_batch: images / statistics.median(times[1:]) for size_of_batch, times in seconds.items()}


def main(
    model: Annotated[str, typer.Option(help="Model, as in segkern generate.")] = "demo",
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or cuda:1.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=2, help="Images per batch.")] = 8,
    images: Annotated[int, typer.Option(min=1, help="Images per round.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps per image.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 3,
) -> None:
    """Compare the number of images per second with batches and one by one."""
    speeds = images_per_second(model, find_device(device), batch_size, images, steps, rounds)
    table = new_table("batch size", "images per second", "ratio")
    for size_of_batch, speed in speeds.items():
        table.add_row(str(size_of_batch), f"{speed:.3g}", f"{speed / speeds[1]:.2f}")
    show(table)


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Train the bundled model and its judge from scratch: ``python -m studies.training``."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from studies.training import denoiser, export, judge, vae, words
from studies.training.data import COUNT
from studies.training.loop import Plan


class Part(str, Enum):
    """What to train."""

    ALL = "all"
    MODEL = "model"
    JUDGE = "judge"


def main(
    part: Annotated[Part, typer.Option(help="Train the model, its judge, or both.")] = Part.ALL,
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints and losses. An interrupted training resumes from it.")
    ] = Path("outputs/training"),
    out: Annotated[Path, typer.Option(help="Folder to write demo/ and judge/ to.")] = export.CHECKPOINTS,
    share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the steps and images; less than 1 is a rehearsal.")
    ] = 1,
) -> None:
    """Train the autoencoder, the denoiser with its text encoders, and the judge, and write the checkpoints."""
    if share < 1 and out == export.CHECKPOINTS:
        raise typer.BadParameter("a rehearsal must not replace the bundled checkpoints; name another folder with --out")

    def shortened(plan: Plan) -> Plan:
        return replace(plan, steps=max(1, int(plan.steps * share)))

    if part != Part.JUDGE:
        count = max(64, int(COUNT * share))
        words.write(work)
        autoencoder = vae.fit(work, shortened(vae.PLAN), count)
        unet, texts = denoiser.fit(work, autoencoder, work, shortened(denoiser.PLAN), count)
        autoencoder = vae.sharpen(work, autoencoder, shortened(vae.SHARPEN), count)
        export.pipeline(out / "demo", autoencoder, texts, unet, work)
        export.names(out / "demo")
    if part != Part.MODEL:
        export.judge(out / "judge", judge.fit(work, shortened(judge.PLAN)))
    export.record(out / "demo", work)


if __name__ == "__main__":
    typer.run(main)

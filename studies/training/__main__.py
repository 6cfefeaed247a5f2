# SPDX-License-Identifier: Apache-2.0
"""Train the bundled model and its judge from nothing: ``python -m studies.training``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from studies.training import denoiser, export, judge, text, vae
from studies.training.data import COUNT
from studies.training.loop import Plan


def main(
    work: Annotated[
        Path, typer.Option(help="Folder for checkpoints and losses, from which a run that was cut off goes on.")
    ] = Path("outputs/training"),
    out: Annotated[Path, typer.Option(help="Folder that gets demo/ and judge/.")] = export.CHECKPOINTS,
    share: Annotated[float, typer.Option(min=0.0, max=1.0, help="Of the steps and drawings; less is a rehearsal.")] = 1,
) -> None:
    """Draw, train autoencoder, text encoders, denoiser and judge, and write the checkpoints."""
    if share < 1 and out == export.CHECKPOINTS:
        raise typer.BadParameter("a rehearsal does not replace the bundled checkpoints; name another folder with --out")

    def part(plan: Plan) -> Plan:
        return replace(plan, steps=max(1, int(plan.steps * share)))

    count = max(64, int(COUNT * share))
    autoencoder = vae.fit(work, part(vae.PLAN), count)
    texts = text.fit(work, part(text.PLAN))
    unet = denoiser.fit(work, autoencoder, texts, part(denoiser.PLAN), count)
    autoencoder = vae.sharpen(work, autoencoder, part(vae.SHARPEN), count)
    export.pipeline(out / "demo", autoencoder, texts, unet)
    export.judge(out / "judge", judge.fit(work, part(judge.PLAN)))
    export.record(out / "demo", work)


if __name__ == "__main__":
    typer.run(main)

# SPDX-License-Identifier: Apache-2.0
"""Python that draws a picture of the page again."""

from __future__ import annotations

from pathlib import Path

import torch

from segkern.generation.drawing import ImageRequest, Specs
from segkern.generation.loading import DEMO, Source

_PROGRAM = """\
from math import inf

import torch

from segkern.integrations.diffusers import {names}, guide
from segkern.generation.loading import find_model, load_pipeline

pipe = load_pipeline(find_model({model}), {dtype}, torch.device({device!r}))
with guide(pipe, {specs}) as guidance:
    image = pipe(
        {request.prompt!r},
        negative_prompt={negative_prompt!r},
        width={request.width},
        height={request.height},
        num_inference_steps={request.steps},
        guidance_scale={request.guidance_scale!r},
        generator=torch.Generator("cpu").manual_seed({request.seed}),
    ).images[0]
print(guidance.report())
image.save("guided.png")
"""


def snippet(source: Source, request: ImageRequest, specs: Specs, dtype: torch.dtype, device: torch.device) -> str:
    """A program that leaves the picture in ``image``, the same one bit for bit where it was drawn.

    Args:
        source: of the model.
        request: what was drawn.
        specs: with which guidance, at least one.
        dtype: of the weights.
        device: that drew.

    Example:
        >>> from segkern.integrations.diffusers import SEG
        >>> from segkern.generation.loading import find_model
        >>> request = ImageRequest("a red ring", "", 64, 64, 1, 20, 3.0)
        >>> text = snippet(find_model("demo"), request, (SEG(),), torch.float32, torch.device("cpu"))
        >>> [line for line in text.splitlines() if "guide(" in line]
        ['with guide(pipe, SEG(scale=3.0, sigma=inf)) as guidance:']
    """
    return _PROGRAM.format(
        names=", ".join(sorted(type(spec).__name__ for spec in specs)),
        model=", ".join(map(repr, _model(source))),
        dtype=dtype,
        device=str(device),
        specs=", ".join(map(repr, specs)),
        request=request,
        negative_prompt=request.negative_prompt or None,
    )


def _model(source: Source) -> list[str]:
    """The arguments of ``find_model``, from any folder."""
    if source.weights == str(DEMO):
        return ["demo"]
    if source.kind == "hub":
        return [source.weights]
    weights, config = Path(source.weights), Path(source.config)
    if source.kind == "folder":
        return [str(weights.resolve())]
    return [str(weights.resolve()), str(config.resolve()) if config.is_dir() else source.config]

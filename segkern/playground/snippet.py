# SPDX-License-Identifier: Apache-2.0
"""Python code that generates an image of the page again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
{arguments}
        generator=torch.Generator("cpu").manual_seed({request.seed}),
    ).images[0]
print(guidance.report())
image.save("guided.png")
"""


def snippet(
    source: Source,
    request: ImageRequest,
    arguments: Mapping[str, Any],
    specs: Specs,
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """Return a program that generates the image again as ``image``, bit-for-bit identical on the same machine.

    Args:
        source: Model.
        request: Image that was generated.
        arguments: Arguments of the pipeline's call, from :func:`segkern.generation.calls.call_arguments`.
        specs: Guidance methods, at least one.
        dtype: Data type of the weights.
        device: Device that generated the image.

    Example:
        >>> from segkern.integrations.diffusers import SEG
        >>> from segkern.generation.loading import find_model
        >>> request = ImageRequest("fox", "", 64, 64, 1, 20, 3.0)
        >>> arguments = {"width": 64, "height": 64}
        >>> text = snippet(find_model("demo"), request, arguments, (SEG(),), torch.float32, torch.device("cpu"))
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
        arguments="\n".join(f"        {name}={value!r}," for name, value in arguments.items()),
    )


def _model(source: Source) -> list[str]:
    """Return the arguments of ``find_model``, valid in any working directory."""
    if source.weights == str(DEMO):
        return ["demo"]
    if source.kind == "hub":
        return [source.weights]
    weights, config = Path(source.weights), Path(source.config)
    if source.kind == "folder":
        return [str(weights.resolve())]
    return [str(weights.resolve()), str(config.resolve()) if config.is_dir() else source.config]

# SPDX-License-Identifier: Apache-2.0
"""Python that draws a picture of the page again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segkern.generation.drawing import ImageRequest, Specs
from segkern.generation.loading import DEMO, Source

if TYPE_CHECKING:
    from segkern.integrations.diffusers.specs.base import Spec


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
        ['with guide(pipe, SEG(scale=3.0, sigma=math.inf)) as guidance:']
    """
    calls = [_call(spec) for spec in specs]
    names = ", ".join(sorted({type(spec).__name__ for spec in specs}))
    lines = [
        *(["import math", ""] if any("math." in call for call in calls) else []),
        "import torch",
        "",
        f"from segkern.integrations.diffusers import {names}, guide",
        "from segkern.generation.loading import find_model, load_pipeline",
        "",
        f"pipe = load_pipeline(find_model({_model(source)}), {dtype}, torch.device({_literal(str(device))}))",
        *_with(calls),
        "    image = pipe(",
        f"        {_literal(request.prompt)},",
        f"        negative_prompt={_literal(request.negative_prompt or None)},",
        f"        width={request.width},",
        f"        height={request.height},",
        f"        num_inference_steps={request.steps},",
        f"        guidance_scale={request.guidance_scale!r},",
        f'        generator=torch.Generator("cpu").manual_seed({request.seed}),',
        "    ).images[0]",
        "print(guidance.report())",
        'image.save("guided.png")',
    ]
    return "\n".join(lines) + "\n"


def _with(calls: list[str]) -> list[str]:
    """One line, or one for each guidance."""
    if len(calls) == 1:
        return [f"with guide(pipe, {calls[0]}) as guidance:"]
    return ["with guide(", "    pipe,", *(f"    {call}," for call in calls), ") as guidance:"]


def _call(spec: Spec) -> str:
    """A guidance as the call that makes it."""
    arguments = (f"{name}={_literal(value)}" for name, value in spec.main_values().items())
    return f"{type(spec).__name__}({', '.join(arguments)})"


def _literal(value: Any) -> str:
    """A value as Python writes it; texts in double quotes."""
    if isinstance(value, str):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, float) and not math.isfinite(value):
        return "math.nan" if math.isnan(value) else "math.inf" if value > 0 else "-math.inf"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_literal, value))}]"
    return repr(value)


def _model(source: Source) -> str:
    """The arguments of ``find_model``, from any folder."""
    if source.weights == str(DEMO):
        return _literal("demo")
    if source.kind == "hub":
        return _literal(source.weights)
    weights = _literal(str(Path(source.weights).resolve()))
    if source.kind == "folder":
        return weights
    config = Path(source.config)
    return f"{weights}, {_literal(str(config.resolve()) if config.is_dir() else source.config)}"

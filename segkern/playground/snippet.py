# SPDX-License-Identifier: Apache-2.0
"""Python that draws a picture of the page again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segkern.generation.drawing import Job, Specs
from segkern.generation.loading import DEMO, Source

if TYPE_CHECKING:
    from segkern.integrations.diffusers.specs.base import Spec


def snippet(source: Source, job: Job, specs: Specs, dtype: torch.dtype, device: torch.device) -> str:
    """A program that leaves the picture in ``image``, the same one bit for bit where it was drawn.

    Args:
        source: of the model.
        job: what was drawn.
        specs: with which guidance, at least one.
        dtype: of the weights.
        device: that drew.

    Example:
        >>> from segkern.integrations.diffusers import SEG
        >>> from segkern.generation.loading import find_model
        >>> job = Job("a red ring", "", 64, 64, 1, 20, 3.0)
        >>> text = snippet(find_model("demo"), job, (SEG(),), torch.float32, torch.device("cpu"))
        >>> [line for line in text.splitlines() if "guide(" in line]
        ['with guide(pipe, SEG(scale=3.0, sigma=math.inf)) as guidance:']
    """
    guides = [_call(spec) for spec in specs]
    kinds = ", ".join(sorted({type(spec).__name__ for spec in specs}))
    found = f"find_model({_model(source)})"
    loaded = f"load_pipeline({found}, {dtype}, torch.device({_literal(str(device))}))"
    lines = [
        *(["import math", ""] if any("math." in guide for guide in guides) else []),
        "import torch",
        "",
        f"from segkern.integrations.diffusers import {kinds}, guide",
        "from segkern.generation.loading import find_model, load_pipeline",
        "",
        f"pipe = {loaded}",
        *_with(guides),
        "    image = pipe(",
        f"        {_literal(job.prompt)},",
        f"        negative_prompt={_literal(job.negative_prompt or None)},",
        f"        width={job.width},",
        f"        height={job.height},",
        f"        num_inference_steps={job.steps},",
        f"        guidance_scale={job.guidance_scale!r},",
        f'        generator=torch.Generator("cpu").manual_seed({job.seed}),',
        "    ).images[0]",
        "print(guidance.report())",
        'image.save("guided.png")',
    ]
    return "\n".join(lines) + "\n"


def _with(guides: list[str]) -> list[str]:
    """One line, or one for each guidance."""
    if len(guides) == 1:
        return [f"with guide(pipe, {guides[0]}) as guidance:"]
    return ["with guide(", "    pipe,", *(f"    {guide}," for guide in guides), ") as guidance:"]


def _call(spec: Spec) -> str:
    """A guidance as the call that makes it."""
    arguments = ", ".join(f"{name}={_literal(value)}" for name, value in spec.main_values().items())
    return f"{type(spec).__name__}({arguments})"


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
    """What ``find_model`` takes, from any folder."""
    if source.weights == str(DEMO):
        return _literal("demo")
    if source.kind == "hub":
        return _literal(source.weights)
    weights = _literal(str(Path(source.weights).resolve()))
    if source.kind == "folder":
        return weights
    config = Path(source.config)
    return f"{weights}, {_literal(str(config.resolve()) if config.is_dir() else source.config)}"

# SPDX-License-Identifier: Apache-2.0
"""Conversion of the lines of a prompt file to images to generate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from segkern.generation.calls import check_text_guidance
from segkern.generation.drawing import ImageRequest
from segkern.generation.engine import Job
from segkern.generation.options import check_finite, make_specs
from segkern.generation.prompt_files import Row
from segkern.generation.sizes import image_size

_LARGEST_SEED = 2**32 - 1
_LINE_DIGITS = 5


def image_name(line: int, seed: int) -> str:
    """Return the name of the files of an image, without suffix."""
    return f"{line:0{_LINE_DIGITS}d}-seed-{seed}"


@dataclass(frozen=True)
class RowSettings:
    """Settings of the images of all lines. A line can replace some of them.

    Attributes:
        request: Settings of the first image, apart from the prompt.
        images: Images per line. Their seeds count up from that of the line.
        scales: Scales by the names of the guidance methods.
        layers: Layers of each guidance method that has any.
        sigma: Blur of SEG.
        start: Fraction of the steps after which guidance starts; None for the default.
        stop: Fraction of the steps after which guidance stops; None for the default.
        schedule: Schedule of the scales.
    """

    request: ImageRequest
    images: int
    scales: Mapping[str, float]
    layers: Mapping[str, list[str]]
    sigma: float
    start: float | None
    stop: float | None
    schedule: str

    def jobs(self, row: Row, pipe: Any) -> Iterator[Job]:
        """Yield the jobs of a line.

        Args:
            row: The line.
            pipe: Pipeline, which determines the valid sizes.

        Raises:
            ValueError: If the line has an error or an invalid setting.
        """
        if row.error:
            raise ValueError(row.error)
        given = dict(row.settings)
        sigma, scales = self.sigma, dict(self.scales)
        for name in ("scale", "sigma"):
            if name in given and "seg" not in scales:
                raise ValueError(f"{name} {given[name]} has no effect without seg in --guidance")
        if "sigma" in given:
            try:
                sigma = float(given.pop("sigma"))
            except ValueError as error:
                raise ValueError(f"sigma must be a number or 'inf': {error}") from None
        if "scale" in given:
            scales["seg"] = float(given.pop("scale"))
        specs = make_specs(scales, self.layers, sigma, start=self.start, stop=self.stop, schedule=self.schedule)
        request = replace(self.request, **given)
        image_size(pipe, request.width, request.height)
        check_finite("guidance_scale", request.guidance_scale)
        names = "guidance_scale", "negative_prompt"
        check_text_guidance(pipe, request.guidance_scale, request.negative_prompt, names)
        if request.steps < 1:
            raise ValueError(f"steps must be at least 1, got {request.steps}")
        if not 0 <= request.seed <= _LARGEST_SEED + 1 - self.images:
            raise ValueError(f"seeds must be between 0 and {_LARGEST_SEED}, got {request.seed}")
        for seed in range(request.seed, request.seed + self.images):
            yield Job(replace(request, seed=seed), specs, image_name(row.number, seed))

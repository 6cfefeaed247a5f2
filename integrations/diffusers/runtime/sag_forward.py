# SPDX-License-Identifier: Apache-2.0
"""The second forward of Self-Attention Guidance, on the image that :mod:`sag_blur` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from segkern.integrations.diffusers.runtime.branches import Arguments, DenoiserArguments
from segkern.integrations.diffusers.runtime.guided_layers import GuidedLayer
from segkern.integrations.diffusers.runtime.pipeline_run import repeated_forward
from segkern.integrations.diffusers.runtime.processor import norms
from segkern.integrations.diffusers.runtime.sag_blur import attended, blurred_input, check_scheduler, levels
from segkern.integrations.specs import SAG
from segkern.integrations.specs.base import Spec


class SAGForward:
    """The second forwards of a pipeline's SAG guidances.

    Raises:
        ValueError: for a scheduler whose images cannot be noised again.
    """

    def __init__(self, pipe: Any, specs: Sequence[Spec]) -> None:
        self._pipe = pipe
        self._specs = specs
        if any(isinstance(spec, SAG) for spec in specs):
            if not hasattr(pipe, "scheduler"):
                raise ValueError("SAG(...) needs the scheduler of a pipeline, got a denoiser alone")
            check_scheduler(pipe.scheduler)

    def difference(
        self,
        index: int,
        denoiser: nn.Module,
        arguments: DenoiserArguments,
        given: Arguments,
        output: torch.Tensor,
        layer: GuidedLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The difference that the guidance adds once, and norms of the change of the image and of the image.

        Args:
            index: of the guidance.
            denoiser: to run once more.
            arguments: how to read its arguments.
            given: the first forward's, of the samples that are degraded.
            output: the first forward's, of those samples.
            layer: which tells where their image is attended to.
        """
        spec = self._specs[index]
        assert isinstance(spec, SAG)
        mass, grid = layer.processor.mass, layer.processor.grid
        assert mass is not None
        assert grid is not None
        x = arguments.get("sample", *given)
        scheduler = self._pipe.scheduler
        check_scheduler(scheduler)  # it may be another one by now
        at = levels(scheduler, arguments.get("timestep", *given))
        mask = attended(mass, (grid.height, grid.width), spec.threshold, (x.shape[2], x.shape[3]))
        prediction = scheduler.config.get("prediction_type", "epsilon")
        again = blurred_input(x, output, mask, at, prediction, (spec.sigma, spec.kernel_size))
        args, kwargs = arguments.put(*given, sample=again)
        with repeated_forward():
            degraded = denoiser(*args, **kwargs)[0]
        compute = torch.promote_types(output.dtype, torch.float32)
        return output.to(compute) - degraded.to(compute), torch.stack([norms(again - x), norms(x)])

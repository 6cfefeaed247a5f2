# SPDX-License-Identifier: Apache-2.0
"""The second denoiser call of Self-Attention Guidance, on the image from :mod:`sag_blur`."""

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
    """The second denoiser calls of a pipeline's SAG specs.

    Raises:
        ValueError: If images cannot be noised again for this scheduler.
    """

    def __init__(self, pipe: Any, specs: Sequence[Spec]) -> None:
        self._pipe = pipe
        self._specs = specs
        if any(isinstance(spec, SAG) for spec in specs):
            if not hasattr(pipe, "scheduler"):
                raise ValueError("SAG(...) needs a pipeline's scheduler, got a denoiser without a pipeline")
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
        """Return the unscaled difference, and the norms of the degradation of the image and of the image itself.

        Args:
            index: Index of the spec.
            denoiser: The denoiser to call again.
            arguments: Reads the denoiser's arguments.
            given: Arguments of the first call, for the samples to degrade.
            output: Output of the first call, for those samples.
            layer: The layer whose attention selects what to blur.
        """
        spec = self._specs[index]
        assert isinstance(spec, SAG)
        mass, grid = layer.processor.mass, layer.processor.grid
        assert mass is not None
        assert grid is not None
        x = arguments.get("sample", *given)
        scheduler = self._pipe.scheduler
        check_scheduler(scheduler)  # it may have been replaced
        at = levels(scheduler, arguments.get("timestep", *given))
        mask = attended(mass, (grid.height, grid.width), spec.threshold, (x.shape[2], x.shape[3]))
        prediction = scheduler.config.get("prediction_type", "epsilon")
        again = blurred_input(x, output, mask, at, prediction, (spec.sigma, spec.kernel_size))
        args, kwargs = arguments.put(*given, sample=again)
        with repeated_forward():
            degraded = denoiser(*args, **kwargs)[0]
        compute = torch.promote_types(output.dtype, torch.float32)
        return output.to(compute) - degraded.to(compute), torch.stack([norms(again - x), norms(x)])

# SPDX-License-Identifier: Apache-2.0
"""The second forward of Self-Attention Guidance, on the image that :mod:`degrading` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from segkern.integrations.diffusers.branches import Arguments, Batch, DenoiserArguments
from segkern.integrations.diffusers.degrading import attended, check_scheduler, degrade, levels
from segkern.integrations.diffusers.guided_layers import GuidedLayer
from segkern.integrations.diffusers.processor import norms
from segkern.integrations.diffusers.schedule import number
from segkern.integrations.diffusers.spec import Spec
from segkern.integrations.diffusers.specs import SAG


class Degradations:
    """Those of a pipeline's guidances.

    Attributes:
        running: whether a second forward is under way, which is a plain one.

    Raises:
        ValueError: for a scheduler whose images cannot be noised again.
    """

    def __init__(self, pipe: Any, specs: Sequence[Spec]) -> None:
        self._pipe = pipe
        self._specs = specs
        self.running = False
        if any(isinstance(spec, SAG) for spec in specs):
            check_scheduler(pipe.scheduler)

    def difference(
        self,
        index: int,
        denoiser: nn.Module,
        arguments: DenoiserArguments,
        given: Arguments,
        batch: Batch,
        output: torch.Tensor,
        layer: GuidedLayer,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the guidance adds, once, and the norms of what it changed of the image and of the image.

        Args:
            index: of the guidance.
            denoiser: to run once more.
            arguments: how to read its arguments.
            given: those of the first forward, of the pipeline's own batch.
            batch: that batch.
            output: of the first forward.
            layer: which tells where the image is attended to.
        """
        spec = self._specs[index]
        assert isinstance(spec, SAG)
        mass, grid = layer.processor.mass, layer.processor.grid
        assert mass is not None
        assert grid is not None
        samples = batch.reference
        args, kwargs = arguments.take(*given, batch, samples)
        x = arguments.get("sample", args, kwargs)
        scheduler = self._pipe.scheduler
        check_scheduler(scheduler)  # it may be another one by now
        at = levels(scheduler, number(arguments.get("timestep", args, kwargs)))
        mask = attended(mass, (grid.height, grid.width), spec.threshold, (x.shape[2], x.shape[3]))
        prediction = scheduler.config.get("prediction_type", "epsilon")
        own = output[samples]
        again = degrade(x, own, mask, at, prediction, (spec.sigma, spec.kernel_size))
        args, kwargs = arguments.put(args, kwargs, sample=again)
        self.running = True
        try:
            degraded = denoiser(*args, **kwargs)[0]
        finally:
            self.running = False
        compute = torch.promote_types(own.dtype, torch.float32)
        return own.to(compute) - degraded.to(compute), torch.stack([norms(again - x), norms(x)])

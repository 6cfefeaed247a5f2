# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks that a perturbed forward pass skips, or before which it shuffles the image tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from segkern.integrations.specs import SLG, TPG
from segkern.integrations.specs.layer_names import LayerInfo

from .report import GuidanceReport


@dataclass(frozen=True)
class BlockChange:
    """The change that one guidance method makes to blocks in one evaluation of the model.

    Attributes:
        spec: The guidance spec.
        evaluation: Number of the evaluation in the run, from 0. Each evaluation has its own orders of tokens.
        report: Report that records each block's effect.
        computed: Names of the blocks that were changed.
    """

    spec: SLG | TPG
    evaluation: int
    report: GuidanceReport
    computed: set[str] = field(default_factory=set)

    @property
    def skips(self) -> bool:
        """True if blocks are skipped, False if tokens are shuffled."""
        return isinstance(self.spec, SLG)

    def shuffled(self, layer: LayerInfo, x: torch.Tensor, start: int, tokens: int) -> torch.Tensor:
        """Return ``[batch, tokens, channels]`` with ``tokens`` tokens from ``start`` on in another order."""
        assert isinstance(self.spec, TPG)
        order = self.spec.order(self.evaluation, layer.name, tokens).to(x.device)
        result = x.clone()
        result[:, start : start + tokens] = x[:, start + order]
        return result

# SPDX-License-Identifier: Apache-2.0
"""AdamW, and Muon for the weight matrices of attention and residual blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

BLOCKS = (".attentions.", ".resnets.")


class Optimisers:
    """AdamW for all parameters of a module, or AdamW and Muon if ``muon`` is given.

    Muon treats a convolution as a matrix with one row per output channel. The weights must have this order in memory
    (``torch.channels_last``).

    Args:
        module: Module to train.
        rate: Learning rate of AdamW.
        decay: Weight decay of both optimizers.
        muon: Learning rate of Muon, scaled so that its updates have the root mean square of AdamW's; None uses AdamW
            only.

    Raises:
        ValueError: If a convolution's weight is not ``torch.channels_last``.
    """

    def __init__(self, module: nn.Module, rate: float, decay: float, muon: float | None = None) -> None:
        self._module = module
        chosen = [p for name, p in module.named_parameters() if muon is not None and _by_muon(name, p)]
        others = [p for name, p in module.named_parameters() if muon is None or not _by_muon(name, p)]
        self._optimisers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, rate, betas=(0.9, 0.99), weight_decay=decay, fused=True)
        ]
        self._rates = [rate]
        self._pairs = [(p, nn.Parameter(_matrix(p.detach()))) for p in chosen]
        for p, matrix in self._pairs:
            if matrix.data_ptr() != p.data_ptr():
                raise ValueError(f"a weight {list(p.shape)} has strides {p.stride()}; Muon needs torch.channels_last")
        if muon is not None:
            matrices = [matrix for _, matrix in self._pairs]
            self._optimisers.append(
                torch.optim.Muon(matrices, muon, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
            self._rates.append(muon)

    def zero_grad(self) -> None:
        """Delete the gradients."""
        self._module.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of each optimizer."""
        return [optimiser.state_dict() for optimiser in self._optimisers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Restore the state that ``state_dict`` returned."""
        for optimiser, state in zip(self._optimisers, states, strict=True):
            optimiser.load_state_dict(state)

    def step(self, share: float) -> None:
        """Update the parameters with this share of the learning rates."""
        for p, matrix in self._pairs:
            matrix.grad = None if p.grad is None else _matrix(p.grad)
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.step()


def _by_muon(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim in (2, 4) and any(block in f".{name}" for block in BLOCKS)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

# SPDX-License-Identifier: Apache-2.0
"""AdamW, and Muon for the weight matrices of attention and residual blocks."""

from __future__ import annotations

import torch
from torch import nn

BLOCKS = (".attentions.", ".resnets.")


class Optimisers:
    """Steps all parameters of a module: AdamW, or both where ``muon`` is given.

    A convolution is a matrix to Muon, a row for each channel that comes out; the module's weights have to lie so in
    memory (``torch.channels_last``).

    Args:
        module: what is trained.
        rate: of AdamW.
        decay: of the weights, for both.
        muon: rate of Muon, in AdamW's measure (its updates have the same root mean square); None does without.
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
                raise ValueError(f"a weight {list(p.shape)} has strides {p.stride()}; Muon wants torch.channels_last")
        if muon is not None:
            matrices = [matrix for _, matrix in self._pairs]
            self._optimisers.append(
                torch.optim.Muon(matrices, muon, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            )
            self._rates.append(muon)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self._module.zero_grad(set_to_none=True)

    def step(self, share: float) -> None:
        """Step with this share of the rates."""
        for p, matrix in self._pairs:
            matrix.grad = None if p.grad is None else _matrix(p.grad)
        for optimiser, rate in zip(self._optimisers, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = rate * share
            optimiser.step()


def _by_muon(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim in (2, 4) and any(block in f".{name}" for block in BLOCKS)


def _matrix(weight: torch.Tensor) -> torch.Tensor:
    return weight if weight.ndim == 2 else weight.permute(0, 2, 3, 1).flatten(1)

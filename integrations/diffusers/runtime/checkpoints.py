# SPDX-License-Identifier: Apache-2.0
"""Detection of gradient checkpoints around a whole denoiser call, which backward would repeat outside its step."""

from __future__ import annotations

from typing import Any

import torch

from segkern.core.private_apis import checkpointing


class CheckpointCheck:
    """Checks that a denoiser call is not inside a gradient checkpoint that began after this object was created.

    Args:
        follows_no_grad: Whether to also refuse latents that require gradients if gradients have been disabled in the
            meantime. A reentrant checkpoint can be detected only in this way.
    """

    def __init__(self, follows_no_grad: bool) -> None:
        self._around = checkpointing()
        self._grad = follows_no_grad and torch.is_grad_enabled()

    def check(self, latents: Any, denoiser: str) -> None:
        """Check a call before it runs.

        Raises:
            RuntimeError: If the backward pass may repeat the call after its step.
        """
        hidden = self._grad and not torch.is_grad_enabled()
        given = [latents] if isinstance(latents, torch.Tensor) else latents  # a list has one tensor per sample
        if checkpointing() not in (None, self._around) or (hidden and any(x.requires_grad for x in given)):
            raise RuntimeError(
                f"guide does not support a call of this {denoiser} under torch.utils.checkpoint (or under "
                f"torch.no_grad with latents that require gradients), because backward would repeat it outside its "
                f"step. Checkpoint its parts with enable_gradient_checkpointing(), or checkpoint the whole run, or "
                "detach the latents"
            )

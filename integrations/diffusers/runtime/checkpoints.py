# SPDX-License-Identifier: Apache-2.0
"""Checkpoints around a whole call of a denoiser, which backward would run again outside of its step."""

from __future__ import annotations

from typing import Any

import torch

from segkern.core.private_apis import checkpointing


class CheckpointCheck:
    """A check that a whole call of a denoiser is in no checkpoint that began after what guides it did.

    Args:
        follows_no_grad: whether latents that require gradients are also refused where gradients were turned off since,
            which is all that shows of a reentrant checkpoint.
    """

    def __init__(self, follows_no_grad: bool) -> None:
        self._around = checkpointing()
        self._grad = follows_no_grad and torch.is_grad_enabled()

    def check(self, latents: Any, denoiser: str) -> None:
        """Before a call.

        Raises:
            RuntimeError: for one that backward may run again when its step is over.
        """
        hidden = self._grad and not torch.is_grad_enabled()
        given = [latents] if isinstance(latents, torch.Tensor) else latents  # a list has one for each sample
        if checkpointing() not in (None, self._around) or (hidden and any(x.requires_grad for x in given)):
            raise RuntimeError(
                f"guide cannot follow a call of this {denoiser} under torch.utils.checkpoint (or, with latents that "
                f"require gradients, torch.no_grad): backward would run it again outside of its step. Checkpoint its "
                f"parts, with its enable_gradient_checkpointing(), or the whole run; else detach the latents"
            )

# SPDX-License-Identifier: Apache-2.0
"""Checks of users' forward hooks on modules that run with branches: hooks that change tensors are refused.

A hook that changes a module's inputs or outputs may depend on a sample's position in the batch, and guidance appends
samples to the batch. Such changes can be detected only while the module runs, with hooks before and after the user's
hooks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.core.private_apis import forward_hooks, version_of
from segkern.integrations.diffusers.runtime.hooks import Hook
from segkern.integrations.diffusers.runtime.origins import Trust, is_known, is_trusted, module_of
from segkern.integrations.diffusers.runtime.per_sample import tensors_in


def foreign_hooks(module: nn.Module, trust: Trust) -> list[Any]:
    """Return the forward hooks and pre-hooks of a module that are neither from known packages nor trusted."""
    hooks = [hook for hook in forward_hooks(module) if not isinstance(hook, Hook)]
    return [hook for hook in hooks if not is_known(module_of(hook)) and not is_trusted(hook, trust)]


class HookWatch:
    """Hooks around the users' hooks on one module that check whether those leave their tensors unchanged.

    Args:
        module: The module.
        message: Message of the error if a hook changes a tensor.
    """

    def __init__(self, module: nn.Module, message: str) -> None:
        self._module = module
        self._message = message
        self._seen: list[tuple[torch.Tensor, int]] = []

    def register(self) -> Iterator[RemovableHandle]:
        """Register hooks before and after all existing hooks."""
        for check, first in ((False, True), (True, False)):
            hook = _Look(self, check)
            yield self._module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
            yield self._module.register_forward_hook(hook, prepend=first)

    def look(self, value: Any, check: bool) -> None:
        """Store tensors, or compare them with the stored ones.

        Raises:
            ValueError: If a tensor was replaced or modified in place.
        """
        seen, self._seen = self._seen, [(tensor, version_of(tensor)) for tensor in tensors_in(value)]
        if check:
            now, self._seen = self._seen, []
            if len(now) != len(seen) or any(a is not b or i != j for (a, i), (b, j) in zip(now, seen, strict=True)):
                raise ValueError(self._message)


class _Look(Hook):
    """One of these hooks. It gets arguments and keyword arguments, or arguments and the output."""

    def __init__(self, watch: HookWatch, check: bool) -> None:
        self._watch, self._check = watch, check

    def __call__(self, module: nn.Module, args: tuple[Any, ...], other: Any) -> None:
        if module is self._watch._module and not torch.compiler.is_compiling():
            self._watch.look(other if not isinstance(other, dict) else (args, other), self._check)

# SPDX-License-Identifier: Apache-2.0
"""Forward hooks of users on modules that run with branches: those that look on are allowed, others refused.

A hook that changes what a module gets or gives may do so by the place of a sample in the batch, to which guidance
appends samples. That it does shows while the module runs only, between hooks before and after those of users.
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
    """Forward hooks and pre-hooks of a module that are neither of known packages nor trusted."""
    hooks = [hook for hook in forward_hooks(module) if not isinstance(hook, Hook)]
    return [hook for hook in hooks if not is_known(module_of(hook)) and not is_trusted(hook, trust)]


class HookWatch:
    """Hooks around those of users on one module, which must leave the tensors that they are given as they are.

    Args:
        module: the module.
        message: of the error for one that does not.
    """

    def __init__(self, module: nn.Module, message: str) -> None:
        self._module = module
        self._message = message
        self._seen: list[tuple[torch.Tensor, int]] = []

    def register(self) -> Iterator[RemovableHandle]:
        """Put them around those that are there."""
        for check, first in ((False, True), (True, False)):
            hook = _Look(self, check)
            yield self._module.register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
            yield self._module.register_forward_hook(hook, prepend=first)

    def look(self, value: Any, check: bool) -> None:
        """Remember tensors, or compare them with those remembered.

        Raises:
            ValueError: for another tensor, or one that was written to.
        """
        seen, self._seen = self._seen, [(tensor, version_of(tensor)) for tensor in tensors_in(value)]
        if check:
            now, self._seen = self._seen, []
            if len(now) != len(seen) or any(a is not b or i != j for (a, i), (b, j) in zip(now, seen, strict=True)):
                raise ValueError(self._message)


class _Look(Hook):
    """One of the hooks: it gets arguments and keyword arguments, or arguments and the output."""

    def __init__(self, watch: HookWatch, check: bool) -> None:
        self._watch, self._check = watch, check

    def __call__(self, module: nn.Module, args: tuple[Any, ...], other: Any) -> None:
        if module is self._watch._module and not torch.compiler.is_compiling():
            self._watch.look(other if not isinstance(other, dict) else (args, other), self._check)

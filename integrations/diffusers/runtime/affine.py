# SPDX-License-Identifier: Apache-2.0
"""Detection of projections that are affine and process each token independently, as far as this can be known.

With such a projection, the projection of the mean token is the mean of the projected tokens. Projections with quantised
input, non-linear adapters or users' hooks are excluded. The check never runs a projection.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from segkern.core.private_apis import has_forward_hooks, linear_is_pytorchs

# Modules with functions that replace a forward to move or cast weights and outputs.
_WRAPPERS = frozenset({"accelerate.hooks", "diffusers.hooks.hooks"})
_MOVERS = frozenset({"accelerate.hooks", "diffusers.hooks.group_offloading", "diffusers.hooks.layerwise_casting"})


def is_plain_linear(module: nn.Module) -> bool:
    """Return True for a plain ``F.linear`` with its weight, so that rows of the weight can be used separately."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter  # not a quantised one
        and not has_forward_hooks(module)
        and linear_is_pytorchs()
    )


def is_affine(module: nn.Module) -> bool:
    """Return True if a module is known to map each token independently and affinely.

    Known modules are PyTorch's linear layer and PEFT's LoRA on it, also with offloading or another storage dtype.
    """
    if not _runs_its_own_forward(module):
        return False
    if type(module) is nn.Linear:
        return type(module.weight) is nn.Parameter and linear_is_pytorchs()
    return _is_lora(module) and _lora_is_affine(module)


def passes_on(module: nn.Module) -> bool:
    """Return True if a module is known to return its input, such as inactive dropout."""
    off = type(module) is nn.Identity or (type(module) is nn.Dropout and (not module.training or module.p == 0.0))
    return off and _runs_its_own_forward(module)


def _is_lora(module: nn.Module) -> bool:
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("peft.tuners.lora.layer", "Linear")


def _lora_is_affine(module: Any) -> bool:
    """Return True for LoRA on a linear layer with linear adapters."""
    if not is_affine(module.base_layer):
        return False
    if module.disable_adapters or module.merged:
        return True
    return all(
        name not in module.lora_variant  # variants such as DoRA
        and is_affine(module.lora_A[name])
        and is_affine(module.lora_B[name])
        and passes_on(module.lora_dropout[name])
        for name in module.active_adapters
        if name in module.lora_A
    )


def _runs_its_own_forward(module: nn.Module) -> bool:
    """Return True if a call of the module runs its class's forward, apart from moves and casts."""
    if has_forward_hooks(module):
        return False
    return "forward" not in vars(module) or _only_moves(module)


def _only_moves(module: Any) -> bool:
    """Return True if the module's forward is replaced only for offloading or casting by accelerate or diffusers."""
    forward = vars(module)["forward"]
    while isinstance(forward, functools.partial) and forward.func.__module__ in _WRAPPERS:
        forward = vars(forward).get("__wrapped__")
    if getattr(forward, "__func__", None) is not type(module).forward:
        return False
    hook = getattr(module, "_hf_hook", None)
    hooks = [*getattr(hook, "hooks", ()), hook] if hook is not None else []
    hooks += getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
    return all(type(hook).__module__ in _MOVERS for hook in hooks)

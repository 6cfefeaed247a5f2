# SPDX-License-Identifier: Apache-2.0
"""Names of the arguments of a module's forward, also for subclasses that pass arguments on."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn

from segkern.integrations.diffusers.runtime.origins import name_of


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional arguments of the class's forward (offloading replaces the instance's forward).

    If a forward has ``*args``, the names of its base class follow.
    """
    names: tuple[str, ...] = ()
    for positional, has_rest in _forwards(module):
        names += positional[len(names) :]
        if not has_rest:
            break
    return names


def check_signature(module: nn.Module, needed: Collection[str], at: str) -> None:
    """Raise a ValueError if a class's forward has other names for the arguments that guidance reads.

    Args:
        module: A denoiser or a block.
        needed: Names of the arguments that guidance reads, as in the base classes.
        at: Name of the module, for the message.
    """
    (own, has_rest), *bases = _forwards(module)
    for base, _ in bases:
        for place, name in enumerate(base):
            taken = place < len(own) and own[place] not in base
            if name in needed and name not in own and taken:
                raise ValueError(_WORDS.format(at=at, kind=_signature(module), own=own[place], name=name))
    if not bases and (has_rest or not set(own) & set(needed)):
        raise ValueError(_WORDS.format(at=at, kind=_signature(module), own=own[0] if own else "*args", name=_FIRST))


def _forwards(module: nn.Module) -> list[tuple[tuple[str, ...], bool]]:
    """Return, for each class with a forward, nearest first: argument names, and whether it has ``*args``."""
    module = getattr(module, "_orig_mod", module)
    found = []
    for kind in type(module).__mro__:
        if "forward" not in vars(kind) or kind is nn.Module:
            continue
        parameters = list(inspect.signature(vars(kind)["forward"]).parameters.values())[1:]
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = tuple(p.name for p in parameters if p.kind in positional)
        found.append((names, any(p.kind is p.VAR_POSITIONAL for p in parameters)))
    return found or [((), True)]


def _signature(module: nn.Module) -> str:
    kind = type(module)
    return f"{name_of(kind)}.forward{inspect.signature(kind.forward)}"


_FIRST = "hidden_states"  # name in most blocks

_WORDS = (
    "guide reads arguments of {at} by name, but {kind} has {own!r} in the place of {name!r}; use the argument names of "
    "diffusers, or accept *args and **kwargs and pass them to the forward of a diffusers base class"
)

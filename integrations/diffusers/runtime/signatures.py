# SPDX-License-Identifier: Apache-2.0
"""Names of the arguments of a module's forward, also of a subclass that passes on whatever it is given."""

from __future__ import annotations

import inspect
from collections.abc import Collection

from torch import nn

from segkern.integrations.diffusers.runtime.origins import name_of


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional arguments of the forward of a module's class (offloading replaces the instance's).

    A forward that takes ``*args`` has the names of its base class's in their places.
    """
    names: tuple[str, ...] = ()
    for positional, has_rest in _forwards(module):
        names += positional[len(names) :]
        if not has_rest:
            break
    return names


def check_signature(module: nn.Module, needed: Collection[str], at: str) -> None:
    """Raise a ValueError for a class whose forward has other names for the arguments that guidance reads.

    Args:
        module: a denoiser or a block.
        needed: names of those arguments, as far as the base classes take them.
        at: the module's name, for the message.
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
    """Of each class of a module that has a forward, nearest first: names, and whether it takes further ones."""
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


_FIRST = "hidden_states"  # of most blocks

_WORDS = (
    "guide reads arguments of {at} by their names, and {kind} has {own!r} in the place of {name!r}: give it diffusers' "
    "names for them, or let it take *args and **kwargs and pass them on to the forward of a base class from diffusers"
)

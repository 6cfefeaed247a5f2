# SPDX-License-Identifier: Apache-2.0
"""The package that a callable comes from, and the user's trust in code of other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

# What a user may trust: classes of processors or blocks, or functions.
Trust = Sequence[Callable[..., Any]]

# Packages whose code processes each sample independently, apart from exceptions that are checked elsewhere.
_KNOWN = frozenset({"diffusers", "torch", "segkern", "peft", "accelerate"})


def check_trust(trust: Any) -> tuple[Callable[..., Any], ...]:
    """Return the trusted classes and functions as a tuple.

    Raises:
        ValueError: If ``trust`` contains anything else.
    """
    if not isinstance(trust, (list, tuple, set, frozenset)) or not all(map(callable, trust)):
        raise ValueError(f"trust must be a list of classes or functions, such as trust=[TheirProcessor], got {trust!r}")
    return tuple(trust)


def is_trusted(call: Any, trust: Trust) -> bool:
    """Return True if the user trusts an object, its class or its function."""
    function = function_of(call)
    code = getattr(function, "__code__", None)
    for trusted in trust:
        if isinstance(trusted, type):
            if isinstance(call, trusted) or isinstance(getattr(call, "__self__", None), trusted):
                return True
        elif call is trusted or (code is not None and code is getattr(function_of(trusted), "__code__", None)):
            return True
    return False


def function_of(call: Any) -> Any:
    """Return the Python function that a call runs, for a partial, a method or an instance with ``__call__``."""
    while True:
        if isinstance(call, functools.partial):
            call = call.func
        elif hasattr(call, "__func__"):
            call = call.__func__
        elif hasattr(call, "__code__") or isinstance(call, type):
            return call
        elif callable(call):
            return type(call).__call__
        else:
            return call


def module_of(call: Any) -> str:
    """Return the module whose code a call runs. A decorator may hide it from ``__module__``."""
    function = function_of(call)
    namespace = getattr(function, "__globals__", None)
    name = namespace.get("__name__") if namespace is not None else getattr(function, "__module__", None)
    return name if isinstance(name, str) else ""


def is_known(module: str) -> bool:
    """Return True if a module belongs to a known package."""
    return module.partition(".")[0] in _KNOWN


def name_of(call: Any) -> str:
    """Return the module and qualified name of a class or of the function that runs, ignoring decorators."""
    function = call if isinstance(call, type) else function_of(call)
    if isinstance(function, type):
        return f"{function.__module__}.{function.__qualname__}"
    code = getattr(function, "__code__", None)
    name = getattr(function, "__qualname__", repr(function))
    return f"{module_of(function)}.{getattr(code, 'co_qualname', getattr(code, 'co_name', name))}"


def foreign_link(forward: Any) -> Any:
    """Return the first function of another package in a chain of wrappers of a forward; None if all are known."""
    seen = 0
    while forward is not None and seen < 100:
        if not is_known(module_of(forward)):
            return forward
        forward = getattr(forward, "__wrapped__", None)
        seen += 1
    return None


def foreign_part(kind: type) -> Any:
    """Return a class or function of another package that instances of a class run; None if there is none.

    It is either a class that overrides a method of a known class, or a function that replaces a known class's forward.
    A subclass that only adds attributes or methods runs the code of its base class.
    """
    for base in kind.__mro__:
        if is_known(base.__module__):
            break
        rest = kind.__mro__[kind.__mro__.index(base) + 1 :]
        known = [other for other in rest if is_known(other.__module__)]
        if not known or any(_overrides(name, value, known) for name, value in vars(base).items()):
            return base
    for name in ("forward", "__call__"):
        foreign = foreign_link(getattr(kind, name, None))
        if foreign is not None:
            return foreign
    return None


def _overrides(name: str, value: Any, bases: Sequence[type]) -> bool:
    """Return True for a method or property, except ``__init__`` and ``__repr__``, that one of the classes also has."""
    code = callable(value) or isinstance(value, (property, staticmethod, classmethod))
    return code and name not in ("__init__", "__repr__") and any(name in vars(base) for base in bases)

# SPDX-License-Identifier: Apache-2.0
"""Note the name of diffusers' ``cache_context`` around a call of the denoiser: ``"cond"`` or ``"uncond"``.

Pipelines that call their denoiser once for each text enter it for caches, which tells the calls apart.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

_METHOD = "cache_context"
_NAME: ContextVar[str | None] = ContextVar("segkern_cache_context", default=None)


class _NotingContext:
    """Stands before a model's own ``cache_context`` while guidances act on it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.guidances = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the model has its class's method."""
        return functools.partial, (getattr(type(self._model), _METHOD), self._model)

    @contextmanager
    def __call__(self, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        token = _NAME.set(name)
        try:
            with getattr(type(self._model), _METHOD)(self._model, name, *args, **kwargs):
                yield
        finally:
            _NAME.reset(token)


def note_contexts(model: nn.Module) -> None:
    """Begin to note the contexts of a model, if it has them."""
    noting = vars(model).get(_METHOD)
    if isinstance(noting, _NotingContext):
        noting.guidances += 1
    elif noting is None and hasattr(type(model), _METHOD):
        setattr(model, _METHOD, _NotingContext(model))


def forget_contexts(model: nn.Module) -> None:
    """End it, when the last guidance does."""
    noting = vars(model).get(_METHOD)
    if isinstance(noting, _NotingContext):
        noting.guidances -= 1
        if noting.guidances == 0:
            delattr(model, _METHOD)


def cache_context() -> str | None:
    """The name of the context that is entered here; None outside of one."""
    return _NAME.get()

# SPDX-License-Identifier: Apache-2.0
"""Record the name of diffusers' ``cache_context`` around a denoiser call: ``"cond"`` or ``"uncond"``.

Pipelines that call their denoiser once for each text enter this context for caches. The name distinguishes the calls.
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
    """Replaces a model's ``cache_context`` while guidance is active on the model."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.guidances = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Restore the class's method in a copy of the model."""
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
    """Start to record the contexts of a model, if it has any."""
    noting = vars(model).get(_METHOD)
    if isinstance(noting, _NotingContext):
        noting.guidances += 1
    elif noting is None and hasattr(type(model), _METHOD):
        setattr(model, _METHOD, _NotingContext(model))


def forget_contexts(model: nn.Module) -> None:
    """Stop recording when the last guidance is removed."""
    noting = vars(model).get(_METHOD)
    if isinstance(noting, _NotingContext):
        noting.guidances -= 1
        if noting.guidances == 0:
            delattr(model, _METHOD)


def cache_context() -> str | None:
    """Return the name of the current context; None outside one."""
    return _NAME.get()

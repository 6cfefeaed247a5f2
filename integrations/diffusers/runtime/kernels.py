# SPDX-License-Identifier: Apache-2.0
"""Attention kernels that users chose for a layer; guidance uses PyTorch's attention in their place."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import SlicedAttnProcessor, XFormersAttnProcessor, XFormersJointAttnProcessor

_OWN_KERNELS = (SlicedAttnProcessor, XFormersAttnProcessor, XFormersJointAttnProcessor)
_CHOICE = "_attention_backend"  # attribute of a processor; None means the active backend
_NOTHING = object()


def chosen_kernel(processor: Any) -> str | None:
    """Return the kernel that a user chose for a processor's attention; None for PyTorch's attention."""
    if isinstance(processor, _OWN_KERNELS):
        return f"{type(processor).__name__}'s"
    backend = _backend(processor)
    return None if backend is None or backend == AttentionBackendName.NATIVE else f"the backend {backend!r}"


class NativeAttention:
    """Switches processors with another diffusers attention backend to PyTorch's, until they are restored."""

    def __init__(self) -> None:
        self._chosen: list[tuple[Any, Any]] = []  # processors and their original settings

    def take(self, processor: Any) -> None:
        """Make a processor use PyTorch's attention. Does nothing if it already does."""
        if _backend(processor) in (None, AttentionBackendName.NATIVE.value):
            return
        self._chosen.append((processor, vars(processor).get(_CHOICE, _NOTHING)))
        setattr(processor, _CHOICE, AttentionBackendName.NATIVE)

    def put_back(self) -> None:
        """Restore the settings of all processors."""
        while self._chosen:
            processor, backend = self._chosen.pop()
            if backend is _NOTHING:
                delattr(processor, _CHOICE)
            else:
                setattr(processor, _CHOICE, backend)


def _backend(processor: Any) -> str | None:
    """Return the attention backend of a processor; None for a processor that does not use diffusers' backends."""
    if not hasattr(processor, _CHOICE):
        return None
    backend = getattr(processor, _CHOICE)
    if backend is None:
        registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
        backend = AttentionBackendName.NATIVE if registry is None else registry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))

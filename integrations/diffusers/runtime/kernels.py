# SPDX-License-Identifier: Apache-2.0
"""Attention kernels that were chosen for a layer, and PyTorch's in their place while guidance acts there."""

from __future__ import annotations

from typing import Any

from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import SlicedAttnProcessor, XFormersAttnProcessor, XFormersJointAttnProcessor

_OWN_KERNELS = (SlicedAttnProcessor, XFormersAttnProcessor, XFormersJointAttnProcessor)
_CHOICE = "_attention_backend"  # a processor's attribute; where it is None, the active backend is taken
_NOTHING = object()


def chosen_kernel(processor: Any) -> str | None:
    """The kernel that was chosen for a processor's attention; None where it is PyTorch's choice."""
    if isinstance(processor, _OWN_KERNELS):
        return f"{type(processor).__name__}'s"
    backend = _backend(processor)
    return None if backend is None or backend == AttentionBackendName.NATIVE else f"the backend {backend!r}"


class NativeAttention:
    """PyTorch's attention in processors for which another backend of diffusers was chosen, until it is put back."""

    def __init__(self) -> None:
        self._chosen: list[tuple[Any, Any]] = []  # processors, and what they had

    def take(self, processor: Any) -> None:
        """Let a processor call PyTorch's attention; one that does so already stays as it is."""
        if _backend(processor) in (None, AttentionBackendName.NATIVE.value):
            return
        self._chosen.append((processor, vars(processor).get(_CHOICE, _NOTHING)))
        setattr(processor, _CHOICE, AttentionBackendName.NATIVE)

    def put_back(self) -> None:
        """Give every processor what it had."""
        while self._chosen:
            processor, backend = self._chosen.pop()
            if backend is _NOTHING:
                delattr(processor, _CHOICE)
            else:
                setattr(processor, _CHOICE, backend)


def _backend(processor: Any) -> str | None:
    """The name of the backend on which a processor's attention runs; None for one that does not ask diffusers'."""
    if not hasattr(processor, _CHOICE):
        return None
    backend = getattr(processor, _CHOICE)
    if backend is None:
        registry = getattr(attention_dispatch, "_AttentionBackendRegistry", None)
        backend = AttentionBackendName.NATIVE if registry is None else registry.get_active_backend()[0]
    return str(getattr(backend, "value", backend))

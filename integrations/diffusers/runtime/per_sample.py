# SPDX-License-Identifier: Apache-2.0
"""Tensors with one entry per sample that are not in a denoiser's batch, but on its modules or in dictionaries.

Tensors on a module and tensors that attention processors get by name do not grow with the batch. segkern adapts the
tensors of diffusers to the batch. Other tensors cannot be distinguished from tensors that do not belong to samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from torch import nn

from segkern.integrations.diffusers.runtime.branches import Batch, DenoiserArguments

_EMBEDDINGS = "clip_embeds"  # face embeddings, which users set on IP-Adapter FaceID Plus

# Arguments of denoisers that are passed on to attention processors.
_DICTIONARIES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

# Entries that guidance supports, or that are shared by all samples.
_KNOWN_ENTRIES = frozenset(
    {"scale", "attention_mask", "ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks"}
)

_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})


class KeptEmbeddings:
    """The embeddings that IP-Adapter FaceID Plus stores on its projection, one for each sample of the pipeline's batch.

    Args:
        model: The denoiser.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replaced: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # with the original and the new tensor

    def grow(self, batch: Batch, count: int) -> None:
        """Append the embeddings of ``count`` branches."""
        self._replace((lambda x: batch.grow(x, count)) if count else None)

    def take(self, batch: Batch, samples: slice) -> None:
        """Keep the embeddings of some samples of the pipeline's own batch."""
        self._replace(lambda x: batch.take(x, samples))

    def restore(self) -> None:
        """Restore the original tensors, unless they have been replaced since."""
        while self._replaced:
            module, own, ours = self._replaced.pop()
            if getattr(module, _EMBEDDINGS, None) is ours:
                setattr(module, _EMBEDDINGS, own)

    def _replace(self, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        self.restore()
        projection = getattr(self._model, "encoder_hid_proj", None)
        if change is None or projection is None:
            return
        for module in projection.modules():
            own = getattr(module, _EMBEDDINGS, None)
            if isinstance(module, IPAdapterFaceIDPlusImageProjection) and isinstance(own, torch.Tensor):
                ours = change(own)
                if ours is not own:
                    self._replaced.append((module, own, ours))
                    setattr(module, _EMBEDDINGS, ours)


def check_attention_arguments(
    arguments: DenoiserArguments, args: tuple[Any, ...], kwargs: dict[str, Any], model: nn.Module
) -> None:
    """Raise a ValueError if an argument for attention processors has a tensor that may belong to samples."""
    for name in _DICTIONARIES:
        given = arguments.get(name, args, kwargs)
        for key, value in given.items() if isinstance(given, dict) else ():
            if key in _KNOWN_ENTRIES or not any(tensor.ndim for tensor in tensors_in(value)):
                continue
            why = (
                "GLIGEN's boxes belong to samples of the pipeline's own batch"
                if key == "gligen"
                else "its tensor may belong to samples, and guidance appends samples to the batch"
            )
            raise ValueError(
                f"guide does not support {name}[{key!r}] of this {type(model).__name__}: {why}. Remove it. Values that "
                f"are the same for all samples can be stored on the processor, whose class guide(..., trust=[...]) "
                "lists"
            )


def samples_on(module: nn.Module, sizes: frozenset[int]) -> str | None:
    """Return the name of a module's attribute with a tensor that, by its size, has one entry per sample; or None."""
    kind = type(module)
    if kind.__module__.startswith("torch.") or issubclass(kind, IPAdapterFaceIDPlusImageProjection):
        return None  # PyTorch's own modules do not read other attributes
    for name, value in vars(module).items():
        if type(value) in _PLAIN or name in _OF_ANY_MODULE or not isinstance(value, (torch.Tensor, list, tuple, dict)):
            continue
        if any(tensor.ndim and tensor.shape[0] in sizes for tensor in tensors_in(value)):
            return name
    return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield all tensors in a value and in its lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)

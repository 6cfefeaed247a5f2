# SPDX-License-Identifier: Apache-2.0
"""Tensors with an entry for each sample that reach a denoiser beside its batch: on its modules, and in dictionaries.

A module's tensors stay what they were while the batch grows, and so do those that attention processors get by name.
diffusers' own are brought to the batch; others cannot be told from tensors that belong to no sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterFaceIDPlusImageProjection
from torch import nn

from segkern.integrations.diffusers.runtime.branches import Batch, DenoiserArguments

_EMBEDDINGS = "clip_embeds"  # of pictures of faces, which users set on IP-Adapter FaceID Plus

# Arguments of denoisers that are passed on to attention processors.
_DICTIONARIES = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")

# Their entries that guidance follows, or that serve all samples alike.
_KNOWN_ENTRIES = frozenset(
    {"scale", "attention_mask", "ip_adapter_image_embeds", "ip_hidden_states", "ip_adapter_masks"}
)

_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_PLAIN = frozenset({bool, int, float, str, type(None)})


class KeptEmbeddings:
    """The embeddings that IP-Adapter FaceID Plus keeps on its projection, one for each sample of the pipeline's batch.

    Args:
        model: the denoiser.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._replaced: list[tuple[nn.Module, torch.Tensor, torch.Tensor]] = []  # with its own tensor and ours

    def grow(self, batch: Batch, count: int) -> None:
        """Append those of so many branches."""
        self._replace((lambda x: batch.grow(x, count)) if count else None)

    def take(self, batch: Batch, samples: slice) -> None:
        """Leave those of some samples of the pipeline's own batch."""
        self._replace(lambda x: batch.take(x, samples))

    def restore(self) -> None:
        """Put back the very tensors that were there, unless someone has set others since."""
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
    """Raise a ValueError for a tensor in a denoiser's arguments for attention processors that may hold samples."""
    for name in _DICTIONARIES:
        given = arguments.get(name, args, kwargs)
        for key, value in given.items() if isinstance(given, dict) else ():
            if key in _KNOWN_ENTRIES or not any(tensor.ndim for tensor in tensors_in(value)):
                continue
            why = (
                "GLIGEN's boxes belong to samples of the pipeline's own batch"
                if key == "gligen"
                else "it cannot know whether the tensor in it belongs to samples, to which guidance appends others"
            )
            raise ValueError(
                f"guide cannot follow {name}[{key!r}] of this {type(model).__name__}: {why}. Leave it out; what is the "
                f"same for all samples can be kept on the processor, whose class guide(..., trust=[...]) then names"
            )


def samples_on(module: nn.Module, sizes: frozenset[int]) -> str | None:
    """The attribute of a module that holds a tensor with an entry for each sample, as far as its size tells."""
    kind = type(module)
    if kind.__module__.startswith("torch.") or issubclass(kind, IPAdapterFaceIDPlusImageProjection):
        return None  # PyTorch's own modules read no further attributes
    for name, value in vars(module).items():
        if type(value) in _PLAIN or name in _OF_ANY_MODULE or not isinstance(value, (torch.Tensor, list, tuple, dict)):
            continue
        if any(tensor.ndim and tensor.shape[0] in sizes for tensor in tensors_in(value)):
            return name
    return None


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All in a value, its lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)

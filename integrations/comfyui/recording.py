# SPDX-License-Identifier: Apache-2.0
"""Activations of the conditional prediction, kept from the model's own forward pass for the perturbed pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_CONDITIONAL = 0  # ComfyUI's index of the positive conditioning in ``cond_or_uncond``


@dataclass
class Recording:
    """Activations of one evaluation of the model, by place in the model and by conditioning.

    ComfyUI batches conditionings as memory allows, and splits them again. Each conditioning has a ``uuid``, and
    ``transformer_options`` lists the uuids in batch order.

    Attributes:
        x: The noisy latents of the evaluation. The recording is valid only for them.
        whole: False if a conditioning was evaluated in several pieces (tiles, windows), which share its ``uuid``.
    """

    x: torch.Tensor
    whole: bool = True
    _kept: dict[Hashable, dict[Hashable, torch.Tensor]] = field(default_factory=dict)

    def keep(
        self, place: Hashable, transformer_options: Mapping[str, Any], activation: torch.Tensor, values: bool = True
    ) -> None:
        """Copy the rows of positive conditionings, because layers and other nodes change activations in place.

        Without ``values``, zeros that take no memory are recorded.
        """
        uuids, kinds = transformer_options["uuids"], transformer_options["cond_or_uncond"]
        if activation.shape[0] != len(uuids) * self.x.shape[0]:
            self.whole = False
            return
        for uuid, kind, rows in zip(uuids, kinds, activation.chunk(len(uuids)), strict=True):
            if kind == _CONDITIONAL:
                kept = self._kept.setdefault(place, {})
                self.whole = self.whole and uuid not in kept
                kept[uuid] = rows.clone() if values else rows.new_zeros(()).expand(rows.shape)

    def has(self, places: Iterable[Hashable], transformer_options: Mapping[str, Any], batch: int) -> bool:
        """Return True if all places were recorded for every conditioning of a batch."""
        counts = (sum(rows.shape[0] for rows in self._rows(place, transformer_options)) for place in places)
        return self.whole and all(count == batch for count in counts)

    def take(self, place: Hashable, transformer_options: Mapping[str, Any]) -> torch.Tensor:
        """Return recorded rows in batch order, as a new tensor that may be changed in place."""
        return torch.cat(self._rows(place, transformer_options))

    def _rows(self, place: Hashable, transformer_options: Mapping[str, Any]) -> list[torch.Tensor]:
        kept = self._kept.get(place, {})
        return [kept[uuid] for uuid in transformer_options["uuids"] if uuid in kept]

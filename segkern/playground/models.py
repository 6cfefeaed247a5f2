# SPDX-License-Identifier: Apache-2.0
"""The models of the playground: each is loaded once, the latest are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from segkern.generation import loading
from segkern.generation.loading import Source

KEPT = 2  # so that going back to the model before loads nothing


@dataclass(frozen=True)
class Named:
    """A model as a user named it.

    Attributes:
        model: ``demo``, a folder, a hub name or a single file.
        config: what describes a single file; nothing for others.
    """

    model: str
    config: str = ""


@dataclass(frozen=True)
class Described:
    """What is known of a model without its weights.

    Attributes:
        source: where it is.
        pipe: the pipeline without weights.
    """

    source: Source
    pipe: Any


class Models:
    """Pipelines on one device, shared by all pages.

    Attributes:
        device: that draws.
        dtype: of the weights.
        lock: held by whoever loads or draws: one pipeline runs at a time.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.lock = threading.RLock()
        self._described: dict[Named, Described] = {}
        self._pipes: OrderedDict[Named, Any] = OrderedDict()  # the one used last comes last

    def describe(self, named: Named) -> Described:
        """Find a model and read its configuration.

        Raises:
            ValueError: for what is no model; the message quotes it.
            OSError: when files are missing or cannot be fetched.
        """
        found = self._described.get(named)
        if found is None:
            source = loading.find_model(named.model, named.config or None)
            found = self._described[named] = Described(source, loading.describe_unet_pipeline(source))
        return found

    def load(self, named: Named) -> Any:
        """The pipeline of a model, from its files only if it is not there.

        Raises:
            ValueError: for what is no model or cannot be loaded; the message quotes it.
            OSError: when files are missing or cannot be fetched.
        """
        with self.lock:
            if named not in self._pipes:
                source = self.describe(named).source
                while len(self._pipes) >= KEPT:
                    self._pipes.popitem(last=False)
                try:
                    self._pipes[named] = loading.load_pipeline(source, self.dtype, self.device)
                except Exception as error:  # whatever diffusers meets in a damaged file
                    del self._described[named]  # which may be mended
                    raise ValueError(f"{named.model!r} cannot be loaded: {error}") from error
            self._pipes.move_to_end(named)
            return self._pipes[named]

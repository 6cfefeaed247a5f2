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

MOST_LOADED = 2  # so that going back to the model before loads nothing


@dataclass(frozen=True)
class ModelName:
    """A model as a user names it.

    Attributes:
        model: ``demo``, a folder, a hub name or a single file.
        config: the configuration of a single file; empty for others.
    """

    model: str
    config: str = ""


@dataclass(frozen=True)
class ModelDescription:
    """A model without its weights.

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
        self._descriptions: dict[ModelName, ModelDescription] = {}
        self._pipes: OrderedDict[ModelName, Any] = OrderedDict()  # the one used last comes last

    def describe(self, name: ModelName) -> ModelDescription:
        """Find a model and read its configuration.

        Raises:
            ValueError: for a name that is no model; the message quotes it.
            OSError: when files are missing or cannot be fetched.
        """
        if name not in self._descriptions:
            source = loading.find_model(name.model, name.config or None)
            self._descriptions[name] = ModelDescription(source, loading.describe_unet_pipeline(source))
        return self._descriptions[name]

    def load(self, name: ModelName) -> Any:
        """The pipeline of a model, from its files only if it is not there.

        Raises:
            ValueError: for a name that is no model or cannot be loaded; the message quotes it.
            OSError: when files are missing or cannot be fetched.
        """
        with self.lock:
            if name not in self._pipes:
                source = self.describe(name).source
                while len(self._pipes) >= MOST_LOADED:
                    self._pipes.popitem(last=False)
                try:
                    self._pipes[name] = loading.load_pipeline(source, self.dtype, self.device)
                except Exception as error:  # whatever diffusers meets in a damaged file
                    del self._descriptions[name]  # which may be mended
                    raise ValueError(f"{name.model!r} cannot be loaded: {error}") from error
            self._pipes.move_to_end(name)
            return self._pipes[name]

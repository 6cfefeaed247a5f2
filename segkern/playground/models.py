# SPDX-License-Identifier: Apache-2.0
"""The models of the playground: each is loaded once, the latest are kept."""

from __future__ import annotations

import threading
from typing import Any

import torch

from segkern.generation import loading
from segkern.generation.loading import Source

MOST_LOADED = 2  # so that going back to the model before loads nothing


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
        self._descriptions: dict[Source, Any] = {}
        self._pipes: dict[Source, Any] = {}  # the one used last comes last

    def describe(self, source: Source) -> Any:
        """The pipeline of a model without its weights.

        Raises:
            ValueError: for a model that this page cannot draw with.
            OSError: when files are missing or cannot be fetched.
        """
        if source not in self._descriptions:
            self._descriptions[source] = loading.describe_unet_pipeline(source)
        return self._descriptions[source]

    def load(self, source: Source) -> Any:
        """The pipeline of a model, from its files only if it is not there.

        Raises:
            ValueError: for a model that cannot be loaded; the message names it.
        """
        with self.lock:
            pipe = self._pipes.pop(source, None)
            if pipe is None:
                while len(self._pipes) >= MOST_LOADED:
                    del self._pipes[next(iter(self._pipes))]
                try:
                    pipe = loading.load_pipeline(source, self.dtype, self.device)
                except Exception as error:  # whatever diffusers meets in a damaged file
                    self._descriptions.pop(source, None)  # the file may be mended
                    raise ValueError(f"{source.name!r} cannot be loaded: {error}") from error
            self._pipes[source] = pipe
            return pipe

# SPDX-License-Identifier: Apache-2.0
"""Models of the playground: each model is loaded once, and the most recent models stay loaded."""

from __future__ import annotations

import threading
from typing import Any

import torch

from segkern.generation import loading
from segkern.generation.loading import Source

MOST_LOADED = 2  # returning to the previous model then loads nothing


class Models:
    """Pipelines on one device, shared by all pages.

    Attributes:
        device: Device that the pipelines run on.
        dtype: Data type of the weights.
        lock: Lock to hold while loading or generating: one pipeline runs at a time.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.lock = threading.RLock()
        self._descriptions: dict[Source, Any] = {}
        self._pipes: dict[Source, Any] = {}  # the most recently used is last

    def describe(self, source: Source) -> Any:
        """Return the pipeline of a model without its weights.

        Raises:
            ValueError: If the playground cannot generate images with the model.
            OSError: If files are missing or cannot be downloaded.
        """
        if source not in self._descriptions:
            self._descriptions[source] = loading.describe_image_pipeline(source)
        return self._descriptions[source]

    def load(self, source: Source) -> Any:
        """Return the pipeline of a model, loading its files if necessary.

        Raises:
            ValueError: If the model cannot be loaded; the message names it.
        """
        with self.lock:
            pipe = self._pipes.pop(source, None)
            if pipe is None:
                while len(self._pipes) >= MOST_LOADED:
                    del self._pipes[next(iter(self._pipes))]
                try:
                    pipe = loading.load_pipeline(source, self.dtype, self.device)
                except Exception as error:  # a damaged file can raise anything in diffusers
                    self._descriptions.pop(source, None)  # the file may be repaired
                    raise ValueError(f"{source.name!r} cannot be loaded: {error}") from error
            self._pipes[source] = pipe
            return pipe

# SPDX-License-Identifier: Apache-2.0
"""The output of a denoiser: a tuple, a list or a diffusers output class, with the prediction first."""

from __future__ import annotations

import copy
from collections.abc import Sized
from typing import Any

from diffusers.utils import BaseOutput

from segkern.integrations.diffusers.runtime.branches import Batch

_PREDICTION = "sample"  # the usual name


def prediction_of(output: Any) -> Any:
    """Return the prediction in a denoiser's output, a tensor or a list of tensors.

    Raises:
        RuntimeError: If the output has another type.
    """
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    if isinstance(output, BaseOutput) and output:
        return output[_first(output)]
    raise RuntimeError(
        f"guide needs the denoiser's output as a tuple, a list or a diffusers output class, but the denoiser returned "
        f"a {type(output).__name__}"
    )


def with_prediction(output: Any, prediction: Any, batch: Batch | None = None) -> Any:
    """Return the output with another prediction, in the same type and with all other fields.

    Args:
        output: The denoiser's output.
        prediction: The prediction for the pipeline's own batch.
        batch: The pipeline's own batch, if the denoiser ran with branches: tensors with one entry per sample in other
            fields are cut to it. None leaves other fields unchanged.
    """

    def own(value: Any) -> Any:
        return value if batch is None else batch.fit(value, 0)

    if isinstance(output, (tuple, list)):
        values = (prediction, *map(own, output[1:]))
        make: Any = getattr(type(output), "_make", type(output))  # for a named tuple
        return make(values)
    changed, name = copy.copy(output), _first(output)
    for key, value in output.items():
        changed[key] = prediction if key == name else own(value)
    return changed


def check_size(output: Any, size: int, denoiser: str) -> None:
    """Raise a RuntimeError if the output has another batch size than the pipeline's input."""
    prediction = prediction_of(output)
    if isinstance(prediction, Sized) and len(prediction) != size:
        raise RuntimeError(
            f"{denoiser} returned {len(prediction)} predictions for a batch of {size} under guide, which belong to "
            f"another call; a cache, or a module whose forward was replaced, can cause this"
        )


def _first(output: Any) -> str:
    return _PREDICTION if _PREDICTION in output else next(iter(output))

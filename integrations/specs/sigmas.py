# SPDX-License-Identifier: Apache-2.0
"""The forms a sigma can have: one number, or one per sample, head or layer. This module does not import diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TypeGuard

from segkern.integrations.specs.layer_names import layer_name
from segkern.integrations.specs.schedules import is_number


class Perturbation(Enum):
    """Attention that is perturbed without a blur; used in place of a sigma."""

    IDENTITY = "every token attends to itself alone"


Sigma = float | tuple[float, ...]  # for one sample: one number, or one per head
Sigmas = float | tuple[Sigma, ...]  # for one layer: one number, or one entry per sample
Perturbed = Sigma | Perturbation  # a sample's attention; 0 leaves the layer unchanged

GivenSigmas = float | Sequence[float | Sequence[float]]


class LayerSigmas(Mapping[str, Sigmas]):
    """An immutable mapping from layer names to sigmas."""

    def __init__(self, sigmas: Mapping[str, Sigmas]) -> None:
        self._sigmas = dict(sigmas)

    def __getitem__(self, name: str) -> Sigmas:
        return self._sigmas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sigmas)

    def __len__(self) -> int:
        return len(self._sigmas)

    def __hash__(self) -> int:
        return hash(frozenset(self._sigmas.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._sigmas == dict(other)

    def __repr__(self) -> str:
        return repr(self._sigmas)


def checked_sigma(owner: str, given: object) -> Sigmas | LayerSigmas:
    """Check a sigma and normalise it: numbers become floats, sequences become tuples. Layer names are not checked.

    Raises:
        ValueError: If it is not a valid sigma. The message quotes it.
    """
    if isinstance(given, Mapping):
        named = {layer_name(name): _of_layer(owner, value) for name, value in given.items()}
        if not given or None in named or len(named) != len(given):
            raise ValueError(
                f"{owner}.sigma must map layer names such as 'mid' or 'd4', or block numbers, to sigmas, got {given!r}"
            )
        return LayerSigmas({name: value for name, value in named.items() if name is not None})
    return _of_layer(owner, given)


def _of_layer(owner: str, given: object) -> Sigmas:
    if _is_sigma(given):
        return float(given)
    entries = _items(given)
    if entries is None or not entries:
        raise _refusal(owner, given)
    return tuple(_of_sample(owner, given, entry) for entry in entries)


def _of_sample(owner: str, given: object, entry: object) -> Sigma:
    if _is_sigma(entry):
        return float(entry)
    heads = _items(entry)
    sigmas = tuple(float(head) for head in heads or () if _is_sigma(head))
    if not heads or len(sigmas) != len(heads):
        raise _refusal(owner, given)
    return sigmas


def _is_sigma(value: object) -> TypeGuard[float]:
    return is_number(value) and value >= 0.0  # false for NaN as well


def _items(given: object) -> list[object] | None:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, (str, bytes)) else None


def _refusal(owner: str, given: object) -> ValueError:
    return ValueError(
        f"{owner}.sigma must be 0 (no blur), positive, or math.inf (mean query), given as one number, a sequence of "
        f"one per sample, a sequence with a list of one per head for each sample ([[...]] for all samples), or a "
        f"mapping from layer names to any of these, got {given!r}"
    )


def check_heads(owner: str, sigmas: Sigmas, layer: str, heads: int) -> None:
    """Raise a ValueError if the number of sigmas per head differs from the layer's number of heads."""
    for entry in sigmas if isinstance(sigmas, tuple) else ():
        if isinstance(entry, tuple) and len(entry) != heads:
            raise ValueError(
                f"{owner}.sigma has {len(entry)} numbers per head for layer {layer}, which has {heads} heads"
            )


def per_sample(owner: str, sigmas: Sigmas, samples: int) -> tuple[Sigma, ...]:
    """Return one entry for each sample of a branch; a single entry is repeated.

    Raises:
        ValueError: If the number of entries is neither 1 nor the number of samples.
    """
    if not isinstance(sigmas, tuple):
        return (sigmas,) * samples
    # Equal sigmas of all heads become one number, which is cheaper to compute.
    sigmas = tuple(entry[0] if isinstance(entry, tuple) and len(set(entry)) == 1 else entry for entry in sigmas)
    if len(sigmas) == 1:
        return sigmas * samples
    if len(sigmas) != samples:
        raise ValueError(
            f"{owner}.sigma has {len(sigmas)} entries, one per sample, for a batch with {samples} conditional samples"
        )
    return sigmas


def largest(sigmas: Sigmas | Mapping[str, Sigmas]) -> float:
    """Return the largest sigma; 0 if nothing is blurred."""
    if isinstance(sigmas, Mapping):
        return max(map(largest, sigmas.values()))
    if isinstance(sigmas, tuple):
        return max(map(largest, sigmas))
    return sigmas

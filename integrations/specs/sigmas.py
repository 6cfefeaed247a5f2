# SPDX-License-Identifier: Apache-2.0
"""A guidance's sigma in all its forms: one number, one per sample, per head, per layer. No diffusers in here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TypeGuard

from segkern.integrations.specs.layer_names import layer_name
from segkern.integrations.specs.schedules import is_number


class Perturbation(Enum):
    """Attention that is no blur, in a sigma's place."""

    IDENTITY = "every token attends to itself alone"


Sigma = float | tuple[float, ...]  # of one sample: one number, or one per head
Sigmas = float | tuple[Sigma, ...]  # of a layer: one number, or one entry per sample
Perturbed = Sigma | Perturbation  # what a sample's attention is: 0 is the plain layer

GivenSigmas = float | Sequence[float | Sequence[float]]


class LayerSigmas(Mapping[str, Sigmas]):
    """Sigmas by the names of layers; it cannot be changed."""

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
    """Check a sigma: its numbers become floats, its sequences tuples; a mapping's names are looked at later.

    Raises:
        ValueError: when it is nothing of the kind; the message quotes it.
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
        f"{owner}.sigma must be 0 (no blur), positive, or math.inf (mean query); one number, a sequence with one per "
        f"sample, or with a sequence per sample of one per head ([[...]] for all samples); or a mapping from layer "
        f"names to any of these, got {given!r}"
    )


def check_heads(owner: str, sigmas: Sigmas, layer: str, heads: int) -> None:
    """Raise a ValueError unless a sigma per head has one for each of a layer's heads."""
    for entry in sigmas if isinstance(sigmas, tuple) else ():
        if isinstance(entry, tuple) and len(entry) != heads:
            raise ValueError(
                f"{owner}.sigma has {len(entry)} numbers per head for layer {layer}, which has {heads} heads"
            )


def per_sample(owner: str, sigmas: Sigmas, samples: int) -> tuple[Sigma, ...]:
    """One entry for each sample of a branch.

    Raises:
        ValueError: for another number of them than samples; a single one serves all.
    """
    if not isinstance(sigmas, tuple):
        return (sigmas,) * samples
    # Heads that agree are one number, which costs less.
    sigmas = tuple(entry[0] if isinstance(entry, tuple) and len(set(entry)) == 1 else entry for entry in sigmas)
    if len(sigmas) == 1:
        return sigmas * samples
    if len(sigmas) != samples:
        raise ValueError(
            f"{owner}.sigma has {len(sigmas)} entries, one per sample, for a batch with {samples} conditional samples"
        )
    return sigmas


def largest(sigmas: Sigmas | Mapping[str, Sigmas]) -> float:
    """The largest number in it; 0 when nothing is blurred."""
    if isinstance(sigmas, Mapping):
        return max(map(largest, sigmas.values()))
    if isinstance(sigmas, tuple):
        return max(map(largest, sigmas))
    return sigmas

# SPDX-License-Identifier: Apache-2.0
"""The texts of a run. Embeddings are compared by value with those of the prompt and of the negative prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch

_MOST_REMEMBERED = 16  # number of embeddings to recognise by identity; a run has two


class TextKind(Enum):
    """The text that an embedding represents in a run."""

    PROMPT = "the prompt"
    NEGATIVE = "the negative prompt"
    BOTH = "the prompt and the negative prompt, which are equal"
    MIXED = "the prompt in some samples and the negative prompt in others"
    UNKNOWN = "an unknown text"


class RunText:
    """The embeddings of a run's prompt and negative prompt, from its arguments or from ``encode_prompt``.

    Args:
        arguments: Arguments of the pipeline call.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._prompt: list[torch.Tensor] = []  # distinct embeddings [tokens, channels]
        self._negative: list[torch.Tensor] = []
        self._remembered: list[tuple[Any, tuple[TextKind, ...]]] = []
        self._keep(self._prompt, arguments.get("prompt_embeds"))
        self._keep(self._negative, arguments.get("negative_prompt_embeds"))

    @property
    def has_negative(self) -> bool:
        """True if the embeddings of a negative prompt are known."""
        return bool(self._negative)

    def note(self, arguments: Mapping[str, Any], result: Any) -> None:
        """Record the result of ``encode_prompt``.

        Pipelines encode both texts in one call, the prompt first, or each text in a separate call.

        Args:
            arguments: Arguments of ``encode_prompt``, by name.
            result: A tuple of embeddings, masks and pooled embeddings, or only the embeddings.
        """
        items = list(result) if isinstance(result, tuple) else [result]
        embeddings = [item for item in items if _is_embedding(item)]
        if not embeddings:
            return
        negative = next((item for item in items[1:] if _is_embedding(item)), None)
        if "negative_prompt" in arguments and negative is not None:
            self._keep(self._prompt, items[0])
            self._keep(self._negative, negative)
        else:
            rows = self._encoded(arguments)
            if rows is not None:
                self._keep(rows, embeddings[0])

    def kinds(self, embeddings: Any) -> tuple[TextKind, ...]:
        """Return the text of each sample in ``[samples, tokens, channels]`` or in a list with one item per sample.

        Synchronises with the device at the first call with new embeddings.
        """
        for known, kinds in self._remembered:
            if known is embeddings:
                return kinds
        kinds = tuple(map(self._kind, embeddings)) if _is_embedding(embeddings) else ()
        if len(self._remembered) >= _MOST_REMEMBERED:
            self._remembered.clear()
        self._remembered.append((embeddings, kinds))
        return kinds

    def _kind(self, row: torch.Tensor) -> TextKind:
        prompt = any(_equal(row, known) for known in self._prompt)
        negative = any(_equal(row, known) for known in self._negative)
        if prompt and negative:
            return TextKind.BOTH
        return TextKind.PROMPT if prompt else TextKind.NEGATIVE if negative else TextKind.UNKNOWN

    def _encoded(self, arguments: Mapping[str, Any]) -> list[torch.Tensor] | None:
        """Return the rows of the text that a call for one text encodes; None if it is not an argument of the run."""
        for name in ("prompt", "prompt_embeds"):
            given = arguments.get(name)
            if given is None:
                continue
            is_prompt = _same(given, self._arguments.get(name))
            if _same(given, self._arguments.get(f"negative_{name}")) and (self._prompt or not is_prompt):
                return self._negative
            return self._prompt if is_prompt else None
        return None

    def _keep(self, rows: list[torch.Tensor], embeddings: Any) -> None:
        if _is_embedding(embeddings):
            for row in embeddings:  # several samples may share one text
                if not any(_equal(row, known) for known in rows):
                    rows.append(row)
            self._remembered.clear()


def common_kind(kinds: Iterable[TextKind]) -> TextKind:
    """Return the text that several samples have in common."""
    present = set(kinds)
    if TextKind.MIXED in present or {TextKind.PROMPT, TextKind.NEGATIVE} <= present:
        return TextKind.MIXED
    for kind in (TextKind.PROMPT, TextKind.NEGATIVE):
        if kind in present:
            return kind
    return TextKind.BOTH if present == {TextKind.BOTH} else TextKind.UNKNOWN


def _same(given: Any, asked: Any) -> bool:
    """Return True if a text equals an argument of the call. Pipelines put a single text into a list."""
    if isinstance(given, torch.Tensor) or isinstance(asked, torch.Tensor):
        return given is asked
    return _listed(given) == _listed(asked)


def _listed(text: Any) -> Any:
    return [text] if isinstance(text, str) else text


def _is_embedding(item: Any) -> bool:
    """Return True for a tensor ``[samples, tokens, channels]`` or a list with one tensor per sample."""
    if isinstance(item, Sequence) and not isinstance(item, str):
        return bool(item) and all(isinstance(part, torch.Tensor) for part in item)
    return isinstance(item, torch.Tensor) and item.ndim >= 3 and item.is_floating_point()


def _equal(row: torch.Tensor, known: torch.Tensor) -> bool:
    if row.shape != known.shape or row.is_meta or known.is_meta:
        return False
    return bool(torch.equal(row.detach(), known.detach().to(row.device, row.dtype)))

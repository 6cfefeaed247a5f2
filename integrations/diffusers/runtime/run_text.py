# SPDX-License-Identifier: Apache-2.0
"""The texts of a run: recognise by its values whether an embedding is the prompt's or the negative prompt's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch

_MOST_REMEMBERED = 16  # embeddings whose kind is known by identity; a run has two


class TextKind(Enum):
    """The text that an embedding stands for in a run."""

    PROMPT = "the prompt"
    NEGATIVE = "the negative prompt"
    BOTH = "the prompt and the negative prompt, which are equal"
    MIXED = "the prompt in some samples and the negative prompt in others"
    UNKNOWN = "an unknown text"


class RunText:
    """The embeddings of a run's prompt and negative prompt, as its arguments or ``encode_prompt`` give them.

    Args:
        arguments: of the pipeline's call.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments
        self._prompt: list[torch.Tensor] = []  # different ones, [tokens, channels]
        self._negative: list[torch.Tensor] = []
        self._remembered: list[tuple[Any, tuple[TextKind, ...]]] = []
        self._keep(self._prompt, arguments.get("prompt_embeds"))
        self._keep(self._negative, arguments.get("negative_prompt_embeds"))

    @property
    def has_negative(self) -> bool:
        """True if the embeddings of a negative prompt are known."""
        return bool(self._negative)

    def note(self, arguments: Mapping[str, Any], result: Any) -> None:
        """Take the result of ``encode_prompt``.

        Pipelines either encode both texts in one call, the prompt's embeddings first, or each in a call of its own.

        Args:
            arguments: of ``encode_prompt``, by name.
            result: embeddings, masks and pooled embeddings in a tuple, or the embeddings alone.
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
        """The text of each sample of ``[samples, tokens, channels]``, or of a list with an item per sample.

        Waits for their device at the first call with new ones.
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
        """Rows of the text that a call for one text encodes; None for a text that is none of the run's arguments."""
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
            for row in embeddings:  # many samples may have one text
                if not any(_equal(row, known) for known in rows):
                    rows.append(row)
            self._remembered.clear()


def common_kind(kinds: Iterable[TextKind]) -> TextKind:
    """The text of several samples."""
    present = set(kinds)
    if TextKind.MIXED in present or {TextKind.PROMPT, TextKind.NEGATIVE} <= present:
        return TextKind.MIXED
    for kind in (TextKind.PROMPT, TextKind.NEGATIVE):
        if kind in present:
            return kind
    return TextKind.BOTH if present == {TextKind.BOTH} else TextKind.UNKNOWN


def _same(given: Any, asked: Any) -> bool:
    """True if a text is one that the call was given; pipelines put a single text into a list."""
    if isinstance(given, torch.Tensor) or isinstance(asked, torch.Tensor):
        return given is asked
    return _listed(given) == _listed(asked)


def _listed(text: Any) -> Any:
    return [text] if isinstance(text, str) else text


def _is_embedding(item: Any) -> bool:
    """True for a tensor ``[samples, tokens, channels]`` or a list with a tensor per sample."""
    if isinstance(item, Sequence) and not isinstance(item, str):
        return bool(item) and all(isinstance(part, torch.Tensor) for part in item)
    return isinstance(item, torch.Tensor) and item.ndim >= 3 and item.is_floating_point()


def _equal(row: torch.Tensor, known: torch.Tensor) -> bool:
    if row.shape != known.shape or row.is_meta or known.is_meta:
        return False
    return bool(torch.equal(row.detach(), known.detach().to(row.device, row.dtype)))

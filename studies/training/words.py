# SPDX-License-Identifier: Apache-2.0
"""The two tokenizers: every word of the captions is one token."""

from __future__ import annotations

import json
import re
import string
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from studies.drawings.scenes import BACKGROUNDS
from studies.drawings.sheet import drawings

NAMES = ("tokenizer", "tokenizer_2")
TOKENS = 32
PAD_TOKENS = ("<|endoftext|>", "!")  # as in SDXL
START, END, END_OF_WORD = "<|startoftext|>", "<|endoftext|>", "</w>"


def words() -> list[str]:
    """Return the words of the captions."""
    found = ["a", "an", "and", "on", "above", "background", *BACKGROUNDS]
    for name in drawings():
        found += re.findall(r"[a-z]+", name.lower())
    return list(dict.fromkeys(found))


def write(folder: Path) -> None:
    """Write both tokenizers in CLIP's format, as ``folder/tokenizer`` and ``folder/tokenizer_2``."""
    merges = _merges()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(tokens), START, END])}
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    for name, pad in zip(NAMES, PAD_TOKENS, strict=True):
        special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
        kind = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        _write_json(folder / name / "vocab.json", vocabulary)
        _write_json(folder / name / "special_tokens_map.json", special)
        _write_json(folder / name / "tokenizer_config.json", kind | special)


def _merges() -> list[tuple[str, str]]:
    """Return the pairs to merge, in order, until every word is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Without them as special tokens, their order, which decides between equally frequent pairs, is random.
    endings = [letter + END_OF_WORD for letter in string.ascii_lowercase]
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        min_frequency=1,
        special_tokens=endings,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(words(), trainer)
    return [(left, right) for left, right in json.loads(tokenizer.to_str())["model"]["merges"]]


def _write_json(path: Path, content: dict[str, object] | dict[str, int] | dict[str, str]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

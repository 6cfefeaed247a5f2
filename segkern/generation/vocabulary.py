# SPDX-License-Identifier: Apache-2.0
"""Words that the bundled model was trained with: names of drawings, background colours and the words between them."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from segkern.generation.demo import PROMPTED
from segkern.generation.loading import DEMO, Source

NAMES = DEMO / "names.json"
_OTHER_WORDS = ("a", "an", "and", "above", "on", "background")


def unknown_words_warning(source: Source, *prompts: str) -> str | None:
    """Return a warning that names the words of the prompts that the bundled model does not know.

    Returns None if the model knows all words, and for other models.

    Example:
        >>> from segkern.generation.loading import find_model
        >>> warning = unknown_words_warning(find_model("demo"), "a jabberwock")
        >>> warning.partition(";")[0]
        'the bundled model does not know the word jabberwock'
    """
    if source.weights != str(DEMO):
        return None
    words = dict.fromkeys(word for prompt in prompts for word in _words(prompt))
    unknown = [word for word in words if word not in known_words()]
    if not unknown:
        return None
    plural = "s" if len(unknown) > 1 else ""
    examples = ", ".join(repr(subject.prompt) for subject in PROMPTED)
    return (
        f"the bundled model does not know the word{plural} {', '.join(unknown)}; it knows prompts such as {examples}, "
        f"with the names and colours in {NAMES}"
    )


@lru_cache(maxsize=1)
def known_words() -> frozenset[str]:
    """Return the words of the captions that the bundled model was trained with."""
    names = json.loads(NAMES.read_text(encoding="utf-8"))
    phrases = [*names["drawings"], *names["backgrounds"], *_OTHER_WORDS]
    return frozenset(word for phrase in phrases for word in _words(phrase))


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())

# SPDX-License-Identifier: Apache-2.0
"""Words that the bundled model was trained with.

Its tokenizer has one token for each of these words. It splits all other words into pieces that the model never saw.
"""

from __future__ import annotations

import re
from typing import Any

from segkern.generation.loading import DEMO, Source

_END_OF_WORD = "</w>"


def unknown_words_warning(source: Source, tokenizer: Any, *prompts: str) -> str | None:
    """Return a warning that names the words of the prompts that the bundled model does not know.

    Returns None if the model knows all words, and for other models.

    Example:
        >>> from transformers import CLIPTokenizer
        >>> from segkern.generation.loading import find_model
        >>> tokenizer = CLIPTokenizer.from_pretrained(DEMO / "tokenizer")
        >>> warning = unknown_words_warning(find_model("demo"), tokenizer, "a jabberwock")
        >>> warning.partition(";")[0]
        'the bundled model does not know the word jabberwock'
    """
    if source.weights != str(DEMO):
        return None
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"[^\W_]+", prompt.lower()))
    unknown = [word for word in words if word.isdigit() or len(tokenizer.tokenize(word)) > 1]
    if not unknown:
        return None
    tokens = [token for token in tokenizer.get_vocab() if token.endswith(_END_OF_WORD)]
    known = sorted(word for word in (token.removesuffix(_END_OF_WORD) for token in tokens) if len(word) > 1)
    plural = "s" if len(unknown) > 1 else ""
    return f"the bundled model does not know the word{plural} {', '.join(unknown)}; it knows {', '.join(known)}"

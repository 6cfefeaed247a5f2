# SPDX-License-Identifier: Apache-2.0
"""HTML of the page: messages, tables and its style."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
.gradio-container { max-width: 1400px !important; margin: 0 auto; padding: 10px 16px !important; }
.gradio-container main { padding: 0 !important; }
#heading h1 { font-size: 1.3rem; margin: 0; }
#heading p { margin: 0; color: var(--body-text-color-subdued); }
.message p { margin: 0; padding: 9px 12px; border-radius: 6px; overflow-wrap: anywhere; line-height: 1.35;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
.message p.refused { border-color: #c2410c; border-left-width: 5px; }
.message progress { appearance: none; display: block; width: 100%; height: 8px; margin-top: 6px; border: 0;
  border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.message progress::-webkit-progress-bar { background: var(--border-color-primary); }
.message progress::-webkit-progress-value { background: var(--color-accent); }
.message progress::-moz-progress-bar { background: var(--color-accent); }
.message, #timing, #report { padding: 0 !important; }
.message .html-container, #timing .html-container, #report .html-container { padding: 0 !important; }
.enlarged img { image-rendering: pixelated; object-fit: contain; width: 100% !important; height: 100% !important; }
#sigma-slider .tab-like-container, #sigma-slider .min_value, #sigma-slider .max_value { display: none; }
table.words, table.words tr { border: 0 !important; }
table.words { border-collapse: collapse; width: 100%; font-size: 0.92rem; margin: 4px 0 10px; }
table.words caption { text-align: left; font-weight: 600; padding: 6px 0; }
table.words th, table.words td { text-align: left; padding: 4px 10px 4px 0 !important; overflow-wrap: anywhere;
  border: 0 !important; border-bottom: 1px solid var(--border-color-primary) !important; }
table.words th { color: var(--body-text-color-subdued); font-weight: 600; overflow-wrap: normal; }
#right, #left, #ask, #settings { min-width: 0 !important; }
@media (max-width: 760px) {
  #main { flex-direction: column; }
  #left { display: contents; }
  #ask { order: 1; } #right { order: 2; } #settings { order: 3; }
  #ask, #right, #settings { width: 100%; flex: none !important; }
  #plain, #guided { height: 48vw !important; }
}
"""


def status_message(text: str) -> str:
    """Say something that went well."""
    return f'<p role="status">{escape(text)}</p>'


def progress_message(done: int, steps: int, run: str) -> str:
    """Say how many of the steps are done, with a bar."""
    bar = f'<progress max="{steps}" value="{done}" aria-label="steps done"></progress>'
    return f'<p role="status">Drawing, {escape(run)}: step {done} of {steps}{bar}</p>'


def error_message(text: str) -> str:
    """Say, in one line, what does not fit.

    Example:
        >>> error_message("sigma must be a number, got '<b>'")
        '<p role="alert" class="refused">sigma must be a number, got &#x27;&lt;b&gt;&#x27;</p>'
    """
    return f'<p role="alert" class="refused">{escape(" ".join(text.split()))}</p>'


def html_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Words in rows."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in rows)
    return f'<table class="words"><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>'

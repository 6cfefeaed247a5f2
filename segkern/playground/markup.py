# SPDX-License-Identifier: Apache-2.0
"""HTML of the page: messages, tables, views of the images and entries of the history."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from PIL import Image

from segkern.playground.choices import CONTRAST

if TYPE_CHECKING:
    from segkern.playground.runs import Progress, Run, RunResult

_SMALL = 256  # smaller images are enlarged without smoothing
_THUMBNAIL = 168


def status_message(text: str) -> str:
    """Return a message."""
    return f'<p role="status">{escape(text)}</p>'


def done_message(text: str) -> str:
    """Return the message of a finished run; a narrow page scrolls to the images."""
    return f'<p role="status" class="done">{escape(text)}</p>'


def progress_message(progress: Progress) -> str:
    """Return a message with the number of completed steps and a bar for all runs.

    A screen reader announces the first step of each run only.
    """
    at = (progress.run - 1) * progress.steps + progress.step
    total = progress.runs * progress.steps
    role = 'role="status"' if progress.step == 1 else ""
    return (
        f"<p><span {role}>Run {progress.run} of {progress.runs}, {escape(progress.name)}:</span> "
        f"step {progress.step} of {progress.steps}"
        f'<progress max="{total}" value="{at}" aria-label="Progress of all runs"></progress></p>'
    )


def error_message(text: str) -> str:
    """Return an error in one line.

    Example:
        >>> error_message("SEG sigma must be a number, got '<b>'")
        '<p role="alert" class="refused">SEG sigma must be a number, got &#x27;&lt;b&gt;&#x27;</p>'
    """
    return f'<p role="alert" class="refused">{escape(" ".join(text.split()))}</p>'


def html_table(caption: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of text."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(word)}</td>' for word in row)}</tr>" for row in rows)
    return f'<table class="words"><caption>{escape(caption)}</caption><tr>{head}</tr>{body}</table>'


def empty_pair() -> str:
    """Return the side-by-side view before the first run."""
    frame = '<span class="frame empty" style="aspect-ratio: 1"></span>'
    figures = "".join(f"<figure><figcaption>{name}</figcaption>{frame}</figure>" for name in ("Before", "After"))
    return f'<div class="pair">{figures}</div>'


def side_by_side(result: RunResult) -> str:
    """Return both images with their captions; each image is a link to its file."""
    return f'<div class="pair">{_figure("before", result)}{_figure("after", result)}</div>{_downloads(result)}'


def divided(result: RunResult) -> str:
    """Return both images in one frame, with a divider that a native range input moves."""
    before, after = (escape(caption) for caption in result.captions)
    return (
        f'<figure class="{_scaling(result)}"><figcaption class="ends"><span>Before: {before}</span>'
        f'<span>After: {after}</span></figcaption><span class="frame divided" style="--at: 50%; {_fit(result)}">'
        f"{_image('before', result)}{_image('after', result)}"
        '<input type="range" min="0" max="100" value="50" aria-label="Divider: how much of the image before guidance"'
        " aria-valuetext=\"50 percent\" oninput=\"this.parentNode.style.setProperty('--at', this.value + '%');"
        " this.setAttribute('aria-valuetext', this.value + ' percent')\">"
        '<span class="handle" aria-hidden="true">↔</span></span></figure>'
    )


def difference_view(result: RunResult) -> str:
    """Return the difference of the images."""
    mean = f"{result.mean_difference:.1f}"
    return (
        f'<figure class="{_scaling(result)}"><figcaption>Difference, amplified {CONTRAST} times: the darker a pixel, '
        f"the more it changed. Mean without amplification: {mean} of 255 levels.</figcaption>"
        f'<span class="frame" style="{_fit(result)}">'
        f'<img src="{file_address(result.difference)}" alt="Difference of the two images, {mean} of 255 levels on '
        f'average"></span></figure>'
    )


def energy_maps(path: Path | None) -> str:
    """Return the energy maps as a link to their file."""
    if path is None:
        return '<p>To see maps of a UNet here, select "Map the attention energy" under "Also measure".</p>'
    address = file_address(path)
    image = f'<img src="{address}" alt="Maps of the attention energy">'
    return f'<figure><a href="{address}" target="_blank" title="Open in a new tab">{image}</a></figure>'


def history_entry(run: Run, result: RunResult) -> str:
    """Return the thumbnail and the main settings of a run."""
    with Image.open(result.after) as image:
        small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    file = io.BytesIO()
    small.save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    request = run.settings.request
    details = [f"{type(spec).__name__} scale {spec.scale:g}" for spec in run.settings.specs]
    details += [f"seed {request.seed}", f"{request.steps} steps"]
    prompt = textwrap.shorten(request.prompt, 60, placeholder="...") or "no prompt"
    return (
        f'<img src="{address}" alt=""><b>{escape(result.captions[1])}</b> '
        f"<small>{', '.join(details)}</small> <small>{escape(prompt)}</small>"
    )


def file_address(path: Path) -> str:
    """Return the address of a file in the folder that the page serves."""
    return f"gradio_api/file={quote(path.as_posix())}"


def _figure(name: str, result: RunResult) -> str:
    caption = result.captions[name == "after"]
    return (
        f'<figure id="{name}" class="{_scaling(result)}"><figcaption>{name.capitalize()}: {escape(caption)}'
        f'</figcaption><a class="frame" href="{file_address(getattr(result, name))}" target="_blank" '
        f'title="Open in a new tab" style="{_fit(result)}">{_image(name, result)}</a></figure>'
    )


def _image(name: str, result: RunResult) -> str:
    caption = escape(f"{name.capitalize()} guidance: {result.captions[name == 'after']}", quote=True)
    return f'<img class="{name}" src="{file_address(getattr(result, name))}" alt="{caption}">'


def _downloads(result: RunResult) -> str:
    links = (
        f'<a href="{file_address(path)}" download="{escape(path.name)}">Download {name}</a>'
        for name, path in (("before", result.before), ("after", result.after))
    )
    return f'<p class="downloads">{"".join(links)}</p>'


def _scaling(result: RunResult) -> str:
    return "small" if max(result.size) < _SMALL else "large"


def _fit(result: RunResult) -> str:
    """Return the style of a frame that is as wide as the page allows and not higher than the window."""
    width, height = result.size
    return f"aspect-ratio: {width} / {height}; width: min(100%, {70 * width / height:.1f}vh)"

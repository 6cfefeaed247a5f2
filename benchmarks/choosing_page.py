# SPDX-License-Identifier: Apache-2.0
"""The tables of ``docs/choosing.md``, from the committed evaluation and its approximations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.tables import markdown
from studies.evaluation import report
from studies.evaluation.study import Setting

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)

Rows = Sequence[dict[str, Any]]


def by_scale(rows: Rows, mode: str, measure: str, digits: int) -> str:
    """A measure of SEG in the middle block, sigmas downwards and scales to the right."""
    values: dict[tuple[float, float], str] = {}
    plain = ""
    for row in rows:
        setting, found = report.setting_of(row), row["measures"].get(measure)
        if setting.mode != mode or found is None:
            continue
        text = f"{found['mean']:.{digits}f} ± {found['spread']:.{digits}f}"
        if setting == Setting(mode):
            plain = text
        elif setting == Setting(mode, seg=setting.seg, sigma=setting.sigma, layers="mid"):
            values[setting.sigma, setting.seg] = text
    sigmas, scales = (sorted({pair[axis] for pair in values}) for axis in (0, 1))
    shown = [[_sigma(sigma), *(values.get((sigma, scale), "") for scale in scales)] for sigma in sigmas]
    headings = ("sigma", *(f"scale {scale:g}" for scale in scales))
    before = "" if measure == "distance_to_unguided" else f"Without guidance: {plain}.\n\n"
    return before + markdown(headings, shown)


def elsewhere(rows: Rows) -> str:
    """Frechet distance of SEG at infinity in other layers and other parts of the run, scales to the right."""
    values: dict[tuple[str, float], str] = {}
    plain = ""
    for row in rows:
        setting, text = report.setting_of(row), f"{row['measures']['frechet_distance']['mean']:.2f}"
        if not setting.seg:
            plain = text
        elif math.isinf(setting.sigma):
            values[_where(setting), setting.seg] = text
    places = list(dict.fromkeys(place for place, _ in values))
    scales = [scale for scale in sorted({scale for _, scale in values}) if all((p, scale) in values for p in places)]
    shown = [[place, *(values[place, scale] for scale in scales)] for place in places]
    return f"Without guidance: {plain}.\n\n{markdown(('where', *(f'scale {scale:g}' for scale in scales)), shown)}"


def _where(setting: Setting) -> str:
    part = {(0.0, 0.5): ", first half of the steps", (0.5, 1.0): ", second half of the steps"}
    return setting.layers.replace(",", " and ") + part.get((setting.start, setting.stop), "")


def _sigma(sigma: float) -> str:
    return "∞" if math.isinf(sigma) else f"{sigma:g}"


def page(text: str, found: dict[str, Any]) -> str:
    """The page's text with its tables replaced."""
    rows = found["rows"]
    made: dict[str, Callable[[], str]] = {
        "frechet": lambda: by_scale(rows, "unconditional", "frechet_distance", 2),
        "recall": lambda: by_scale(rows, "unconditional", "recall", 3),
        "captions": lambda: by_scale(rows, "prompts", "caption_accuracy", 3),
        "moved": lambda: by_scale(rows, "unconditional", "distance_to_unguided", 3),
        "elsewhere": lambda: elsewhere(found["selection"]),
        "verdict": lambda: str(found["verdict"]),
    }
    return _BLOCK.sub(lambda block: f"{block[1]}\n{made[block[2]]()}\n\n{block[3]}", text)

# SPDX-License-Identifier: Apache-2.0
"""The design of an evaluation: one setting is chosen on some seeds; all settings are reported on other seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from studies.evaluation import report
from studies.evaluation.settings import MODES, Setting, grid, variants
from studies.evaluation.study import REFERENCE_COUNT, REFERENCE_SEED, Study


@dataclass(frozen=True)
class Design:
    """The settings and seeds to measure.

    Attributes:
        scales: Scales of SEG.
        sigmas: Sigmas of SEG, in tokens of the model's grid.
        seeds: Seeds whose measurements are reported.
        selection_seeds: Seeds on which the unconditional setting with the lowest Frechet distance is chosen. They
            differ from ``seeds``, because a choice is not an independent measurement.
        cfg_scales: Scales of classifier-free guidance, for prompts.
    """

    scales: tuple[float, ...] = (0.5, 1.0, 2.0, 3.0)
    sigmas: tuple[float, ...] = (5.0, math.inf)
    seeds: tuple[int, ...] = (1, 2, 3)
    selection_seeds: tuple[int, ...] = (101,)
    cfg_scales: tuple[float, ...] = (2.0, 3.0, 5.0)

    @property
    def candidates(self) -> list[Setting]:
        """Settings to choose from: also SEG in other layers and in parts of the steps, at every second scale."""
        few_scales = self.scales[1::2] or self.scales
        more = variants("unconditional", few_scales, self.sigmas[-1])
        return list(dict.fromkeys([*grid("unconditional", self.scales, self.sigmas, ()), *more]))

    @property
    def reported(self) -> list[Setting]:
        """Settings to report, without the chosen one."""
        return [setting for mode in MODES for setting in grid(mode, self.scales, self.sigmas, self.cfg_scales)]

    @property
    def runs(self) -> int:
        """Largest possible number of pairs of setting and seed."""
        return len(self.candidates) * len(self.selection_seeds) + (len(self.reported) + 1) * len(self.seeds)


def carry_out(study: Study, design: Design, advance: Callable[[str, int], None]) -> dict[str, Any]:
    """Measure all settings and return the results for ``report.write``.

    Args:
        study: Study that measures.
        design: Settings and seeds.
        advance: Called with the name of the measurement and the size of every batch of images.
    """
    selection = [
        study.measure(setting, seed, advance) for seed in design.selection_seeds for setting in design.candidates
    ]
    chosen = choose(selection)
    settings = list(dict.fromkeys([*design.reported, chosen]))
    cells = [study.measure(setting, seed, advance) for seed in design.seeds for setting in settings]
    cells.sort(key=lambda cell: settings.index(report.setting_of(cell)))
    return {
        "images_per_seed": study.images,
        "steps": study.steps,
        "seeds": list(design.seeds),
        "selection_seeds": list(design.selection_seeds),
        "reference": {"seed": REFERENCE_SEED, "count": REFERENCE_COUNT},
        "chosen": chosen.to_dict(),
        "verdict": verdict(cells, chosen),
        "drawings": report.mean_and_spread([study.drawn(seed) for seed in design.seeds]),
        "held_out": report.mean_and_spread([study.unseen(seed) for seed in design.seeds]),
        "rows": report.summarise(cells),
        "selection": report.summarise(selection),
    }


def choose(cells: list[dict[str, Any]]) -> Setting:
    """Return the setting with SEG that has the lowest mean Frechet distance."""
    rows = [row for row in report.summarise(cells) if report.setting_of(row).seg]
    return report.setting_of(min(rows, key=lambda row: row["measures"]["frechet_distance"]["mean"]))


def verdict(cells: list[dict[str, Any]], chosen: Setting) -> str:
    """Return a sentence that says whether the chosen setting lowers the Frechet distance.

    With and without guidance, the samples of a seed start from the same noise, so differences are taken per seed.
    """
    by_setting: dict[Setting, dict[int, float]] = {}
    for cell in cells:
        by_setting.setdefault(report.setting_of(cell), {})[cell["seed"]] = cell["measures"]["frechet_distance"]
    plain, guided = by_setting[Setting(chosen.mode)], by_setting[chosen]
    gains = [plain[seed] - guided[seed] for seed in guided]
    gain = statistics.fmean(gains)
    how = f"{statistics.fmean(plain.values()):.2f} without, {statistics.fmean(guided.values()):.2f} with"
    subject = f"{report.describe(chosen)}, chosen on other seeds,"
    distance = f"the {chosen.mode} Frechet distance"
    if gain <= 0:
        return f"{subject} does not lower {distance}: {how}."
    if len(gains) == 1:
        return f"{subject} lowers {distance} on the one seed that was run: {how}. One seed has no spread."
    spread = statistics.stdev(gains)
    beyond = "beyond" if gain > spread else "within"
    return f"{subject} lowers {distance} {beyond} the spread over seeds: {how}; gain {gain:.2f} ± {spread:.2f}."

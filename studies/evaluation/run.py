# SPDX-License-Identifier: Apache-2.0
"""A whole evaluation: choose on some seeds, report on others, and write down what is needed to do it again."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from studies.evaluation import report
from studies.evaluation.study import REFERENCE_COUNT, REFERENCE_SEED, Setting, Study, grid, variants


@dataclass(frozen=True)
class Design:
    """What to measure.

    Attributes:
        modes: ``"unconditional"``, ``"prompts"`` or both.
        scales: of SEG.
        sigmas: of SEG, in tokens of the model's own grid.
        cfg_scales: of classifier-free guidance, with prompts.
        layers: that SEG guides.
        seeds: whose measurements are reported.
        selection_seeds: on which the unconditional setting with the least Frechet distance is chosen, among the
            same settings and others besides; none chooses nothing.
    """

    modes: tuple[str, ...]
    scales: tuple[float, ...]
    sigmas: tuple[float, ...]
    cfg_scales: tuple[float, ...]
    layers: str
    seeds: tuple[int, ...]
    selection_seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        both = sorted(set(self.seeds) & set(self.selection_seeds))
        if both:
            raise ValueError(f"a setting is chosen on other seeds than the reported ones; {both} are among both")

    @property
    def candidates(self) -> list[Setting]:
        """What is chosen from, no guidance among it."""
        mode = "unconditional"
        if mode not in self.modes or not self.selection_seeds:
            return []
        fewer = self.scales[:: max(1, len(self.scales) // 3)]
        found = grid(mode, self.scales, self.sigmas, (), self.layers) + variants(mode, fewer, self.sigmas[-1])
        return list(dict.fromkeys(found))

    @property
    def reported(self) -> list[Setting]:
        """What is reported, but for the chosen setting."""
        return [
            setting
            for mode in self.modes
            for setting in grid(mode, self.scales, self.sigmas, self.cfg_scales, self.layers)
        ]

    @property
    def runs(self) -> int:
        """Pairs of setting and seed, at most."""
        extra = len(self.seeds) if self.candidates else 0
        return len(self.candidates) * len(self.selection_seeds) + len(self.reported) * len(self.seeds) + extra


def carry_out(study: Study, design: Design, advance: Callable[[str, int], None]) -> dict[str, Any]:
    """Measure everything and return what ``report.write`` keeps.

    Args:
        study: what measures.
        design: what to measure.
        advance: hears what is being measured, and of every batch of pictures.
    """

    def measure(setting: Setting, seed: int) -> dict[str, Any]:
        name = f"{setting.mode}, {report.describe(setting)}, seed {seed}"
        return study.measure(setting, seed, lambda count: advance(name, count))

    tried = [measure(setting, seed) for seed in design.selection_seeds for setting in design.candidates]
    chosen = choose(tried)
    settings = design.reported + ([chosen] if chosen and chosen not in design.reported else [])
    cells = [measure(setting, seed) for seed in design.seeds for setting in settings]
    cells.sort(key=lambda cell: settings.index(report.setting_of(cell)))
    rows = report.summarise(cells)
    return {
        "images_per_seed": study.images,
        "steps": study.steps,
        "seeds": list(design.seeds),
        "selection_seeds": list(design.selection_seeds),
        "reference": {"seed": REFERENCE_SEED, "count": REFERENCE_COUNT},
        "chosen": chosen.to_dict() if chosen else None,
        "verdict": verdict(cells, chosen) if chosen else "",
        "drawings": report.mean_and_spread([study.drawn(seed) for seed in design.seeds]),
        "rows": rows,
        "selection": report.summarise(tried),
    }


def choose(tried: list[dict[str, Any]]) -> Setting | None:
    """The guidance with the least mean Frechet distance, None where nothing was tried."""
    rows = [row for row in report.summarise(tried) if report.setting_of(row).seg]
    if not rows:
        return None
    return report.setting_of(min(rows, key=lambda row: row["measures"]["frechet_distance"]["mean"]))


def verdict(cells: list[dict[str, Any]], chosen: Setting) -> str:
    """Whether the chosen setting brings samples nearer to real drawings than no guidance, seed by seed.

    A seed's samples begin from the same noise with and without guidance, so the differences are taken in pairs.
    """
    by_setting: dict[Setting, dict[int, float]] = {}
    for cell in cells:
        by_setting.setdefault(report.setting_of(cell), {})[cell["seed"]] = cell["measures"]["frechet_distance"]
    plain, guided = by_setting[Setting(chosen.mode)], by_setting[chosen]
    gains = [plain[seed] - guided[seed] for seed in guided]
    gain = statistics.fmean(gains)
    how = f"{statistics.fmean(plain.values()):.2f} without, {statistics.fmean(guided.values()):.2f} with"
    subject = f"{report.describe(chosen)}, chosen on other seeds,"
    what = f"the {chosen.mode} Frechet distance"
    if gain <= 0:
        return f"{subject} does not lower {what}: {how}."
    if len(gains) == 1:
        return f"{subject} lowers {what} on the one seed that was run: {how}. One seed has no spread."
    spread = statistics.stdev(gains)
    beyond = "beyond" if gain > spread else "within"
    return f"{subject} lowers {what} {beyond} the spread over seeds: {how}; gain {gain:.2f} ± {spread:.2f}."

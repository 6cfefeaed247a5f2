# SPDX-License-Identifier: Apache-2.0
"""Every page and picture with measurements, made from the committed result files: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import (
    approximations,
    choosing_page,
    compatibility,
    compiled_page,
    energy,
    energy_page,
    family,
    host,
    models_page,
    performance,
    plots,
    releases,
    releases_page,
    results,
    step_page,
    steps,
)
from benchmarks.results import Result, Row
from studies.evaluation import report
from studies.evaluation.plots import plot

ROOT = Path(__file__).parents[1]
EVALUATION = ROOT / "segkern" / "checkpoints" / "demo" / "evaluation.json"
COMPILED = ROOT / "benchmarks" / "results" / "compiled" / "kernels.json"
BLOCK = re.compile(r"(<!-- measurements -->\n).*?(<!-- /measurements -->)", re.DOTALL)
STEPS = re.compile(r"(<!-- steps -->\n).*?(<!-- /steps -->)", re.DOTALL)
EVALUATED = re.compile(r"(<!-- evaluation -->\n).*?(<!-- /evaluation -->)", re.DOTALL)

_SHOWN = ("sdxl-32x32", "sdxl-64x64")


def table(result: Result) -> str:
    """SDXL's two layers of one attention file, in its first dtype, as a paragraph and a markdown table."""
    env = result["environment"]
    dtype = result["rows"][0]["dtype"]
    threads = f", {env['threads']} threads" if env["device_type"] == "cpu" else ""
    lines = [
        f"{env['device']}{threads}, {dtype}, torch {env['torch']}, commit "
        f"`{env['commit']}`; medians of interleaved rounds:",
        "",
        "| layer, batch of 3 | sigma | plain attention | official algorithm | segkern | x plain | x official |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {(row["case"], row["sigma"], row["provider"]): row for row in result["rows"] if row["dtype"] == dtype}
    for case, sigma in dict.fromkeys(name[:2] for name in rows):
        ours = rows.get((case, sigma, "auto"))
        if case not in _SHOWN or ours is None or ours["ratio_to"] is None:
            continue
        plain, official = rows[case, sigma, ours["ratio_to"]], rows.get((case, sigma, "official"))
        ms = [_median(row, result) for row in (plain, official, ours)]
        share = "-" if ms[1] is None or ms[2] is None else f"{ms[2] / ms[1]:.2f}"
        label = f"{ours['height']}x{ours['width']} tokens, {ours['heads']} heads"
        lines.append(
            f"| {label} | {float(sigma)} | {' | '.join(map(_written, ms))} | {ours['ratio']['median']:.2f} | {share} |"
        )
    return "\n".join(lines)


def _median(row: Row | None, result: Result) -> float | None:
    return None if row is None or row["reason"] is not None else row[f"{result['headline']}_ms"]["median"]


def _written(ms: float | None) -> str:
    if ms is None:
        return "none"
    return f"{ms:.0f} ms" if ms >= 10 else f"{ms:.3g} ms"


def rendered() -> str:
    """Every committed file of the attention suite, in the order of their names."""
    found = results.committed().values()
    return "\n\n".join(table(result) for result in found if result["suite"] == "attention" and result["rows"])


def step_summaries() -> str:
    """What the committed files of guided steps say in short."""
    files = list(steps.committed().values())
    if not files:
        return "Not measured yet."
    return "\n\n".join([step_page.counts(files[0]["sdxl_flops"]), *map(step_page.summary, files)])


def evaluation_summary() -> str:
    """What the committed evaluation says in short: the chosen setting, the paper's, and none."""
    if not EVALUATION.exists():
        return "Not measured yet for this checkpoint."
    found = report.read(EVALUATION)
    parts = [found["verdict"]]
    for mode in report.modes(found["rows"]):
        rows = [row for row in report.short(found) if row["setting"]["mode"] == mode]
        parts += [f"{mode.capitalize()}:", report.table(rows, found["drawings"])]
    return "\n\n".join(parts)


def evaluation_page(found: dict[str, Any]) -> str:
    """The committed evaluation, and after it the family."""
    return f"{report.markdown(found)}\n{family.section(family.committed())}"


def readme_with_tables(readme: str) -> str:
    """The README's text with its measurements replaced."""
    readme = BLOCK.sub(lambda found: f"{found[1]}\n{rendered()}\n\n{found[2]}", readme)
    readme = STEPS.sub(lambda found: f"{found[1]}\n{step_summaries()}\n\n{found[2]}", readme)
    return EVALUATED.sub(lambda found: f"{found[1]}\n{evaluation_summary()}\n\n{found[2]}", readme)


def main() -> None:
    """Rewrite them all."""
    path = ROOT / "README.md"
    path.write_text(readme_with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    files = results.committed()
    (docs / "performance.md").write_text(performance.page(files, host.committed()), encoding="utf-8")
    for stem, result in files.items():
        plots.write(stem, result, results.RESULTS)
    guided = steps.committed()
    (docs / "pipelines.md").write_text(step_page.page(guided, approximations.committed()), encoding="utf-8")
    for stem, found in guided.items():
        step_page.picture(found, steps.FOLDER / f"{stem}.png")
    compiled = json.loads(COMPILED.read_text(encoding="utf-8"))
    (docs / "compiled.md").write_text(compiled_page.page(compiled), encoding="utf-8")
    (docs / "models.md").write_text(models_page.page(compatibility.committed()), encoding="utf-8")
    tested = releases_page.page(releases.committed(), releases.committed_extras())
    (docs / "releases.md").write_text(tested, encoding="utf-8")
    (docs / "energy.md").write_text(energy_page.page(energy.committed()), encoding="utf-8")
    energy_page.pictures(energy.committed_run(), energy.FOLDER / "picture.png", docs)
    if not EVALUATION.exists():
        return
    found = report.read(EVALUATION)
    (docs / "evaluation.md").write_text(evaluation_page(found), encoding="utf-8")
    choosing = docs / "choosing.md"
    choosing.write_text(choosing_page.page(choosing.read_text(encoding="utf-8"), found), encoding="utf-8")
    plot(found["rows"], docs / "evaluation.png", report.title(found), found["drawings"])


if __name__ == "__main__":
    main()

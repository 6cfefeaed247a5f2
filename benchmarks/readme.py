# SPDX-License-Identifier: Apache-2.0
"""Every page and picture with measurements, made from the committed result files: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks import compiled_page
from segkern.evaluation import report
from segkern.evaluation.plots import plot

ROOT = Path(__file__).parents[1]
EVALUATION = ROOT / "segkern" / "checkpoints" / "demo" / "evaluation.json"
COMPILED = ROOT / "benchmarks" / "results" / "compiled" / "kernels.json"
BLOCK = re.compile(r"(<!-- measurements -->\n).*?(<!-- /measurements -->)", re.DOTALL)
EVALUATED = re.compile(r"(<!-- evaluation -->\n).*?(<!-- /evaluation -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """One result file as a paragraph and a markdown table."""
    env = result["environment"]
    dtypes = {row["dtype"] for row in result["attention"]}
    lines = [
        f"{env['device']}, {env['threads']} threads, {', '.join(sorted(dtypes))}, torch {env['torch']}, commit "
        f"`{env['commit']}`; medians of interleaved rounds:",
        "",
        "| layer, batch of 3 | sigma | plain attention | official algorithm | segkern | x plain | x official |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["attention"]:
        lines.append(
            f"| {row['case']} | {row['sigma']} | {row['sdpa_ms']:.0f} ms | {row['official_ms']:.0f} ms | "
            f"{row['segkern_ms']:.0f} ms | {row['ratio_to_sdpa']:.2f} | {row['ratio_to_official']:.2f} |"
        )
    return "\n".join(lines)


def rendered() -> str:
    """Every committed result file, in the order of their names."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    return "\n\n".join(table(json.loads(path.read_text())) for path in files)


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


def readme_with_tables(readme: str) -> str:
    """The README's text with its measurements replaced."""
    readme = BLOCK.sub(lambda found: f"{found[1]}\n{rendered()}\n\n{found[2]}", readme)
    return EVALUATED.sub(lambda found: f"{found[1]}\n{evaluation_summary()}\n\n{found[2]}", readme)


def main() -> None:
    """Rewrite them all."""
    path = ROOT / "README.md"
    path.write_text(readme_with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs").mkdir(exist_ok=True)
    compiled = json.loads(COMPILED.read_text(encoding="utf-8"))
    (ROOT / "docs" / "compiled.md").write_text(compiled_page.page(compiled), encoding="utf-8")
    if not EVALUATION.exists():
        return
    found = report.read(EVALUATION)
    (ROOT / "docs" / "evaluation.md").write_text(report.markdown(found), encoding="utf-8")
    plot(found["rows"], ROOT / "docs" / "evaluation.png", report.title(found), found["drawings"])


if __name__ == "__main__":
    main()

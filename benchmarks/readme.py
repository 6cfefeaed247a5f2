# SPDX-License-Identifier: Apache-2.0
"""The README's table of measurements, made from the committed result files: ``python -m benchmarks.readme``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- measurements -->\n).*?(<!-- /measurements -->)", re.DOTALL)


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


def readme_with_tables(readme: str) -> str:
    """The README's text with its measurements replaced."""
    return BLOCK.sub(lambda found: f"{found[1]}\n{rendered()}\n\n{found[2]}", readme)


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(readme_with_tables(path.read_text()))

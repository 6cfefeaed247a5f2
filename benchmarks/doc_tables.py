# SPDX-License-Identifier: Apache-2.0
"""Tables of committed results in the README and the documentation: ``python -m benchmarks tables`` writes them.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``, where ``name`` is a key of ``TABLES``; the text around
it is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compatibility, results
from benchmarks.cases import SDXL
from benchmarks.tables import markdown
from segkern.generation.loading import DEMO
from studies.evaluation import report

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md", "docs/kernels.md", "docs/evaluation.md", "docs/models.md")
_REAL = "sdxl-416x608"  # the size of SDXL's own configuration on a CPU
_BLOCK = re.compile(r"(<!-- ([a-z-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(text: str) -> str:
    """A page's text with every table written anew.

    Raises:
        ValueError: for the name of a table that there is not.
    """

    def written(block: re.Match[str]) -> str:
        if block[2] not in TABLES:
            raise ValueError(f"there is no table {block[2]!r}, there are {', '.join(TABLES)}")
        return f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[3]}"

    return _BLOCK.sub(written, text)


def write() -> list[Path]:
    """Write the tables of all pages; the pages that changed."""
    changed = []
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = fill(before)
        if after != before:
            path.write_text(after, encoding="utf-8")
            changed.append(path)
    return changed


def attention(sigmas: Sequence[str], providers: Mapping[str, str]) -> str:
    """SDXL's two layers of every committed run of the attention suite: milliseconds, and ratios to plain attention."""
    parts = []
    for result in results.committed().values():
        if result["suite"] != "attention" or result["quick"]:
            continue
        clock = f"{result['headline']}_ms"
        dtype = result["rows"][0]["dtype"]
        rows = {(r["case"], r["sigma"], r["provider"]): r for r in result["rows"] if r["dtype"] == dtype}
        lines = []
        for case, sigma in dict.fromkeys(key[:2] for key in rows):
            ratio_to = rows[case, sigma, "auto"]["ratio_to"]
            if case not in SDXL or sigma not in sigmas or ratio_to is None:
                continue
            plain = f"{rows[case, sigma, ratio_to][clock]['median']:.3g} ms"
            ratios = [rows[case, sigma, name]["ratio"] for name in providers]
            lines.append(
                [
                    f"{case.removeprefix('sdxl-').replace('x', ' x ')}, {rows[case, sigma, 'auto']['heads']} heads",
                    _sigma(sigma),
                    plain,
                    *("-" if ratio is None else f"{ratio['median']:.2f}" for ratio in ratios),
                ]
            )
        headings = ("layer", "sigma", "plain attention", *(f"{name}, x plain" for name in providers.values()))
        parts += [f"{_measured(result['environment'])}, {dtype}:", markdown(headings, lines)]
    return "\n\n".join(parts)


def steps(prefixes: Sequence[str], sigmas: Sequence[str] = ("", "10", "inf")) -> str:
    """Cost of a guided step by choice of layers and sigma: counted on SDXL, measured beside the official algorithm."""
    files = [file for file in _step_files() if file["sdxl_flops"]]
    counted = files[0]["sdxl_flops"]
    lines = []
    for name in counted:
        prefix, guided, rest = name.partition("segkern ")
        layers, _, sigma = rest.partition(" sigma ")
        if not guided or prefix not in prefixes or sigma not in sigmas:
            continue
        plain = "CFG" if prefix else "no guidance"
        official = f"{prefix}official SEG sigma {sigma}" if layers == "mid" else f"{prefix}PAG of diffusers"
        official = official if layers in ("mid", "PAG mid") else ""
        what = layers if layers.startswith("PAG") else f"SEG {layers}, sigma {_sigma(sigma)}"
        measured = [_step_ratio(file, way) for file in files for way in (name, official)]
        lines.append([f"{prefix}{what}", f"{counted[name] / counted[plain]:.3f}", *measured])
    devices = [file["environment"]["device"] for file in files]
    headings = [f"{device}, {whose}" for device in devices for whose in ("segkern", "official")]
    return markdown(("guidance", "FLOPs on SDXL", *headings), lines)


def real_steps() -> str:
    """Guided steps of Stable Diffusion XL's own configuration on a CPU, a table for each file."""
    parts = []
    for file in _step_files():
        if file["size"] != _REAL:
            continue
        lines = []
        for row in file["rows"]:
            spreads = (f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})" for ratio in _ratios(row))
            counted = "" if row["counted"] is None else f"{row['counted']:.3f}"
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            lines.append([row["way"], f"{row['ms']['median'] / 1e3:.1f} s", *spreads, counted, error])
        headings = ("run", "a step", "time, x CFG", "CPU time, x CFG", "FLOPs, x CFG", "distance to official")
        measured = f"{_measured(file['environment'])}, {file['dtype']}, {file['rounds']} rounds"
        parts += [f"{measured}:", markdown(headings, lines)]
    return "\n\n".join(parts)


def _ratios(row: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    return row["ratio"], row["cpu_ratio"]


def _step_files() -> list[dict[str, Any]]:
    return [results.read_json(path) for path in sorted((results.RESULTS / "step").glob("*.json"))]


def _step_ratio(file: Mapping[str, Any], name: str) -> str:
    row = next((row for row in file["rows"] if row["way"] == name), None)
    return "" if row is None or row["ratio"] is None else f"{row['ratio']['median']:.2f}"


def comparison(name: str) -> str:
    """A table for each mode of what ``studies.comparisons`` measured."""
    result = results.read_json(results.RESULTS / name / "demo.json")
    return "\n\n".join(_by_mode(result["rows"], result).values())


def evaluation(mode: str, every: bool) -> str:
    """The bundled model's evaluation in one mode: all settings of scale 1 and above, or a few."""
    result = report.read(DEMO / "evaluation.json")
    rows = report.short(result)
    if every:
        rows = [row for row in result["rows"] if not row["setting"]["seg"] or row["setting"]["seg"] >= 1]
    return _by_mode(rows, result)[mode]


def _by_mode(rows: Sequence[dict[str, Any]], result: Mapping[str, Any]) -> dict[str, str]:
    return {
        mode: report.table([row for row in rows if row["setting"]["mode"] == mode], result.get("drawings"))
        for mode in report.modes(rows)
    }


def evaluation_summary() -> str:
    """The evaluation's verdict, and a few settings of each mode."""
    verdict = str(report.read(DEMO / "evaluation.json")["verdict"])
    return "\n\n".join(
        [verdict, "Unconditional:", evaluation("unconditional", False), "Prompts:", evaluation("prompts", False)]
    )


def compiled() -> str:
    """The resources that the compiled kernels use: a row for each target."""
    file = results.read_json(results.RESULTS / "compiled" / "kernels.json")
    lines = []
    for target in dict.fromkeys(record["target"] for record in file["kernels"]):
        records = [record for record in file["kernels"] if record["target"] == target]
        spills = sum(bool(record["spilled_bytes"] or record["local_bytes"]) for record in records)
        warnings = sum(bool(record["serialisation"]) for record in records)
        most = {name: max(record[name] for record in records) for name in ("registers", "shared_bytes")}
        shared = f"{most['shared_bytes'] / 1024:.0f} KiB"
        lines.append([target, str(len(records)), str(most["registers"]), shared, str(spills), str(warnings)])
    headings = ("target", "kernels compiled", "most registers", "most shared memory", "with spills", "with warnings")
    made = f"Triton {file['environment']['triton']}, commit `{file['environment']['commit']}`:"
    return f"{made}\n\n{markdown(headings, lines)}"


def instructions() -> str:
    """Instructions of the loops over keys in bfloat16, ours beside those of others' kernels.

    At head dimension 64, and on Hopper at 128.
    """
    from benchmarks.compiled_code import KINDS

    file = results.read_json(results.RESULTS / "compiled" / "kernels.json")
    lines = []
    for record in file["kernels"]:
        flags = record["flags"]
        wide = record["head_dim"] == 128 and record["target"] == "sm_90" and flags.get("DESCRIPTORS")
        if not (record["head_dim"] == 64 or wide) or record["dtype"] != "bf16" or not flags.get("EVEN_KEYS", True):
            continue
        ours = {True: "ours, blurred in the prologue", False: "ours, as is or blurred before"}
        others = {True: "style of FlexAttention", False: "style of Triton's tutorial"}
        if record["kernel"] == "_unmasked_attention_kernel":
            name = ours[flags["PROLOGUE"]]
            if record["target"] == "sm_90" and not flags["DESCRIPTORS"]:
                name = "ours, keys not aligned to 16 bytes"
            if wide:
                name += ", head dimension 128"
        elif record["kernel"] == "_plain_attention_kernel":
            name = others[flags["FLEX"]]
        else:
            continue
        sizes = f"{record['registers']}, {record['shared_bytes'] / 1024:.0f} KiB"
        programs = "" if record["programs"] is None else str(record["programs"])
        loop = [f"{record['loop'][kind]:.0f}" for kind in (*KINDS, "all")]
        tile = f"{record['tile']['BLOCK_M']} x {record['tile']['BLOCK_N']}"
        lines.append(
            [
                record["target"],
                name,
                tile,
                *loop,
                sizes,
                programs,
                {True: "yes", False: "no", None: ""}[record["overlap"]],
            ]
        )
    headings = ("target", "kernel", "tile", *KINDS, "all", "registers, shared memory", "programs", "overlap")
    return markdown(headings, lines)


def launches() -> str:
    """The host's time for the launches of a blurred call, a table for each file that has it."""
    parts = []
    for path in sorted((results.RESULTS / "host").glob("*.json")):
        file = results.read_json(path)
        if file.get("launches"):
            lines = [[row["call"], str(row["launches"]), f"{row['us']:.1f} us"] for row in file["launches"]]
            environment = f"{_measured(file['environment'])}, triton {file['environment']['triton']}"
            parts += [f"{environment}:", markdown(("batch of 3", "launches", "host"), lines)]
    return "\n\n".join(parts)


def models(group: str) -> str:
    """Outcomes of the tests that hold guidance on a group of models against another computation of it."""
    files = compatibility.committed()
    tests = [test for file in files.values() for test in file["tests"] if test["group"] == group]
    lines = []
    for model, task in sorted({(test["model"], test["task"]) for test in tests}):
        guidances = {
            guidance
            for test in tests
            if (test["model"], test["task"]) == (model, task)
            for guidance in test["guidance"]
        }
        by_outcome: dict[tuple[str, ...], list[str]] = {}
        for guidance in sorted(guidances, key=compatibility.GUIDANCES.index):
            cells = tuple(compatibility.outcome(file, group, model, task, guidance) for file in files.values())
            by_outcome.setdefault(cells, []).append(guidance)
        lines += [[model, task, ", ".join(names), *cells] for cells, names in by_outcome.items()]
    return markdown(("model", "task", "guidance", *(f"diffusers {version}" for version in files)), lines, "---")


def _measured(environment: Mapping[str, Any]) -> str:
    threads = f", {environment['threads']} threads" if environment["device_type"] == "cpu" else ""
    return f"{environment['device']}{threads}, torch {environment['torch']}, commit `{environment['commit']}`"


def _sigma(sigma: str) -> str:
    return "∞" if sigma == "inf" else sigma


_ALL = {"official": "official", "separable": "separable", "dense": "dense", "flex": "FlexAttention", "auto": "segkern"}
TABLES: dict[str, Callable[[], str]] = {
    "evaluation": evaluation_summary,
    "unconditional": lambda: evaluation("unconditional", True),
    "prompts": lambda: evaluation("prompts", True),
    "family": lambda: comparison("family"),
    "approximations": lambda: comparison("approximations"),
    "steps": lambda: steps(["CFG + "]),
    "all-steps": lambda: steps(["", "CFG + "]),
    "real-steps": real_steps,
    "measurements": lambda: attention(["3", "10", "inf"], {"official": "official", "auto": "segkern"}),
    "attention": lambda: attention(["0.5", "1", "3", "10", "30", "inf"], _ALL),
    "compiled": compiled,
    "instructions": instructions,
    "launches": launches,
    "unets": lambda: models("UNets"),
    "transformers": lambda: models("Transformers"),
    "video": lambda: models("Video"),
}

# SPDX-License-Identifier: Apache-2.0
"""Tables of committed results in the README and the documentation, written by ``python -m benchmarks tables``.

A table replaces the text between ``<!-- name -->`` and ``<!-- /name -->``, where ``name`` is a key of ``TABLES``. The
text around it is written by hand.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compatibility, results
from benchmarks.cases import SDXL
from benchmarks.tables import markdown
from segkern.generation.loading import DEMO
from studies.evaluation import report
from studies.evaluation.settings import Setting

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/guidance.md", "docs/cost.md", "docs/how-it-works.md", "docs/models.md", "docs/energy.md")
_REAL = "sdxl-416x608"  # SDXL's own configuration, at the size that was measured on a CPU
_MODES = {"unconditional": "Without a prompt", "prompts": "With prompts"}
_BLOCK = re.compile(r"(<!-- ([a-z-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def fill(text: str) -> str:
    """Return the text of a page with all its tables rewritten.

    Raises:
        ValueError: If the page names an unknown table.
    """

    def written(block: re.Match[str]) -> str:
        if block[2] not in TABLES:
            raise ValueError(f"unknown table {block[2]!r}; known tables are {', '.join(TABLES)}")
        return f"{block[1]}\n{TABLES[block[2]]()}\n\n{block[3]}"

    return _BLOCK.sub(written, text)


def write() -> list[Path]:
    """Rewrite the tables of all pages and return the pages that changed."""
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
    """Return a table for each attention benchmark: times of SDXL's two layers, and ratios to plain attention."""
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
        headings = ("layer", "sigma", "plain attention", *(f"{name}, ratio" for name in providers.values()))
        parts += [f"{_measured(result['environment'])}, {dtype}:", markdown(headings, lines)]
    return "\n\n".join(parts)


def steps(prefixes: Sequence[str], sigmas: Sequence[str] = ("", "10", "inf")) -> str:
    """Return the cost of a guided step by layers and sigma: FLOPs on SDXL, and times next to the official algorithm."""
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
    measured_on = "; ".join(_measured(file["environment"]) for file in files)
    return f"{measured_on}:\n\n" + markdown(("guidance", "FLOPs on SDXL", *headings), lines)


def real_steps() -> str:
    """Return a table for each benchmark of Stable Diffusion XL's own configuration on a CPU."""
    parts = []
    for file in _step_files():
        if file["size"] != _REAL:
            continue
        lines = []
        for row in file["rows"]:
            ratio = row["cpu_ratio"]
            spread = f"{ratio['median']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})"
            counted = "" if row["counted"] is None else f"{row['counted']:.3f}"
            error = "" if row["error"] is None else f"{row['error']:.0e}"
            lines.append([row["way"], f"{row['cpu_ms']['median'] / 1e3:.1f} s", spread, counted, error])
        headings = ("run", "CPU time per step", "ratio to CFG", "FLOPs, ratio to CFG", "distance to official")
        measured = f"{_measured(file['environment'])}, {file['dtype']}, {file['rounds']} rounds"
        parts += [f"{measured}:", markdown(headings, lines)]
    return "\n\n".join(parts)


def _step_files() -> list[dict[str, Any]]:
    return [results.read_json(path) for path in sorted((results.RESULTS / "step").glob("*.json"))]


def _step_ratio(file: Mapping[str, Any], name: str) -> str:
    row = next((row for row in file["rows"] if row["way"] == name), None)
    return "" if row is None or row["ratio"] is None else f"{row['ratio']['median']:.2f}"


def approximations() -> str:
    """Return the table of ``studies.approximations``."""
    result = results.read_json(results.RESULTS / "approximations" / "demo.json")
    return "\n\n".join(_by_mode(result["rows"], result).values())


def equal_cost() -> str:
    """Return the tables of ``studies.equal_cost``: without a prompt, with prompts, and together with CFG."""
    rows = _equal_cost()
    tables = {
        "Without a prompt": [row for row in rows if row["setting"]["mode"] == "unconditional"],
        "With prompts, without CFG": [
            row for row in rows if row["setting"]["mode"] == "prompts" and row["setting"]["cfg"] <= 1
        ],
        "With prompts and CFG": [row for row in rows if row["setting"]["cfg"] > 1],
    }
    parts = []
    for title, shown in tables.items():
        baseline = "CFG" if shown[0]["setting"]["cfg"] > 1 else "none"
        headings = ["guidance", "steps", "cost", "Fréchet ↓", f"change from {baseline}", "precision ↑", "recall ↑"]
        if "caption_accuracy" in shown[0]["measures"]:
            headings += ["caption accuracy ↑", f"change from {baseline}"]
        lines = []
        for row in shown:
            change = row.get("to_cfg" if baseline == "CFG" else "to_unguided", {})
            line = [report.describe(report.setting_of(row)), str(row["steps"]), f"{row['cost']:.2f}"]
            for name, digits in (("frechet_distance", 2), ("caption_accuracy", 3)):
                if name in row["measures"]:
                    difference = change.get(name)
                    line.append(_mean_and_spread(row["measures"][name], digits))
                    line.append(_mean_and_spread(difference, digits, "+") if difference and row != shown[0] else "")
                if name == "frechet_distance":
                    line += [_mean_and_spread(row["measures"][measure], 3) for measure in ("precision", "recall")]
            lines.append(line)
        parts += [f"{title}:", markdown(headings, lines)]
    return "\n\n".join(parts)


def _equal_cost() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = results.read_json(results.RESULTS / "equal-cost" / "demo.json")["rows"]
    return rows


def _mean_and_spread(value: Mapping[str, float], digits: int, sign: str = "") -> str:
    return f"{value['mean']:{sign}.{digits}f} ± {value['spread']:.{digits}f}"


def _evaluation() -> dict[str, Any]:
    return report.read(DEMO / "evaluation.json")


def evaluation() -> str:
    """Return the verdict of the bundled model's evaluation, and a table of the main settings for each mode."""
    result = _evaluation()
    parts = [str(result["verdict"])]
    shown = report.short(result)
    rows = [row for row in result["rows"] if row in shown or (row["setting"]["cfg"] > 1 and row["setting"]["seg"])]
    for mode, table in _by_mode(rows, result).items():
        parts += [f"{_MODES[mode]}:", table]
    return "\n\n".join(parts)


def summary() -> str:
    """Return one paragraph on the paper's setting: distances without and with prompts, and captions."""
    settings = [(report.setting_of(row), row) for row in _evaluation()["rows"]]
    cells = {}
    for mode in _MODES:
        of_mode = [(setting, row) for setting, row in settings if setting.mode == mode]
        plain = next(row for setting, row in of_mode if report.describe(setting) == "none")
        guided = next(row for setting, row in of_mode if report.is_papers(setting) and math.isinf(setting.sigma))
        for column in report.COLUMNS:
            cells[mode, column[0]] = f"{report.cell(plain, column)} to {report.cell(guided, column)}"
    equal = [row for row in _equal_cost() if row["setting"]["mode"] == "unconditional"]
    by_method = {row["method"]: row for row in equal}
    at_equal_cost = [_mean_and_spread(by_method[name]["measures"]["frechet_distance"], 2) for name in ("none", "SEG")]
    return (
        "On the bundled model, SEG at the paper's setting (scale 3, infinite sigma, middle block, no CFG, 10 steps) "
        "changes the Fréchet\n"
        "distance to new images of the drawings (lower is better) from "
        f"{cells['unconditional', 'frechet_distance']} without a prompt, and\n"
        f"from {cells['prompts', 'frechet_distance']} with prompts. Caption accuracy changes from "
        f"{cells['prompts', 'caption_accuracy']}.\n"
        "More steps without guidance help as much here: at equal cost and without a prompt, the distance is "
        f"{at_equal_cost[0]} without\nguidance and {at_equal_cost[1]} with SEG. This holds for this model only "
        "([all measurements](docs/guidance.md#measured-on-the-bundled-model))."
    )


def scales(mode: str, name: str) -> str:
    """Return one measure of the bundled model's evaluation, a row for each sigma and a column for each scale."""
    column = next(column for column in report.COLUMNS if column[0] == name)
    cells = {}
    for row in report.of_mode(_evaluation()["rows"], mode):
        setting = report.setting_of(row)
        if setting.seg and setting == Setting(mode, 1.0, setting.seg, setting.sigma, "mid"):
            cells[setting.sigma, setting.seg] = report.cell(row, column)
    columns = sorted({scale for _, scale in cells})
    lines = [
        [_sigma(f"{sigma:g}"), *(cells.get((sigma, scale), "") for scale in columns)]
        for sigma in sorted({sigma for sigma, _ in cells})
    ]
    return markdown(("sigma", *(f"scale {scale:g}" for scale in columns)), lines)


def layers() -> str:
    """Return the Fréchet distance by layers and range of steps at infinite sigma, on the seed that the choice used."""
    cells: dict[str, dict[float, str]] = {}
    plain = ""
    for row in _evaluation()["selection"]:
        setting, distance = report.setting_of(row), f"{row['measures']['frechet_distance']['mean']:.2f}"
        if not setting.seg:
            plain = distance
        elif math.isinf(setting.sigma):
            steps = "" if (setting.start, setting.stop) == (0.0, 1.0) else f", {setting.start:g} to {setting.stop:g}"
            cells.setdefault(setting.layers + steps, {})[setting.seg] = distance
    columns = sorted(set.intersection(*(set(by_scale) for by_scale in cells.values())))
    lines = [[name, *(by_scale[scale] for scale in columns)] for name, by_scale in cells.items()]
    return f"Without guidance, the distance on this seed is {plain}.\n\n" + markdown(
        ("layers, range of steps", *(f"scale {scale:g}" for scale in columns)), lines
    )


def _by_mode(rows: Sequence[dict[str, Any]], result: Mapping[str, Any]) -> dict[str, str]:
    return {
        mode: report.table(report.of_mode(rows, mode), result.get("drawings"), result.get("held_out"))
        for mode in report.modes(rows)
    }


def compiled() -> str:
    """Return the resources that the compiled kernels use, a row for each target."""
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
    """Return instruction counts of the loops over keys in bfloat16, for segkern and two common kernel styles.

    Rows have head dimension 64, and on Hopper also 128.
    """
    from benchmarks.compiled_code import KINDS

    file = results.read_json(results.RESULTS / "compiled" / "kernels.json")
    lines = []
    for record in file["kernels"]:
        flags = record["flags"]
        wide = record["head_dim"] == 128 and record["target"] == "sm_90" and flags.get("DESCRIPTORS")
        if not (record["head_dim"] == 64 or wide) or record["dtype"] != "bf16" or not flags.get("EVEN_KEYS", True):
            continue
        ours = {True: "segkern, blurred in the prologue", False: "segkern, not blurred or blurred before"}
        others = {True: "FlexAttention style", False: "Triton tutorial style"}
        if record["kernel"] == "_unmasked_attention_kernel":
            name = ours[flags["PROLOGUE"]]
            if record["target"] == "sm_90" and not flags["DESCRIPTORS"]:
                name = "segkern, keys not aligned to 16 bytes"
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
    """Return the host time of the launches of a blurred call, a table for each file that has it."""
    parts = []
    for path in sorted((results.RESULTS / "host").glob("*.json")):
        file = results.read_json(path)
        if file.get("launches"):
            lines = [[row["call"], str(row["launches"]), f"{row['us']:.1f} us"] for row in file["launches"]]
            environment = f"{_measured(file['environment'])}, triton {file['environment']['triton']}"
            parts += [f"{environment}:", markdown(("batch of 3", "launches", "host"), lines)]
    return "\n\n".join(parts)


def statements() -> str:
    """Return how often the statements about attention's energy hold in the bundled model under the reflect boundary."""
    file = results.read_json(results.RESULTS / "energy" / "statements.json")
    reflect = file["boundaries"]["reflect"]
    columns = {
        "energy of a layer rises, per key": reflect["energy_by_key_rises"],
        "energy of a layer rises, per query": reflect["energy_by_query_rises"],
        "energy of a single query rises": reflect["a_querys_own_rises"],
        "determinant falls, paper's factor": reflect["determinant_paper"]["falls"],
        "determinant falls, chain rule's factor": reflect["determinant_chain"]["falls"],
    }
    lines = []
    for index, sigma in enumerate(file["sigmas"]):
        shares = [f"{100 * values[index]:.1f}%" for values in columns.values()]
        rise, left = reflect["energy_rise"][index], reflect["variance_left"][index]
        lines.append([_sigma(f"{sigma}".removesuffix(".0")), *shares, f"{rise:.3f}", f"{left:.3f}"])
    medians = "median rise of a query's energy, nats", "median share of a key's variance that remains"
    return markdown(("sigma", *columns, *medians), lines)


def models(group: str) -> str:
    """Return the outcomes of the tests that compare guidance on a group of models with another computation."""
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
    "summary": summary,
    "evaluation": evaluation,
    "scales": lambda: scales("unconditional", "frechet_distance"),
    "scales-prompts": lambda: scales("prompts", "frechet_distance"),
    "scales-captions": lambda: scales("prompts", "caption_accuracy"),
    "layers": layers,
    "equal-cost": equal_cost,
    "approximations": approximations,
    "steps": lambda: steps(["", "CFG + "]),
    "real-steps": real_steps,
    "attention": lambda: attention(["0.5", "1", "3", "10", "30", "inf"], _ALL),
    "compiled": compiled,
    "instructions": instructions,
    "launches": launches,
    "statements": statements,
    "unets": lambda: models("UNets"),
    "transformers": lambda: models("Transformers"),
    "video": lambda: models("Video"),
}

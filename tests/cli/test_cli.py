# SPDX-License-Identifier: Apache-2.0
"""The console script: help, versions, layers, explanation of attention calls, and missing packages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from segkern.cli.app import app
from segkern.generation.demo import PROMPTED, UNCONDITIONAL
from segkern.generation.loading import DEMO, find_device, find_model
from segkern.generation.pictures import difference_image
from segkern.version import __version__
from tests.cli.cli_tools import done, picture, refusal


def test_the_commands_are_those_that_are_tested() -> None:
    names = {command.callback.__name__ for command in app.registered_commands}
    assert names == set(COMMANDS)
    assert done("--version") == f"segkern {__version__}\n"


COMMANDS = ("generate", "layers", "energy", "info", "demo", "ui")


def test_help_is_fast_to_import_and_plain() -> None:
    """Help needs no PyTorch, fits 80 columns and shows no type for flags."""
    code = f"""
import sys
from typer.testing import CliRunner
from segkern.cli.app import app

for command in {COMMANDS}:
    print(CliRunner().invoke(app, [command, "--help"]).output)
print(CliRunner().invoke(app, ["--help"]).output)
heavy = ("torch", "numpy", "diffusers", "transformers", "triton", "gradio", "matplotlib", "huggingface_hub")
print("heavy:", [name for name in heavy if name in sys.modules])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, heavy = process.stdout.splitlines()
    assert heavy == "heavy: []"
    assert max(map(len, text)) <= 80
    assert sum(line.startswith("Usage:") for line in text) == len(COMMANDS) + 1
    assert "bool" not in process.stdout.lower()
    listed = [line for line in text if re.match(r"  (generate|layers|energy|info|demo|ui)  ", line)]
    assert len(listed) == len(COMMANDS)
    assert not [line for line in listed if line.endswith("...")], "the first sentence of a command is short"


def test_layers_lists_every_layer_with_its_grid() -> None:
    output = done("layers", "demo", "--width", "96", "--height", "64")
    assert re.search(r"m0 +16x24 +2x64 +m0\.0 +mid_block\.attentions\.0", output)
    assert re.search(r"d0 +16x24 +2x64", output)
    assert re.search(r"m0 .* 16x16 ", done("layers", DEMO))
    assert re.search(r"Default layers of SEG, PAG, SLG and TPG: mid \(1 layer\)\nSource: the method's paper", output)


def test_info_explains_one_attention() -> None:
    output = done("info", "--shape", "64x64", "--sigma", "10", "--arch", "sm_90")
    assert "separate kernel before the attention" in output
    assert "61 x 61 taps, separable" in output
    assert "128 queries x 128 keys, 8 warps" in output
    assert "prologue of the attention kernel" in done(
        "info", "--shape", "16x16", "--sigma", "0.5", "--arch", "sm_90", "--heads", "8"
    )
    assert "1 of 988: the mean query" in done("info", "--shape", "26x38")
    assert "torch: " in done("info", "--shape", "64x64", "--sigma", "10", "--device", "cpu")


def test_info_explains_one_attention_for_any_option_of_it() -> None:
    assert "25 x 25 taps" in done("info", "--sigma", "4", "--device", "cpu")
    assert "64x64 tokens, 8 heads" in done("info", "--heads", "8", "--device", "cpu")
    assert "sm_89" in done("info", "--arch", "sm_89")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--shape", "64"), ["--shape", "'64'", "64x64"]),
        (("--shape", "0x64"), ["--shape", "'0x64'"]),
        (("--sigma", "-1"), ["--sigma", "-1"]),
        (("--sigma", "nan"), ["--sigma", "nan"]),
        (("--arch", "sm_1"), ["--arch", "'sm_1'", "sm_90", "gfx942"]),
        (("--report", "--sigma", "1"), ["--report", "--sigma", "not both"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_info_refuses_wrong_options_in_one_line(arguments: tuple[str, ...], words: list[str]) -> None:
    message = refusal("info", *arguments)
    for word in words:
        assert word in message


def test_info_names_versions_and_backends() -> None:
    output = done("info")
    for words in (__version__, torch.__version__, "SDXL mid", "SD 1.5", "160", "bf16"):
        assert words in output
    assert ("No CUDA device" in output) == (not torch.cuda.is_available())


def test_demo(tmp_path: Path) -> None:
    """The tiles of a seed are the images of ``segkern generate`` and their difference."""
    out = tmp_path / "new" / "folder"
    output = done("demo", "--steps", "2", "--out", out)
    images, prompts = len(UNCONDITIONAL), len(PROMPTED)
    assert re.search(rf"no guidance +{images} ", output)
    assert re.search(rf"SEG sigma inf +{images} +\d+\.\d +m0 \d+\.\d% +\d+\.\d%", output)
    assert re.search(rf"CFG 3 \+ SEG sigma inf +{prompts} ", output)
    for name in ("demo.png", "demo-prompts.png"):
        assert picture(out / name).text["seg_sigma"] == "inf"
        assert f"wrote {out / name}" in output
    assert picture(out / "demo.png").text["seed"] == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12"
    assert picture(out / "demo.png").width == 6 * 256 + 5 * 16 + 2 * 32
    assert PROMPTED[1].prompt in picture(out / "demo-prompts.png").text["prompt"]
    evaluation = json.loads((DEMO / "evaluation.json").read_text(encoding="utf-8"))
    assert evaluation["verdict"] in output
    chosen = next(row for row in evaluation["rows"] if row["setting"] == evaluation["chosen"])
    distance = chosen["measures"]["frechet_distance"]
    assert f"{distance['mean']:.2f} ± {distance['spread']:.2f}" in output
    assert "exists" in refusal("demo", "--steps", "2", "--out", out)

    sheet = picture(out / "demo.png").convert("RGB")
    seed = 2  # the second half of the first row
    options = ("--steps", "2", "--guidance-scale", "1", "--seed", seed)
    pair = []
    for guidance in ("none", "seg"):
        done("generate", "demo", "", *options, "--guidance", guidance, "--out", tmp_path / f"{guidance}.png")
        pair.append(picture(tmp_path / f"{guidance}.png").convert("RGB"))
    expected = [*pair, difference_image(*pair).convert("RGB")]
    for column, image in enumerate(expected, start=3):
        left = 32 + column * (256 + 16)
        tops = [top for top in range(sheet.height - 256) if sheet.getpixel((left, top)) == image.getpixel((0, 0))]
        tile = image.resize((256, 256), Image.Resampling.NEAREST).tobytes()
        assert any(sheet.crop((left, top, left + 256, top + 256)).tobytes() == tile for top in tops[:200])


@pytest.mark.parametrize(
    "command", [("info",), ("info", "--sigma", "4"), ("layers", "demo"), ("layers", "SDXL")], ids=" ".join
)
def test_tables_fit_80_columns(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if command[-1] == "SDXL":
        shutil.copytree(DEMO, tmp_path / "sdxl", ignore=shutil.ignore_patterns("*.safetensors"))
        config = json.loads((tmp_path / "sdxl" / "unet" / "config.json").read_text())
        config |= {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "sample_size": 128,
        }
        (tmp_path / "sdxl" / "unet" / "config.json").write_text(json.dumps(config))
        command = ("layers", str(tmp_path / "sdxl"))
        rows = [line for line in done(*command).splitlines() if "transformer_blocks" in line]
        assert len(rows) == 70
        assert all(line.rstrip().endswith("attn1") for line in rows), "no name is broken"
    lines = [line.rstrip() for line in done(*command).splitlines() if not line.startswith(("Reason:", "Source:"))]
    assert max(map(len, lines)) <= 80


def test_hub_names_are_recognised_without_asking_the_hub() -> None:
    source = find_model("stabilityai/stable-diffusion-xl-base-1.0")
    assert (source.kind, source.weights) == ("hub", "stabilityai/stable-diffusion-xl-base-1.0")
    assert find_device("auto").type in ("cpu", "cuda")


def test_missing_packages_are_one_line() -> None:
    """Hide one package after another from the same process."""
    code = """
import contextlib, importlib.util, io, json, sys
import torch  # before numpy is hidden, because torch warns if numpy is missing
from segkern.cli import main

hidden = set()
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in hidden else real(name, *rest)

def run(*arguments, without):
    hidden.clear()
    hidden.update(without)
    for name in [name for name in sys.modules if name.startswith("segkern.") or name.split(".")[0] in hidden]:
        del sys.modules[name]
    sys.argv = ["segkern", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main()
        except SystemExit as exit:
            code = exit.code
    return code or 0, out.getvalue(), err.getvalue()

answers = {name: run("layers", "demo", without=[name]) for name in ("typer", "rich", "PIL", "diffusers")}
everything = ["typer", "rich", "PIL", "triton", "diffusers", "transformers", "numpy", "gradio"]
answers["report"] = run("info", "--report", without=everything)
print(json.dumps(answers))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout)
    exit_code, report, errors = answers.pop("report")
    assert (exit_code, errors) == (0, "")
    assert "the package triton is not installed" in report
    assert "unknown" not in report
    for package, (exit_code, _, errors) in answers.items():
        name = {"PIL": "pillow"}.get(package, package)
        assert (exit_code, errors) == (2, f'segkern: {name} is not installed; pip install "segkern[cli]"\n')

# SPDX-License-Identifier: Apache-2.0
"""The command line on the bundled checkpoint: what it writes, prints and refuses."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from segkern.generation.loading import DEMO, find_device, find_model
from segkern.generation.pictures import difference
from segkern.version import __version__
from studies.evaluation import report
from tests.cli.cli_tools import done, picture, refusal, segkern
from tests.cli.single_file_checkpoint import write_single_file

PROMPT = "a large red ring"
SMALL = ("--width", "64", "--height", "48", "--steps", "2", "--device", "cpu")


def generate(out: Path, *arguments: object, model: object = "demo") -> Image.Image:
    done("generate", model, PROMPT, *SMALL, "--out", out, *arguments)
    return picture(out).convert("RGB")


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided picture with everything at its default."""
    out = tmp_path_factory.mktemp("guided") / "a.png"
    generate(out)
    return out


def test_picture_holds_its_settings(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    generate(out, "--negative-prompt", "grün", "--sigma", "4", "--scale", "2.5", "--layers", "mid,u0-1", "--seed", "7")
    image = picture(out)
    assert image.size == (64, 48)
    text = dict(image.text)
    for package in ("torch", "diffusers"):
        assert text.pop(package)
    assert text == {
        "model": "demo",
        "prompt": PROMPT,
        "negative_prompt": "grün",
        "seed": "7",
        "steps": "2",
        "width": "64",
        "height": "48",
        "guidance_scale": "5.0",
        "dtype": "float32",
        "guidance": "SEG",
        "seg_scale": "2.5",
        "seg_sigma": "4",
        "seg_layers": "mid,u0-1",
        "seg_start": "0.0",
        "seg_stop": "1.0",
        "seg_boundary": "reflect",
        "seg_query_stride": "1",
        "seg_reuse": "1",
        "segkern": __version__,
    }


def test_same_seed_gives_the_same_picture(guided: Path, tmp_path: Path) -> None:
    first = picture(guided)
    assert difference(first, generate(tmp_path / "again.png")) == 0
    assert difference(first, generate(tmp_path / "other.png", "--seed", "2")) > 1


def test_guidance_changes_the_picture(guided: Path, tmp_path: Path) -> None:
    plain = generate(tmp_path / "plain.png", "--no-guidance")
    assert difference(picture(guided), plain) > 1
    assert picture(tmp_path / "plain.png").text["guidance"] == "none"


def test_no_guidance_is_the_stock_pipeline(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(DEMO).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    stock = pipe(PROMPT, width=64, height=48, num_inference_steps=2, guidance_scale=5.0, generator=noise).images[0]
    assert difference(stock, generate(tmp_path / "plain.png", "--no-guidance")) == 0


def test_report_is_printed(tmp_path: Path) -> None:
    output = done("generate", "demo", PROMPT, *SMALL, "--out", tmp_path / "a.png")
    assert re.search(r"sigma infinity . m0 +. 2 of 2 . \d+\.\d% . mid_block\.", output)
    assert "wrote" in output


def test_a_picture_says_its_query_stride(tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    done("generate", "demo", PROMPT, *SMALL, "--sigma", "2", "--query-stride", "2,3", "--out", out)
    assert picture(out).text["seg_query_stride"] == "2,3"


def test_guidance_that_never_acts_is_said(tmp_path: Path) -> None:
    output = done("generate", "demo", PROMPT, *SMALL, "--scale", "0", "--out", tmp_path / "a.png")
    assert "warning: SEG(scale=0.0" in output
    assert "fired in none of 2 forwards" in output


def test_compare_is_one_picture_with_different_tiles(tmp_path: Path) -> None:
    strong = ("--scale", "9")
    sheet = generate(tmp_path / "sheet.png", "--compare", "--sigmas", "1,inf", *strong)
    width, height, unit = 4 * 64, 4 * 48, 16  # 64 pixels are enlarged to 256, letters have 16
    label, margin = 24, 2 * unit
    assert sheet.width == 2 * margin + 3 * width + 2 * unit
    top = sheet.height - margin - label - height
    corners = [(margin + column * (width + unit), top) for column in range(3)]
    tiles = [sheet.crop((x, y, x + width, y + height)) for x, y in corners]
    for i in range(3):
        for j in range(i):
            assert difference(tiles[i], tiles[j]) > 1
    plain, mean_query = (generate(tmp_path / f"{i}.png", *o) for i, o in enumerate([["--no-guidance"], strong]))
    for tile, alone in ((tiles[0], plain), (tiles[2], mean_query)):
        assert difference(tile, alone.resize((width, height), Image.Resampling.NEAREST)) == 0
    assert picture(tmp_path / "sheet.png").text["seg_sigma"] == "1, inf"


def test_other_formats_are_written_without_settings(tmp_path: Path) -> None:
    output = done("generate", "demo", PROMPT, *SMALL, "--out", tmp_path / "a.jpg")
    assert "only PNG keeps the settings" in output
    assert picture(tmp_path / "a.jpg").size == (64, 48)


def test_layers_lists_every_layer_with_its_grid() -> None:
    output = done("layers", "demo", "--width", "96", "--height", "64")
    assert re.search(r"m0 +. mid +. 2 +. 64 +. 16x24 +. \d+\.\d% +. m0\.0 +. mid_block\.attentions\.0", output)
    assert re.search(r"d0 +. down . 2 +. 64 +. 16x24", output)
    assert re.search(r"m0 .* 16x16 ", done("layers", DEMO))
    assert re.search(r"SEG and PAG act in mid \(1 layer, \d+\.\d% of the FLOPs\); the method's paper", output)


def test_info_explains_one_attention() -> None:
    output = done("info", "--shape", "64x64", "--sigma", "10", "--arch", "sm_90")
    assert "by the separable kernel, before" in output
    assert "61 x 61 taps, one axis after the other" in output
    assert "128 queries x 64 keys, 8 warps" in output
    assert "in the prologue" in done("info", "--shape", "32x32", "--sigma", "0.5", "--arch", "sm_90", "--heads", "20")
    assert "1 of 988: the mean query" in done("info", "--shape", "26x38")
    coarse = done("info", "--shape", "64x64", "--sigma", "10", "--query-stride", "4", "--device", "cpu")
    assert "289 of 4096, interpolated" in coarse
    assert "torch: " in coarse


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--shape", "64"), ["--shape", "'64'", "64x64"]),
        (("--shape", "64x64", "--sigma", "-1"), ["sigma", "-1"]),
        (("--shape", "64x64", "--arch", "hopper"), ["'hopper'", "sm_90"]),
        (("--shape", "64x64", "--heads", "0"), ["heads", "0"]),
        (("--shape", "64x64", "--query-stride", "0"), ["query_stride", "0"]),
        (("--shape", "0x64"), ["0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_shape_is_one_line(arguments: tuple[str, ...], words: list[str]) -> None:
    message = refusal("info", *arguments)
    for word in words:
        assert word in message


def test_info_names_versions_and_backends() -> None:
    output = done("info")
    for words in (__version__, torch.__version__, "SDXL mid", "SD 1.5", "160", "bf16"):
        assert words in output
    assert ("no CUDA device" in output) == (not torch.cuda.is_available())


def test_version() -> None:
    assert done("--version") == f"segkern {__version__}\n"


def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    output = done("demo", "--steps", "1", "--out", out)
    assert output.count("without guidance") == 8
    assert output.count("sigma infinity") == 8
    assert re.search(r"96 x 64, seed \d+. +. sigma 5 +. (torch|triton) +. \d+\.\d +. m0 \d+\.\d%", output)
    for name in ("demo.png", "demo-unconditional.png"):
        sheet = picture(out / name)
        assert sheet.width == 6 * 288 + 5 * 18 + 2 * 36
        assert sheet.text["seg_sigma"] == "1, 2, 5, 10, inf"
        assert f"wrote {out / name}" in output
    assert "six yellow stars" in picture(out / "demo.png").text["prompt"]
    assert "exists" in refusal("demo", "--steps", "1", "--out", out)


@pytest.mark.slow
def test_demo_shows_the_committed_evaluation(tmp_path: Path) -> None:
    output = done("demo", "--steps", "1", "--out", tmp_path)
    found = report.read(DEMO / "evaluation.json")
    assert found["verdict"] in output
    for row in report.short(found):
        assert report.cell(row, report.COLUMNS[0]) in output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--sigma", "wide"), ["'wide'", "inf"]),
        (("--sigma", "-1"), ["-1.0", "sigma"]),
        (("--sigma", "nan"), ["nan"]),
        (("--sigma", "1,4"), ["'1,4'", "--compare"]),
        (("--scale", "inf"), ["inf", "finite"]),
        (("--layers", "middle"), ["'middle'", "'mid' (m0)"]),
        (("--layers", "u0-99"), ["'u0-99'"]),
        (("--start", "0.6", "--stop", "0.5"), ["start=0.6", "stop=0.5"]),
        (("--boundary", "zero"), ["'zero'", "reflect"]),
        (("--backend", "cuda"), ["'cuda'", "'triton'"]),
        (("--backend", "triton", "--dtype", "bf16"), ["triton", "cannot"]),
        (("--query-stride", "auto"), ["'auto'", "2,3"]),
        (("--query-stride", "2,3,4"), ["'2,3,4'"]),
        (("--query-stride", "0"), ["query_stride", "got 0"]),
        (("--dtype", "int8"), ["'int8'", "bf16"]),
        (("--device", "toaster"), ["'toaster'", "cpu"]),
        (("--device", "cuda:99"), ["'cuda:99'", "cpu"]),
        (("--device", "meta"), ["'meta'", "cpu"]),
        (("--width", "100"), ["100", "multiple of 8", "96"]),
        (("--height", "0"), ["0", "multiple of 8"]),
        (("--compare", "--sigmas", "1,1"), ["1 comes twice"]),
        (("--compare", "--no-guidance"), ["--no-guidance"]),
        (("--compare", "--sigma", "4"), ["--sigmas", "'4'"]),
        (("--sigmas", "1,4"), ["--compare"]),
        (("--out", "a.docx"), ["'.docx'", ".png"]),
        (("--out", "a"), ["no suffix", ".png"]),
        (("--out", "no/such/a.png"), ["no/such/a.png", "does not exist"]),
        (("--config", "demo"), ["config 'demo'", "'demo' is not a file"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_option_is_one_line(
    arguments: tuple[str, ...], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal("generate", "demo", PROMPT, "--device", "cpu", *arguments)
    for word in words:
        assert word in message
    assert not list(tmp_path.iterdir())


def test_refuses_to_overwrite(guided: Path) -> None:
    before = guided.read_bytes()
    assert "--overwrite" in refusal("generate", "demo", PROMPT, *SMALL, "--out", guided)
    assert guided.read_bytes() == before
    generate(guided, "--overwrite")


@pytest.mark.parametrize("command", [("generate", PROMPT), ("layers",)], ids=lambda command: command[0])
def test_wrong_model_is_one_line(command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "model_index.json").write_text("{}")
    (tmp_path / "old.ckpt").write_bytes(b"pickle")
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    save_file({"model.diffusion_model.x": torch.zeros(1)}, tmp_path / "part.safetensors")
    for model, words in {
        "no/such/folder": "'no/such/folder'",
        "nothing.safetensors": "'nothing.safetensors'",
        "empty": "model_index.json",
        "bare": "no denoiser's configuration",
        "old.ckpt": ".safetensors",
        "torn.safetensors": "not a readable",
        "part.safetensors": "lacks the autoencoder, the first text encoder, the second text encoder",
    }.items():
        assert words in refusal(command[0], model, *command[1:])


def test_real_errors_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("segkern.cli.generate.draw_all", broken)
    result = segkern("generate", "demo", PROMPT, *SMALL, "--out", tmp_path / "a.png")
    assert isinstance(result.exception, ValueError)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "one.safetensors"
    write_single_file(DEMO, path)
    return path


def test_single_file_gives_the_picture_of_its_folder(single_file: Path, tmp_path: Path) -> None:
    # Without weights in the folder, so that none can come from there.
    described = shutil.copytree(DEMO, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    image = generate(tmp_path / "a.png", "--config", described, model=single_file)
    assert difference(image, generate(tmp_path / "b.png", model=DEMO)) == 0
    assert picture(tmp_path / "a.png").text["model"] == "one.safetensors"
    assert "m0" in done("layers", single_file, "--config", described)


def test_single_file_holds_all_weights(single_file: Path) -> None:
    parts = [load_file(path) for path in DEMO.rglob("*.safetensors")]
    open_clip = load_file(DEMO / "text_encoder_2" / "model.safetensors")
    packed = sum("k_proj" in key or "v_proj" in key for key in open_clip)
    assert len(load_file(single_file)) == sum(map(len, parts)) - packed


def test_single_file_needs_a_fitting_config(single_file: Path, tmp_path: Path) -> None:
    assert "model_index.json" in refusal("layers", single_file, "--config", tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "StableDiffusionPipeline" in refusal("layers", single_file, "--config", tmp_path)
    assert "'not//a name'" in refusal("layers", single_file, "--config", "not//a name")


def test_hub_names_are_recognised_without_asking_the_hub() -> None:
    source = find_model("stabilityai/stable-diffusion-xl-base-1.0")
    assert (source.kind, source.weights) == ("hub", "stabilityai/stable-diffusion-xl-base-1.0")
    assert find_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("package", ["typer", "rich", "PIL", "diffusers"])
def test_missing_package_is_one_line(package: str) -> None:
    """In a process of its own, where the package cannot be found."""
    code = f"""
import importlib.util, sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == {package!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hide())
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {package!r} else found(name, *rest)
sys.argv = ["segkern", "layers", "demo"]
from segkern.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    told = {"PIL": "pillow"}.get(package, package)
    assert result.stderr == f'segkern: {told} is not installed; pip install "segkern[cli]"\n'

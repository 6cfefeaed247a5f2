# SPDX-License-Identifier: Apache-2.0
"""``segkern generate`` on the bundled checkpoint: the pictures it writes, its report and its refusals."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from segkern.generation.loading import DEMO
from segkern.generation.pictures import difference
from segkern.version import __version__
from tests.cli.cli_tools import done, picture, refusal, segkern
from tests.cli.single_file_checkpoint import write_single_file

PROMPT = "a large red ring"
SMALL = ("--width", "64", "--height", "48", "--steps", "2", "--device", "cpu")
PLAIN = ("--guidance", "none")


def generate(out: Path, *arguments: object, model: object = "demo") -> Image.Image:
    done("generate", model, PROMPT, *SMALL, "--out", out, *arguments)
    return picture(out).convert("RGB")


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guided picture with everything at its default."""
    out = tmp_path_factory.mktemp("guided") / "a.png"
    generate(out)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without guidance."""
    out = tmp_path_factory.mktemp("plain") / "a.png"
    generate(out, *PLAIN)
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
        "segkern": __version__,
    }


def test_seed_and_guidance_make_the_picture(guided: Path, plain: Path, tmp_path: Path) -> None:
    first = picture(guided)
    output = done("generate", "demo", PROMPT, *SMALL, "--out", tmp_path / "again.png")
    assert difference(first, picture(tmp_path / "again.png")) == 0
    assert re.search(r"CFG 5 \+ SEG sigma inf . m0 +. 2 of 2 . \d+\.\d% . mid_block\.", output)
    assert f"wrote {tmp_path / 'again.png'}" in output
    assert difference(first, generate(tmp_path / "other.png", "--seed", "2")) > 1
    assert difference(first, picture(plain)) > 1
    assert picture(plain).text["guidance"] == "none"


def test_guidance_none_is_the_stock_pipeline(plain: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(DEMO).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(1)
    stock = pipe(PROMPT, width=64, height=48, num_inference_steps=2, guidance_scale=5.0, generator=noise).images[0]
    assert difference(stock, picture(plain)) == 0


@pytest.mark.one_in(3)
@pytest.mark.parametrize("names", ["pag", "sag", "seg,pag"])
def test_each_guidance_draws_its_own_picture(names: str, tmp_path: Path) -> None:
    plain = generate(tmp_path / "plain.png", *PLAIN, "--steps", "4")
    scale = ("--pag-scale", "2") if "pag" in names else ()
    options = ("--guidance", names, *scale, "--schedule", "linear", "--steps", "4", "--overwrite")
    output = done("generate", "demo", PROMPT, *SMALL, *options, "--out", tmp_path / "a.png")
    assert difference(plain, picture(tmp_path / "a.png").convert("RGB")) > 0
    text = picture(tmp_path / "a.png").text
    assert text["guidance"] == names.upper().replace(",", " + ")
    assert text[f"{names.split(',')[-1]}_schedule"] == "linear"
    assert text.get("pag_scale") == ("2.0" if "pag" in names else None)
    assert ("seg_sigma" in text) == ("seg" in names)
    assert all(name.upper() in output for name in names.split(","))


def test_guidance_that_never_acts_is_said(tmp_path: Path) -> None:
    output = done("generate", "demo", PROMPT, *SMALL, "--scale", "0", "--out", tmp_path / "a.jpg")
    assert "warning: SEG(scale=0.0" in output
    assert "fired in none of 2 denoiser calls" in output
    assert "only PNG keeps the settings" in output
    assert picture(tmp_path / "a.jpg").size == (64, 48)


def test_compare_is_one_picture_with_different_tiles(plain: Path, tmp_path: Path) -> None:
    strong = ("--scale", "9")
    sheet = generate(tmp_path / "sheet.png", "--compare", "--sigma", "1,inf", *strong)
    width, height, unit = 4 * 64, 4 * 48, 16  # 64 pixels are enlarged to 256, letters have 16
    label, margin = 24, 2 * unit
    assert sheet.width == 2 * margin + 3 * width + 2 * unit
    top = sheet.height - margin - label - height
    corners = [(margin + column * (width + unit), top) for column in range(3)]
    tiles = [sheet.crop((x, y, x + width, y + height)) for x, y in corners]
    for i in range(3):
        for j in range(i):
            assert difference(tiles[i], tiles[j]) > 1
    mean_query = generate(tmp_path / "mean.png", *strong)
    for tile, alone in ((tiles[0], picture(plain)), (tiles[2], mean_query)):
        assert difference(tile, alone.resize((width, height), Image.Resampling.NEAREST)) == 0
    assert picture(tmp_path / "sheet.png").text["seg_sigma"] == "1, inf"


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
        (("--dtype", "int8"), ["'int8'", "bf16"]),
        (("--device", "toaster"), ["'toaster'", "cpu"]),
        (("--device", "cuda:99"), ["'cuda:99'", "cpu"]),
        (("--device", "meta"), ["'meta'", "cpu"]),
        (("--width", "100"), ["100", "multiple of 8", "96"]),
        (("--height", "0"), ["0", "multiple of 8"]),
        (("--compare", "--sigma", "1,1"), ["1 comes twice"]),
        (("--guidance", "seg,cfg"), ["guidance takes some of seg, pag, sag with commas, or none, got 'cfg'"]),
        (("--guidance", "pag", "--sigma", "4"), ["--sigma 4 is of seg, which is not in --guidance pag"]),
        (("--guidance", "pag", "--scale", "9"), ["seg has the scale 9 but is not in guidance pag"]),
        (("--guidance", "none", "--compare"), ["--compare is of seg, which is not in --guidance none"]),
        (("--guidance", "none", "--layers", "up"), ["--layers up is for a guidance that is not in --guidance none"]),
        (("--guidance", "none", "--stop", "0.5"), ["--stop 0.5 is for a guidance that is not in --guidance none"]),
        (("--guidance", "sag", "--layers", "up"), ["--layers up is for a guidance that is not in --guidance sag"]),
        (("--guidance", "pag", "--schedule", "wavy"), ["PAG.schedule must be one of"]),
        (("--sag-scale", "7"), ["sag has the scale 7 but is not in guidance seg"]),
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

    monkeypatch.setattr("segkern.cli.generate.draw_with_progress", broken)
    result = segkern("generate", "demo", PROMPT, *SMALL, "--out", tmp_path / "a.png")
    assert isinstance(result.exception, ValueError)


@pytest.fixture(scope="module")
def single_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "one.safetensors"
    write_single_file(DEMO, path)
    return path


def test_single_file_gives_the_picture_of_its_folder(single_file: Path, guided: Path, tmp_path: Path) -> None:
    # Without weights in the folder, so that none can come from there.
    described = shutil.copytree(DEMO, tmp_path / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    image = generate(tmp_path / "a.png", "--config", described, model=single_file)
    assert difference(image, picture(guided)) == 0
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

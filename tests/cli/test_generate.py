# SPDX-License-Identifier: Apache-2.0
"""``segkern generate`` with the bundled model: its images, its report and its errors."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from segkern.generation.demo import PROMPTED
from segkern.generation.loading import DEMO
from segkern.generation.pictures import difference
from segkern.integrations.diffusers import SEG, guide
from segkern.version import __version__
from tests.cli.cli_tools import done, picture, refusal, segkern
from tests.cli.single_file_checkpoint import write_single_file
from tests.cli.small_transformer import save_small_sd3

PROMPT = PROMPTED[0].prompt
SMALL = ("--width", "64", "--height", "48", "--steps", "2", "--device", "cpu")
PLAIN = ("--guidance", "none")


def generate(out: Path, *arguments: object, model: object = "demo") -> Image.Image:
    done("generate", model, PROMPT, *SMALL, "--out", out, *arguments)
    return picture(out).convert("RGB")


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a guided image with the default options."""
    out = tmp_path_factory.mktemp("guided") / "a.png"
    generate(out)
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image without guidance, with the same seed."""
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
    assert text.pop("parameters").splitlines() == [
        PROMPT,
        "Negative prompt: grün",
        "Steps: 2, Sampler: Euler, CFG scale: 5, Seed: 7, Size: 64x48, Model: demo, SEG scale: 2.5, SEG sigma: 4, "
        'SEG layers: "mid,u0-1", SEG start: 0.0, SEG stop: 1.0',
    ]
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
        "scheduler": "EulerDiscreteScheduler",
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
    assert re.search(r"CFG 5 \+ SEG sigma inf +m0 +2 of 2 +\d+\.\d%", output)
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
@pytest.mark.parametrize("names", ["pag", "sag", "seg,pag", "slg", "pag,tpg"])
def test_each_guidance_draws_its_own_picture(names: str, tmp_path: Path) -> None:
    plain = generate(tmp_path / "plain.png", *PLAIN, "--steps", "6")
    scale = ("--pag-scale", "2") if "pag" in names else ()
    options = ("--guidance", names, *scale, "--schedule", "linear", "--steps", "6", "--overwrite")
    output = done("generate", "demo", PROMPT, *SMALL, *options, "--out", tmp_path / "a.png")
    assert difference(plain, picture(tmp_path / "a.png").convert("RGB")) > 0
    text = picture(tmp_path / "a.png").text
    assert text["guidance"] == names.upper().replace(",", " + ")
    assert text[f"{names.split(',')[-1]}_schedule"] == "linear"
    assert text.get("pag_scale") == ("2.0" if "pag" in names else None)
    assert ("seg_sigma" in text) == ("seg" in names)
    assert all(name.upper() in output for name in names.split(","))
    layers = {name: text.get(f"{name}_layers") for name in names.split(",") if name != "sag"}
    assert set(layers.values()) <= {"mid"}


def test_skipped_blocks_have_their_own_scale_range_and_layers(tmp_path: Path) -> None:
    plain = generate(tmp_path / "plain.png", *PLAIN, "--steps", "6")
    options = ("--guidance", "slg,tpg", "--slg-scale", "2", "--tpg-scale", "1", "--layers", "mid,u0", "--steps", "6")
    assert difference(plain, generate(tmp_path / "a.png", *options).convert("RGB")) > 0
    text = picture(tmp_path / "a.png").text
    settings = {"guidance": "SLG + TPG", "slg_scale": "2.0", "slg_start": "0.01", "slg_stop": "0.2"}
    settings |= {"tpg_scale": "1.0", "tpg_stop": "1.0", "slg_layers": "mid,u0", "tpg_layers": "mid,u0"}
    assert {name: text[name] for name in settings} == settings
    assert "SLG" in text["parameters"]
    generate(tmp_path / "b.png", *options, "--stop", "0.5")
    given = picture(tmp_path / "b.png")
    assert (given.text["slg_start"], given.text["slg_stop"], given.text["tpg_stop"]) == ("0.0", "0.5", "0.5")


def test_one_warning_if_guidance_has_no_effect(tmp_path: Path) -> None:
    output = done("generate", "demo", PROMPT, *SMALL, "--scale", "0", "--out", tmp_path / "a.jpg")
    assert "warning: SEG had no effect: it fired in none of 2 denoiser calls\n" in output
    assert "without its settings" in output
    assert picture(tmp_path / "a.jpg").size == (64, 48)
    scales: tuple[object, ...] = ("--guidance", "seg,pag,sag,slg,tpg", "--scale", 0)
    scales += ("--pag-scale", 0, "--sag-scale", 0, "--slg-scale", 0, "--tpg-scale", 0)
    for options in (scales, ("--compare", "--sigma", "1,2,4", "--scale", 0)):
        result = segkern("generate", "demo", PROMPT, *SMALL, *options, "--out", tmp_path / "b.png", "--overwrite")
        assert result.stderr.count("had no effect") == 1, result.stderr
    several = done("generate", "demo", PROMPT, *SMALL, *scales, "--out", tmp_path / "c.png")
    assert "warning: SEG, PAG, SAG, SLG and TPG had no effect: they fired in none" in several


def test_words_that_the_bundled_model_does_not_know(tmp_path: Path) -> None:
    out = ("--overwrite", "--out", tmp_path / "a.png")
    result = segkern("generate", "demo", f"{PROMPT.title()}, Jabberwock", *SMALL, "--negative-prompt", "naïve", *out)
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert "does not know the words naïve, jabberwock; it knows prompts such as " in warning
    assert all(subject.prompt in warning for subject in PROMPTED)
    for prompt in (f"A {PROMPTED[1].prompt.upper()}.", *(subject.prompt for subject in PROMPTED[2:])):
        assert segkern("generate", "demo", prompt, *SMALL, *out).stderr == ""
    other = shutil.copytree(DEMO, tmp_path / "other")
    assert segkern("generate", other, "a jabberwock", *SMALL, *out).stderr == ""


def test_progress_without_a_terminal_is_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkern.cli.terminal.PROGRESS_SECONDS", 0.0)
    result = segkern("generate", "demo", PROMPT, *SMALL, "--compare", "--sigma", "4", "--out", tmp_path / "a.png")
    assert result.stderr.splitlines() == [
        "image 1 of 2, CFG 5: step 1 of 2",
        "image 1 of 2, CFG 5: step 2 of 2",
        "image 2 of 2, CFG 5 + SEG sigma 4: step 1 of 2",
        "image 2 of 2, CFG 5 + SEG sigma 4: step 2 of 2",
    ]


def test_compare_is_one_picture_with_different_tiles(plain: Path, tmp_path: Path) -> None:
    strong = ("--scale", "9")
    sheet = generate(tmp_path / "sheet.png", "--compare", "--sigma", "1,inf", *strong)
    width, height, unit = 4 * 64, 4 * 48, 16  # 64 pixels are enlarged to 256; the text size is 16
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
    text = picture(tmp_path / "sheet.png").text
    assert text["seg_sigma"] == "1, inf"
    assert "parameters" not in text


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--sigma", "wide"), ["'wide'", "inf"]),
        (("--sigma", "-1"), ["--sigma must be", "got -1"]),
        (("--sigma", "nan"), ["--sigma must be", "nan"]),
        (("--sigma", "1,4"), ["'1,4'", "--compare"]),
        (("--scale", "inf"), ["--scale must be a finite number, got inf"]),
        (("--layers", "middle"), ["--layers: unknown layer 'middle'", "'mid' (m0)", "segkern layers lists"]),
        (("--layers", "u0-99"), ["--layers", "'u0-99'"]),
        (("--start", "0.6", "--stop", "0.5"), ["--start 0.6", "--stop 0.5"]),
        (("--dtype", "int8"), ["--dtype", "'int8'", "bf16"]),
        (("--device", "toaster"), ["--device 'toaster'", "cpu"]),
        (("--device", "cuda:99"), ["'cuda:99'", "cpu"]),
        (("--device", "meta"), ["'meta'", "cpu"]),
        (("--width", "100"), ["--width", "100", "multiple of 8", "96"]),
        (("--height", "0"), ["--height", "0", "multiple of 8"]),
        (("--compare", "--sigma", "1,1"), ["--sigma contains 1 twice"]),
        (("--guidance", "seg,cfg"), ["--guidance accepts seg, pag, sag, slg, tpg", "got 'cfg'"]),
        (("--guidance", "pag", "--sigma", "4"), ["--sigma 4 has no effect", "--guidance pag"]),
        (("--guidance", "pag", "--scale", "9"), ["--scale 9 has no effect", "--guidance pag"]),
        (("--guidance", "none", "--compare"), ["--compare has no effect", "--guidance none"]),
        (("--guidance", "none", "--layers", "up"), ["--layers up has no effect with --guidance none"]),
        (("--guidance", "none", "--stop", "0.5"), ["--stop 0.5 has no effect with --guidance none"]),
        (("--guidance", "sag", "--layers", "up"), ["--layers up has no effect with --guidance sag"]),
        (("--guidance", "pag", "--schedule", "wavy"), ["--schedule must be constant, linear or cosine, got 'wavy'"]),
        (("--tpg-scale", "7"), ["--tpg-scale 7 has no effect without tpg", "--guidance seg"]),
        (("--guidance", "slg", "--layers", "x"), ["--layers: unknown layer 'x'"]),
        (("--sag-scale", "7"), ["--sag-scale 7 has no effect", "--guidance seg"]),
        (("--guidance", "pag", "--pag-scale", "nan"), ["--pag-scale must be a finite number, got nan"]),
        (("--guidance-scale", "inf"), ["--guidance-scale must be a finite number, got inf"]),
        (("--out", "a.docx"), ["'.docx'", ".png"]),
        (("--out", "a"), ["no suffix", ".png"]),
        (("--out", "no/such/a.png"), ["no/such/a.png", "does not exist"]),
        (("--config", "demo"), ["configuration 'demo'", "'demo' is not a file"]),
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
        "bare": "no configuration of a denoiser",
        "old.ckpt": ".safetensors",
        "torn.safetensors": "not a readable",
        "part.safetensors": "it lacks the autoencoder, the first text encoder, the second text encoder",
    }.items():
        assert words in refusal(command[0], model, *command[1:])


@pytest.mark.parametrize("reason", [ConnectionError("no route"), RuntimeError("no such host")], ids=repr)
def test_a_hub_name_fails_without_retries_if_the_hub_cannot_be_reached(
    reason: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: object, **options: object) -> None:
        raise reason

    def retry(seconds: float) -> None:
        raise AssertionError("waits for another attempt")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("time.sleep", retry)
    message = refusal("layers", "nobody/no-such-model")
    assert "cannot reach the Hugging Face Hub, and 'nobody/no-such-model' is not in the local cache" in message
    assert str(reason) in message


def test_unknown_names_on_the_hub_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    class NotFound(RepositoryNotFoundError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def unknown(*arguments: object, **options: object) -> None:
        raise NotFound

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unknown)
    assert "the Hugging Face Hub has no model 'nobody/no-such-model'" in refusal("layers", "nobody/no-such-model")


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
    # The folder has no weights, so all weights come from the file.
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


def test_a_transformer(tmp_path: Path) -> None:
    """Default layers and CFG scale are those of the pipeline, and the image is the one that ``guide`` gives."""
    model = tmp_path / "sd3"
    save_small_sd3(model)
    options = ("--width", "64", "--height", "48", "--steps", "2", "--seed", "3", "--device", "cpu")
    output = done("generate", model, "a", *options, "--out", tmp_path / "a.png")
    assert re.search(r"CFG 7 \+ SEG sigma inf +b2 +2 of 2", output)
    image = picture(tmp_path / "a.png")
    assert (image.text["seg_layers"], image.text["guidance_scale"]) == ("2", "7.0")
    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with guide(pipe, SEG(3.0)):
        generator = torch.Generator().manual_seed(3)
        expected = pipe("a", width=64, height=48, num_inference_steps=2, generator=generator).images[0]
    assert image.convert("RGB").tobytes() == expected.tobytes()


def test_sag_of_a_transformer_is_refused(tmp_path: Path) -> None:
    save_small_sd3(tmp_path / "sd3")
    out = tmp_path / "a.png"
    message = refusal("generate", tmp_path / "sd3", "a", "--guidance", "sag", "--device", "cpu", "--out", out)
    assert "SAG" in message
    assert "SD3Transformer2DModel" in message

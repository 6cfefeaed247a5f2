# SPDX-License-Identifier: Apache-2.0
"""The playground without a browser: form, models and runs."""

from __future__ import annotations

import itertools
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from PIL import Image

from segkern.generation import loading
from segkern.generation.demo import PROMPTED
from segkern.generation.drawing import ImageRequest, default_layers, image_metadata
from segkern.generation.pictures import difference, difference_image
from segkern.generation.sizes import image_size
from segkern.integrations.diffusers import PAG, SAG, SEG, SLG, TPG
from segkern.playground import choices
from segkern.playground.form import Settings, read
from segkern.playground.models import MOST_LOADED, Models
from segkern.playground.presets import PRESETS
from segkern.playground.runs import Progress, Run, RunResult, Stopped, generate
from segkern.playground.snippet import snippet
from tests.cli.cli_tools import done, picture
from tests.cli.small_transformer import save_small_sd3
from tests.diffusers.transformer_cases import MODELS

CPU = torch.device("cpu")
DEMO = loading.find_model("demo")
FIELDS: dict[str, Any] = {
    "prompt": PROMPTED[0].prompt,
    "negative_prompt": "",
    "seed": 2,
    "steps": 2,
    "guidance_scale": "3",
    "size": "64 x 48",
    "guidances": ["SEG"],
    "sigma": "inf",
    "seg_scale": "3",
    "pag_scale": "3",
    "sag_scale": "0.75",
    "slg_scale": "2.8",
    "tpg_scale": "3",
    "layers": ["mid"],
    "start": 0,
    "stop": 1,
    "energy": False,
    "unshared": False,
}


@pytest.fixture(scope="module")
def models() -> Models:
    loading.quiet_libraries()
    loaded = Models(CPU, torch.float32)
    loaded.load(DEMO)
    return loaded


def settings(models: Models, **fields: Any) -> Settings:
    return read(FIELDS | fields, models.describe(DEMO), CPU, torch.float32)


def ignore(*step: Any) -> None:
    pass


@dataclass(frozen=True)
class Everything:
    """A run with every option."""

    settings: Settings
    result: RunResult
    steps: list[Progress]


@pytest.fixture(scope="module")
def everything(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Everything:
    fields = {
        "guidances": ["SEG", "PAG", "SAG", "SLG", "TPG"],
        "sigma": "4",
        "layers": ["mid", "u0-1"],
        "negative_prompt": 'grün "x"',
    }
    asked = settings(models, **fields, stop=0.5, energy=True, unshared=True)
    steps: list[Progress] = []
    folder = tmp_path_factory.mktemp("runs")
    return Everything(asked, generate(Run(DEMO, asked), models, folder, steps.append), steps)


def test_slider_is_logarithmic_and_ends_at_infinity() -> None:
    sigmas = [choices.sigma_at(place) for place in range(choices.LAST + 1)]
    assert [choices.position_of(sigma) for sigma in sigmas] == list(range(choices.LAST + 1))
    assert sigmas[-1] == math.inf
    ratios = [after / before for before, after in itertools.pairwise(sigmas[:-1])]
    assert all(abs(ratio - ratios[0]) < 0.02 for ratio in ratios)
    assert choices.position_of(1e-9) == 0
    assert choices.position_of(1e9) == choices.LAST - 1


def pipe_of(sample_size: int | tuple[int, int], factor: int) -> Any:
    unet = SimpleNamespace(config=SimpleNamespace(sample_size=sample_size))
    return SimpleNamespace(unet=unet, vae_scale_factor=factor)


def test_sizes_of_sdxl_are_its_buckets() -> None:
    offered = choices.sizes(pipe_of(128, 8))
    assert offered[:3] == ["1024 x 1024", "1152 x 896", "896 x 1152"]
    assert {"1216 x 832", "832 x 1216", "1344 x 768", "1536 x 640", "640 x 1536"} < set(offered)


@pytest.mark.parametrize("sample_size, factor", [(16, 4), (64, 8), (96, 8), ((8, 12), 8)], ids=str)
def test_sizes_of_other_models_have_about_the_same_shapes(sample_size: Any, factor: int) -> None:
    pipe = pipe_of(sample_size, factor)
    offered = [tuple(map(int, size.split(" x "))) for size in choices.sizes(pipe)]
    own = image_size(pipe, None, None)
    assert offered[0] == own
    assert len(set(offered)) == len(offered) >= 5
    for width, height in offered:
        assert image_size(pipe, width, height) == (width, height)
        assert 0.6 < width * height / (own[0] * own[1]) < 1.25
        assert 0.35 < width / height < 2.8


def test_form_becomes_a_request_and_guidance(models: Models) -> None:
    fields = {"guidances": ["SAG", "SEG", "PAG"], "sigma": " 4 ", "seg_scale": "2.5", "pag_scale": 1, "sag_scale": "-1"}
    checked = settings(models, **fields, layers=["mid, u0-1", "d0"], start=0.25, stop=0.5, energy=True, seed=7.0)
    assert checked.request == ImageRequest(PROMPTED[0].prompt, "", 64, 48, 7, 2, 3.0)
    layers, part = ["mid", "u0-1", "d0"], {"start": 0.25, "stop": 0.5}
    assert checked.specs == (
        SAG(-1.0, **part),
        SEG(2.5, 4.0, layers, **part),
        PAG(1.0, layers, **part),
    )
    blocks = {"guidances": ["TPG", "SLG"], "tpg_scale": "1.5", "slg_scale": "2"}
    assert settings(models, **blocks, start=0.25).specs == (
        TPG(1.5, ["mid"], 0.25, 1.0),
        SLG(2.0, ["mid"], 0.25, 1.0),
    )
    assert settings(models, **blocks).specs == (TPG(1.5, ["mid"]), SLG(2.0, ["mid"], 0.01, 0.2))
    assert checked.layers == ("d0", "m0", "u0", "u1")
    assert not checked.unshared


def test_only_fields_of_chosen_kinds_are_read(models: Models) -> None:
    checked = settings(models, guidances=["SAG"], sigma="wide", seg_scale="", pag_scale="", layers=["x9"])
    assert checked.specs == (SAG(0.75),)
    assert settings(models, guidances=["PAG"], sigma="wide").specs == (PAG(3.0, ["mid"]),)


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"sigma": "-1"}, ["SEG sigma must be 0 or greater, or inf", "'-1'"]),
        ({"sigma": "wide"}, ["SEG sigma must be a number", "'wide'"]),
        ({"sigma": None}, ["SEG sigma must be a number", "''"]),
        ({"sigma": "nan"}, ["SEG sigma must be a number", "'nan'"]),
        ({"size": "512 x 768"}, ["Size 512 x 768", "16 times the model's default 64 x 64"]),
        ({"layers": ["x9"]}, ["unknown layer 'x9'", "'mid' (m0)", "'up' (u0 to u1)", "select layers from the list"]),
        ({"layers": []}, ["Layers: select at least one layer"]),
        ({"size": "100 x 64"}, ["Size: width must be a positive multiple of 8", "96", "100"]),
        ({"size": "64 x 0"}, ["Size: height must be a positive multiple of 8", "got 0"]),
        ({"size": "large"}, ["Size must be width x height", "'large'", "832 x 1216"]),
        ({"start": 0.6, "stop": 0.5}, ["Start must be less than Stop", "0.6 and 0.5"]),
        ({"start": 0.5, "stop": 0.5}, ["Start must be less than Stop", "0.5 and 0.5"]),
        ({"guidances": []}, ["Guidance: select at least one of SEG, PAG, SAG, SLG, TPG", "none"]),
        ({"guidances": ["SEG", "XYZ"]}, ["Guidance: select at least one", "SEG, XYZ"]),
        ({"steps": 0}, ["Steps must be a whole number from 1 to 1000", "'0'"]),
        ({"steps": 2.5}, ["Steps", "'2.5'"]),
        ({"steps": 1e9}, ["Steps must be a whole number from 1 to 1000", "'1000000000'"]),
        ({"steps": None}, ["Steps", "''"]),
        ({"seed": -1}, ["Seed", "'-1'"]),
        ({"seed": 2**32}, ["Seed", "4294967295", "'4294967296'"]),
        ({"seg_scale": "large"}, ["SEG scale must be a number", "'large'"]),
        ({"seg_scale": "inf"}, ["SEG scale must be a finite number", "'inf'"]),
        ({"guidances": ["PAG"], "pag_scale": ""}, ["PAG scale must be a number", "''"]),
        ({"guidances": ["TPG"], "tpg_scale": "x"}, ["TPG scale must be a number", "'x'"]),
        ({"guidances": ["SAG"], "sag_scale": "x"}, ["SAG scale must be a number", "'x'"]),
        ({"guidance_scale": "nan"}, ["CFG scale", "'nan'"]),
        ({"guidance_scale": "inf"}, ["CFG scale must be a finite number", "'inf'"]),
        ({"guidance_scale": "much"}, ["CFG scale", "'much'"]),
    ],
    ids=str,
)
def test_invalid_fields_are_named_by_their_labels(models: Models, fields: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the words are below
        settings(models, **fields)
    for words in expected:
        assert words in str(caught.value)
    for python in ("--", "SEG.", "list_layers", "start=", "guidance_scale"):
        assert python not in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_valid_settings(models: Models, preset: Any) -> None:
    scales = {"seg_scale": preset.seg_scale, "pag_scale": preset.pag_scale}
    checked = settings(models, guidances=preset.guidances, sigma=preset.sigma, **scales)
    assert tuple(type(spec).__name__ for spec in checked.specs) == preset.guidances


def test_official_preset_is_the_default_of_the_method() -> None:
    preset = PRESETS[0]
    assert (float(preset.seg_scale), float(preset.sigma)) == (SEG().scale, SEG().sigma)


def test_images_contain_their_settings(models: Models, everything: Everything) -> None:
    asked, result = everything.settings, everything.result
    for path, specs in ((result.before, ()), (result.after, asked.specs)):
        wanted = image_metadata(DEMO, asked.request, specs, torch.float32, EulerDiscreteScheduler())
        text = dict(picture(path).text)
        assert "Steps: 2, Sampler: Euler, CFG scale: 3, Seed: 2, Size: 64x48, Model: demo" in text.pop("parameters")
        assert text == {name: str(value) for name, value in wanted.items()}
    assert picture(result.after).text["guidance"] == "SEG + PAG + SAG + SLG + TPG"
    assert picture(result.before).text["guidance"] == "none"


def test_images_equal_those_of_the_command_line(everything: Everything, tmp_path: Path) -> None:
    usual = ("--seed", "2", "--steps", "2", "--guidance-scale", "3", "--width", "64", "--height", "48")
    words = ("generate", "demo", PROMPTED[0].prompt, "--negative-prompt", 'grün "x"', "--device", "cpu", *usual)
    done(*words, "--guidance", "none", "--out", tmp_path / "plain.png")
    guided = ("--guidance", "seg,pag,sag,slg,tpg", "--sigma", "4", "--layers", "mid,u0-1", "--stop", "0.5")
    done(*words, *guided, "--out", tmp_path / "guided.png")
    assert difference(picture(everything.result.before), picture(tmp_path / "plain.png")) == 0
    assert difference(picture(everything.result.after), picture(tmp_path / "guided.png")) == 0
    assert difference(picture(everything.result.after), picture(everything.result.before)) > 0


def image_of(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(folder)
    exec(program, {})
    return picture(folder / "guided.png")


def test_snippet_generates_the_image_again(
    everything: Everything, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = image_of(everything.result.snippet, tmp_path, monkeypatch)
    assert again.tobytes() == picture(everything.result.after).tobytes()
    assert re.search(r"u1 +1 ", capsys.readouterr().out)


def test_snippet_names_a_folder_or_file_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    monkeypatch.chdir(loading.DEMO.parent)
    asked = settings(models)
    text = snippet(loading.find_model("demo/"), asked.request, {}, asked.specs, torch.float32, CPU)
    assert "find_model('demo')" in text or f"find_model('{loading.DEMO}')" in text
    hub = snippet(
        loading.find_model("owner/name"), asked.request, {}, asked.specs, torch.float16, torch.device("cuda", 1)
    )
    assert "load_pipeline(find_model('owner/name'), torch.float16, torch.device('cuda:1'))" in hub
    file = loading.Source("a.safetensors", "file", "a.safetensors", str(loading.DEMO))
    single = snippet(file, asked.request, {}, asked.specs, torch.float32, CPU)
    assert f"find_model('{loading.DEMO.parent}/a.safetensors', '{loading.DEMO}')" in single


def test_progress_counts_the_steps_that_the_user_set(everything: Everything) -> None:
    names = ["CFG 3", everything.result.captions[1], f"{everything.result.captions[1]}, branch in full"]
    expected = [Progress(name, run, 4, step, 2) for run, name in enumerate(names, 1) for step in (1, 2)]
    assert everything.steps[:6] == expected
    assert [progress.name for progress in everything.steps[6:]] == ["attention energy"] * 2


def test_progress_of_a_scheduler_that_calls_the_denoiser_twice(models: Models, tmp_path: Path) -> None:
    from diffusers import HeunDiscreteScheduler

    pipe, steps = models.load(DEMO), []
    before = pipe.scheduler
    pipe.scheduler = HeunDiscreteScheduler.from_config(before.config)
    try:
        generate(Run(DEMO, settings(models, steps=3)), models, tmp_path, steps.append)
    finally:
        pipe.scheduler = before
    assert [progress.step for progress in steps] == [1, 2, 2, 3, 3] * 2
    assert {progress.steps for progress in steps} == {3}


def test_captions_report_times_and_map(everything: Everything) -> None:
    result = everything.result
    assert result.captions == ("CFG 3", "CFG 3 + SEG sigma 4 + PAG 3 + SAG 0.75 + SLG 2.8 + TPG 3")
    assert [row[0] for row in result.timing] == [*result.captions, f"{result.captions[1]}, branch in full"]
    assert all(float(row[1]) > 0 for row in result.timing)
    assert result.headings == ["guidance", "layer", "fired", "moved", "module"]
    assert [row[:3] for row in result.report[:3]] == [["SEG", name, "1 of 2"] for name in ("m0", "u0", "u1")]
    assert [row[0] for row in result.report] == ["SEG"] * 3 + ["PAG"] * 3 + ["SAG"] + ["SLG"] * 3 + ["TPG"] * 3
    assert [problem.partition(";")[0] for problem in result.problems] == [
        "The bundled model does not know the words grün, x"
    ]
    assert result.maps is not None
    assert picture(result.maps).height > picture(result.maps).width / 2  # three layers in one column


def test_difference_image(everything: Everything) -> None:
    result = everything.result
    before, after, shown = (picture(path) for path in (result.before, result.after, result.difference))
    assert result.mean_difference == difference(before, after)
    assert shown.tobytes() == difference_image(before, after, choices.CONTRAST).tobytes()
    one, other = (Image.new("RGB", (1, 1), (level,) * 3) for level in (100, 110))
    assert difference_image(one, other, 4).getpixel((0, 0)) == 255 - 40
    assert difference_image(one, Image.new("RGB", (1, 1)), 4).getpixel((0, 0)) == 0


def test_unknown_words_are_reported(models: Models, tmp_path: Path) -> None:
    result = generate(Run(DEMO, settings(models, prompt="a jabberwock")), models, tmp_path, ignore)
    assert [problem.partition(";")[0] for problem in result.problems] == [
        "The bundled model does not know the word jabberwock"
    ]


def test_unselected_measurements_are_not_run(models: Models, tmp_path: Path) -> None:
    steps: list[Any] = []
    result = generate(Run(DEMO, settings(models, seg_scale="0")), models, tmp_path, steps.append)
    assert len(steps) == 4
    assert result.maps is None
    assert len(result.timing) == 2
    assert len(result.problems) == 1
    assert difference(picture(result.after), picture(result.before)) == 0


def test_without_sharing_the_branch_is_computed_in_full(models: Models, tmp_path: Path) -> None:
    batches: list[int] = []
    conv_in = models.load(DEMO).unet.conv_in
    handle = conv_in.register_forward_pre_hook(lambda module, given: batches.append(len(given[0])))
    try:
        generate(Run(DEMO, settings(models, unshared=True)), models, tmp_path, ignore)
    finally:
        handle.remove()
    assert batches == [2, 2, 2, 2, 3, 3]


def parts(pipe: Any) -> tuple[Any, ...]:
    modules = list(pipe.unet.modules())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in modules]
    return list(pipe.unet.attn_processors.values()), hooks


@pytest.mark.parametrize("at", [0, 3, 7], ids=lambda at: f"step {at}")
def test_a_stopped_run_leaves_the_pipeline_as_it_was(models: Models, everything: Everything, at: int) -> None:
    pipe = models.load(DEMO)
    before = parts(pipe)
    run, counted = Run(DEMO, everything.settings), []
    if at == 0:
        run.stop()

    def count(progress: Progress) -> None:
        counted.append(progress)
        if len(counted) == at:
            run.stop()

    with pytest.raises(Stopped):
        generate(run, models, Path("/nowhere"), count)
    assert len(counted) == at
    after = parts(pipe)
    assert all(one is other for one, other in zip(before[0], after[0], strict=True))
    assert before[1] == after[1]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the models that were loaded."""
    loaded: list[str] = []

    def load(source: loading.Source, *others: Any) -> str:
        loaded.append(source.name)
        if source.name == "a/bad":
            raise RuntimeError("a tensor is torn")
        return f"pipeline of {source.name}"

    monkeypatch.setattr(loading, "load_pipeline", load)
    return loaded


def test_models_are_loaded_once_and_the_latest_are_kept(counted: list[str]) -> None:
    models = Models(CPU, torch.float32)
    for name in ("a/1", "a/2", "a/1", "a/2", "a/1"):
        assert models.load(loading.find_model(name)) == f"pipeline of {name}"
    assert counted == ["a/1", "a/2"]
    assert MOST_LOADED == 2
    models.load(loading.find_model("a/3"))  # replaces a/2
    models.load(loading.find_model("a/1"))
    assert counted == ["a/1", "a/2", "a/3"]
    models.load(loading.find_model("a/2"))
    assert counted == ["a/1", "a/2", "a/3", "a/2"]


def test_a_damaged_model_is_refused_and_the_old_one_stays(counted: list[str]) -> None:
    models = Models(CPU, torch.float32)
    models.load(loading.find_model("a/1"))
    with pytest.raises(ValueError, match="'a/bad' cannot be loaded: a tensor is torn"):
        models.load(loading.find_model("a/bad"))
    models.load(loading.find_model("a/1"))
    assert counted == ["a/1", "a/bad"]


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> loading.Source:
    folder = tmp_path_factory.mktemp("sd3")
    save_small_sd3(folder)
    return loading.find_model(str(folder))


def test_a_transformer_generates_images(
    models: Models, transformer: loading.Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = models.describe(transformer)
    assert choices.sizes(pipe)[0] == "64 x 64"
    assert choices.guidances(pipe) == ["SEG", "PAG", "SLG", "TPG"]
    assert default_layers(pipe) == ["2"]
    assert ("b3", "b3") in choices.layers(pipe)
    fields = FIELDS | {"guidances": ["SEG", "PAG", "TPG"], "layers": ["2"], "negative_prompt": "blue", "energy": True}
    asked = read(fields, pipe, CPU, torch.float32)
    assert asked.layers == ()  # no energy maps of transformers
    steps: list[Progress] = []
    result = generate(Run(transformer, asked), models, tmp_path, steps.append)
    assert result.captions == ("CFG 3", "CFG 3 + SEG sigma inf + PAG 3 + TPG 3")
    assert [(progress.run, progress.step) for progress in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert picture(result.after).size == (64, 48)
    assert result.mean_difference > 0
    assert [row[1:3] for row in result.report] == [["b2", "2 of 2"]] * 3
    again = image_of(result.snippet, tmp_path, monkeypatch)
    assert again.tobytes() == picture(result.after).tobytes()


def test_sag_of_a_transformer_is_refused(models: Models, transformer: loading.Source) -> None:
    with pytest.raises(ValueError, match="select at least one of SEG, PAG, SLG, TPG, got SAG"):
        read(FIELDS | {"guidances": ["SAG"]}, models.describe(transformer), CPU, torch.float32)


def test_a_model_for_videos_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "describe_pipeline", lambda source: MODELS["wan"].build())
    with pytest.raises(ValueError, match="'a/video' generates videos"):
        models.describe(loading.find_model("a/video"))


def test_a_pipeline_with_an_optional_image_is_accepted(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "describe_pipeline", lambda source: MODELS["flux2-klein"].build())
    described = models.describe(loading.find_model("a/flux2"))
    fields = FIELDS | {"size": "96 x 64", "layers": ["b1"], "guidances": ["SEG"]}
    assert read(fields, described, CPU, torch.float32).request.width == 96
    with pytest.raises(ValueError, match="Negative prompt must be empty, because a Flux2KleinPipeline accepts none"):
        read(fields | {"negative_prompt": "blue"}, described, CPU, torch.float32)


@pytest.mark.parametrize("name", ["StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_a_pipeline_for_another_task_is_refused(name: str, models: Models, tmp_path: Path) -> None:
    shutil.copytree(loading.DEMO, tmp_path / "a", ignore=shutil.ignore_patterns("*.safetensors"))
    index = tmp_path / "a" / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionXLPipeline", name))
    with pytest.raises(ValueError, match=f"{name}, which works on an input image"):
        models.describe(loading.find_model(str(tmp_path / "a")))


def test_a_model_that_cannot_be_guided_is_refused(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "describe_pipeline", lambda source: SimpleNamespace())
    with pytest.raises(ValueError, match="'a/other' cannot be guided"):
        models.describe(loading.find_model("a/other"))

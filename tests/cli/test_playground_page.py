# SPDX-License-Identifier: Apache-2.0
"""The page of the playground without a browser: actions of its buttons."""

from __future__ import annotations

import asyncio
import re
import shutil
import urllib.parse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segkern.generation import loading
from segkern.generation.demo import PROMPTED
from segkern.generation.pictures import difference
from segkern.playground.models import Models
from segkern.playground.presets import PRESETS
from tests.cli.cli_tools import picture
from tests.cli.small_transformer import save_small_sd3

DEMO = loading.find_model("demo")


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from segkern.playground.page import Playground

    loading.quiet_libraries()
    models = Models(torch.device("cpu"), torch.float32)
    models.load(DEMO)

    async def build() -> Playground:  # gradio makes an event loop, and leaves it open, where none is running
        return Playground(models, "demo", "", tmp_path_factory.mktemp("pictures"))

    return asyncio.run(build())


def fields(playground: Any, **changes: Any) -> list[Any]:
    """Return the values of a new page, with few steps and no energy map."""
    values = {name: component.value for name, component in playground._fields.items()}
    return list((values | {"steps": 2, "energy": False} | changes).values())


def take(playground: Any, session: str = "one", model: str = "demo", **changes: Any) -> list[Any]:
    request = SimpleNamespace(session_hash=session)
    return playground._take(request, DEMO, model, "", *fields(playground, **changes))


def skipped(update: Any) -> bool:
    return isinstance(update, dict) and "value" not in update and update.get("__type__") == "update"


def shown(playground: Any, updates: dict[Any, Any]) -> dict[str, Any]:
    """Return updates by the names of the components."""
    named = playground._results | playground._controls | playground._fields
    names = {component: name for name, component in named.items()}
    return {names[component]: update for component, update in updates.items()}


def last_shown(playground: Any, ticket: str) -> dict[str, Any]:
    """Return the last updates of a run."""
    return shown(playground, list(playground._run(ticket))[-1])


def files(html: str) -> list[Path]:
    """Return the files that HTML refers to, without repetitions."""
    addresses = re.findall(r'(?:src|href)="gradio_api/file=([^"]*)"', html)
    return list(dict.fromkeys(Path(urllib.parse.unquote(path)) for path in addresses))


def test_every_field_has_a_unique_label(playground: Any) -> None:
    others = playground._controls
    inputs = [*playground._fields.values(), others["sigma_slider"], others["model"], others["config"]]
    labels = [component.label for component in inputs]
    assert all(labels)
    assert len(set(labels)) == len(labels)


def test_no_usage_reports_sharing_or_public_api(playground: Any) -> None:
    config = playground.blocks.get_config_file()
    assert playground.blocks.analytics_enabled is False
    assert config["analytics_enabled"] is False
    served = [action for action in config["dependencies"] if action["backend_fn"]]
    assert len(served) >= 8
    assert {action["api_visibility"] for action in served} == {"private"}


def test_one_pipeline_draws_or_loads_at_a_time(playground: Any) -> None:
    functions = {action.fn.__name__: action for action in playground.blocks.fns.values() if action.fn is not None}
    for name in ("_run", "_load"):
        assert (functions[name].concurrency_limit, functions[name].concurrency_id) == (1, "pipeline")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"sigma": "<b>"}, "SEG sigma must be a number, got &#x27;&lt;b&gt;&#x27;"),
        ({"model": "a/b"}, "&#x27;a/b&#x27;"),
    ],
    ids=["field", "model that is not loaded"],
)
def test_an_error_changes_only_the_message(playground: Any, changes: dict[str, Any], words: str) -> None:
    ticket, message, *buttons = take(playground, **changes)
    assert words in message
    assert 'role="alert"' in message
    assert all(map(skipped, [ticket, *buttons]))
    assert not playground._runs


def test_a_second_click_during_a_run_changes_nothing(playground: Any) -> None:
    ticket, *_ = take(playground)
    assert all(map(skipped, take(playground, seed=2)))
    assert list(playground._runs) == [ticket]
    request = SimpleNamespace(session_hash="one")
    assert [button["interactive"] for button in playground._buttons(request)] == [False, True]
    assert "Generated in" in last_shown(playground, ticket)["message"]
    (again,) = playground._run(ticket)  # the page may send it twice
    assert all(map(skipped, again.values()))
    assert [button["interactive"] for button in playground._buttons(request)] == [True, False]
    assert not skipped(take(playground)[0])
    playground._runs.clear()


def test_two_pages_get_their_own_images(playground: Any) -> None:
    tickets = [take(playground, name, seed=seed)[0] for name, seed in (("one", 1), ("two", 2))]
    results = {}
    for ticket in reversed(tickets):
        *steps, last = [shown(playground, updates) for updates in playground._run(ticket)]
        assert [set(step) for step in steps] == [{"message"}] * 4
        assert "Run 2 of 2" in steps[-1]["message"]
        assert "step 2 of 2" in steps[-1]["message"]
        assert 'max="4" value="4"' in steps[-1]["message"]
        results[ticket] = last
    images = [[picture(path) for path in files(results[ticket]["pair"])] for ticket in tickets]
    assert [after.text["seed"] for _, after in images] == ["1", "2"]
    assert difference(images[0][0], images[1][0]) > 1
    assert not playground._runs


def test_only_the_first_step_of_each_run_is_announced(playground: Any) -> None:
    *steps, _ = [shown(playground, updates)["message"] for updates in playground._run(take(playground)[0])]
    assert ['role="status"' in step for step in steps] == [True, False, True, False]


def test_all_results_are_shown(playground: Any) -> None:
    last = last_shown(playground, take(playground, energy=True, guidances=["SEG", "PAG"], guidance_scale="3")[0])
    assert last.keys() == {*playground._results, "message"}
    before, after = files(last["pair"])
    assert ">Before: CFG 3<" in last["pair"]
    assert ">After: CFG 3 + SEG sigma inf + PAG 3<" in last["pair"]
    assert 'alt="After guidance: CFG 3 + SEG sigma inf + PAG 3"' in last["pair"]
    assert f'download="{after.name}"' in last["pair"]
    assert files(last["divided"]) == [before, after]
    assert 'type="range"' in last["divided"]
    assert files(last["difference"])[0].name == "segkern-difference-seed-1.png"
    assert re.search(r"\d+\.\d of 255 levels", last["difference"])
    assert files(last["maps"])[0].exists()
    assert "m0" in last["report"]
    assert "<th" in last["timing"]
    assert "guide(" in last["snippet"]


def test_without_cfg_the_captions_say_so(playground: Any) -> None:
    last = last_shown(playground, take(playground)[0])  # a new page of the bundled model uses no CFG
    assert ">Before: no guidance<" in last["pair"]
    assert ">After: SEG sigma inf<" in last["pair"]


def test_history_restores_settings_and_images(playground: Any) -> None:
    session = SimpleNamespace(session_hash="history")
    first = {"prompt": "a <b>", "sigma": "4", "seed": 7, "layers": ["u0"], "guidances": ["SEG", "PAG"]}
    earlier = last_shown(playground, take(playground, "history", **first)[0])
    later = last_shown(playground, take(playground, "history", guidance_scale="3")[0])
    (newest,), (oldest,) = later["history"]["samples"]
    assert "CFG 3 + SEG sigma inf" in newest
    assert "a &lt;b&gt;" in oldest
    assert "SEG scale 3, PAG scale 3, seed 7, 2 steps" in oldest
    assert 'src="data:image/png;base64,' in oldest
    restored = shown(playground, playground._restore(session, 1, DEMO))
    assert restored["pair"] == earlier["pair"]
    assert restored["report"] == earlier["report"]
    assert {name: restored[name] for name in first} == first
    assert restored["sigma_slider"] == 16
    assert (restored["model"], restored["config"]) == ("demo", "")
    assert "Restored the settings of SEG sigma 4 + PAG 3.<" in restored["message"]
    other = shown(playground, playground._restore(session, 1, loading.find_model("a/other")))
    assert "Click Load under Model to use demo again." in other["message"]
    assert set(playground._fields) < set(restored)
    again = last_shown(playground, take(playground, "history", **{n: restored[n] for n in playground._fields})[0])
    assert picture(files(again["pair"])[1]).tobytes() == picture(files(earlier["pair"])[1]).tobytes()


def test_history_belongs_to_one_page_and_ends_with_it(playground: Any) -> None:
    last = last_shown(playground, take(playground, "mine")[0])
    file = files(last["pair"])[0]
    for session, index in (("other", 0), ("mine", 1), ("mine", -1)):
        message = shown(playground, playground._restore(SimpleNamespace(session_hash=session), index, DEMO))
        assert message.keys() == {"message"}
        assert "no longer available" in message["message"]
    playground._leave(SimpleNamespace(session_hash="other"))
    assert file.exists()
    mine = SimpleNamespace(session_hash="mine")
    playground._leave(mine)
    assert not file.exists()
    assert "no longer available" in shown(playground, playground._restore(mine, 0, DEMO))["message"]


@pytest.mark.parametrize("index", range(5))
def test_a_preset_fills_in_all_guidance_fields(playground: Any, index: int) -> None:
    message, sigma, slider, guidances, seg_scale, pag_scale, layers, start, stop = playground._preset(index, DEMO)
    preset = PRESETS[index]
    assert f"{preset.name}: {preset.describe().replace('&', '')}" in message
    assert (guidances, layers, start, stop) == (list(preset.guidances), ["mid"], 0, 1)
    assert (seg_scale, pag_scale, sigma) == (preset.seg_scale, preset.pag_scale, preset.sigma)
    assert slider == 33


def test_examples_of_the_bundled_model_and_of_others() -> None:
    from segkern.playground import layout

    samples = layout.example_prompts(DEMO)
    assert samples[0] == ["", "1"]
    assert [prompt for prompt, _ in samples[1:]] == [subject.prompt for subject in PROMPTED]
    assert layout.example_labels(samples)[:2] == ["No prompt, no CFG", PROMPTED[0].prompt]
    assert layout.example_prompts(loading.find_model("a/model")) == [["", "1"]]


def test_stop_and_a_closed_page_end_their_own_run_only(playground: Any) -> None:
    mine, other, closed = (take(playground, name)[0] for name in ("one", "two", "three"))
    assert "Canceled before it started" in playground._stop(mine)
    playground._leave(SimpleNamespace(session_hash="three"))
    assert [playground._runs[ticket].stopping for ticket in (mine, other, closed)] == [True, False, True]
    for ticket, words in ((mine, "Stopped"), (other, "Generated in"), (closed, "Stopped")):
        last = last_shown(playground, ticket)
        assert words in last["message"]
        assert ("pair" in last) == (ticket == other)
    assert skipped(playground._stop(mine))


def test_a_page_closed_in_the_middle_frees_the_pipeline(playground: Any) -> None:
    ticket = take(playground, steps=50)[0]
    steps = playground._run(ticket)
    next(steps)
    next(steps)
    assert "Stopping after this step" in playground._stop(ticket)
    steps.close()
    assert not playground._runs
    assert "Generated in" in last_shown(playground, take(playground)[0])["message"]


def test_files_of_old_runs_are_removed(playground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkern.playground.history.KEPT_RUNS", 1)
    paths = [files(last_shown(playground, take(playground, "old")[0])["pair"])[0] for _ in range(2)]
    assert [path.exists() for path in paths] == [False, True]


def test_an_unexpected_error_is_shown_too(playground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("segkern.playground.page.generate", broken)
    steps = playground._run(take(playground)[0])
    assert "Generation failed: out of memory" in shown(playground, next(steps))["message"]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(steps)
    assert not playground._runs


def test_a_model_sets_its_sizes_layers_and_guidance(playground: Any) -> None:
    updates = playground._load(f" {loading.DEMO} ", "", ["PAG", "SAG"])
    source, message, sizes, layers, guidances, energy, cfg, examples = updates
    assert source == DEMO
    assert "is loaded" in message
    assert sizes["value"] == "64 x 64"
    assert ("u1", "u1") in layers["choices"]
    assert layers["value"] == ["mid"]
    assert (guidances["choices"], guidances["value"]) == (["SEG", "PAG", "SAG", "SLG", "TPG"], ["PAG", "SAG"])
    assert energy["visible"]
    assert cfg == "3"
    assert len(examples["samples"]) == len(examples["sample_labels"]) == 1 + len(PROMPTED)


def test_a_transformer_has_no_sag_and_no_energy_maps(playground: Any, tmp_path: Path) -> None:
    save_small_sd3(tmp_path)
    source, message, _, layers, guidances, energy, cfg, examples = playground._load(str(tmp_path), "", ["SAG"])
    assert "is loaded" in message
    assert (guidances["choices"], guidances["value"]) == (["SEG", "PAG", "SLG", "TPG"], ["SEG"])
    assert layers["value"] == ["2"]
    assert not energy["visible"]
    assert cfg == "7"
    assert examples["samples"] == [["", "1"]]
    assert playground._preset(0, source)[6] == ["2"]


def test_an_invalid_model_leaves_the_page_unchanged(playground: Any, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for model, words in (("no/such/folder", "no/such/folder"), (str(tmp_path / "bare"), "model_index.json")):
        source, message, *others = playground._load(model, "", ["SEG"])
        assert words in message
        assert 'role="alert"' in message
        assert all(map(skipped, [source, *others]))


def test_a_damaged_configuration_is_reported(playground: Any, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(loading.DEMO, copied)
    (copied / "unet" / "config.json").write_text('{"block_out_channels": 7}', encoding="utf-8")
    source, message, *others = playground._load(str(copied), "", ["SEG"])
    assert "copied&#x27; cannot be loaded: TypeError" in message
    assert all(map(skipped, [source, *others]))


def test_slider_and_field_follow_each_other() -> None:
    from segkern.playground import choices, layout

    assert layout.follow_sigma("inf") == layout.follow_sigma("∞") == choices.LAST
    assert layout.follow_sigma("4") == choices.position_of(4.0)
    assert all(skipped(layout.follow_sigma(text)) for text in ("-1", "0", "wide", "", None))
    assert '"4", "4.76"' in layout.follow_slider()
    assert layout.follow_slider().count('"inf"') == 1


def test_fields_of_unselected_guidance_methods_are_hidden() -> None:
    from segkern.playground import layout

    def visible(*guidances: str) -> list[bool]:
        return [update["visible"] for update in layout.show_chosen(guidances)]

    no = "hidden"
    assert visible("SEG") == [True, no, no, no, no, True]
    assert visible("PAG", "SAG") == [no, True, True, no, no, True]
    assert visible("SAG") == [no, no, True, no, no, no]
    assert visible("SLG", "TPG") == [no, no, no, True, True, True]

# SPDX-License-Identifier: Apache-2.0
"""The page of the playground at work, without a browser: what its buttons do."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segkern.generation import loading
from segkern.generation.pictures import difference
from segkern.playground.models import Models
from tests.cli.cli_tools import picture

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
    """Values in the fields of a new page, with few steps and no map."""
    values = {name: component.value for name, component in playground._fields.items()}
    return list((values | {"steps": 2, "energy": False} | changes).values())


def take(playground: Any, session: str = "one", model: str = "demo", **changes: Any) -> list[Any]:
    request = SimpleNamespace(session_hash=session)
    return playground._take(request, DEMO, model, "", *fields(playground, **changes))


def skipped(update: Any) -> bool:
    return isinstance(update, dict) and "value" not in update and update.get("__type__") == "update"


def shown(playground: Any, updates: dict[Any, Any]) -> dict[str, Any]:
    """Updates by the names of what they change."""
    names = {component: name for name, component in playground._results.items()}
    names[playground._controls["message"]] = "message"
    return {names[component]: update for component, update in updates.items()}


def test_every_field_has_a_label_of_its_own(playground: Any) -> None:
    others = playground._controls
    inputs = [*playground._fields.values(), others["sigma_slider"], others["model"], others["config"]]
    labels = [component.label for component in inputs]
    assert all(labels)
    assert len(set(labels)) == len(labels)


def test_nothing_is_reported_shared_or_open_to_programs(playground: Any) -> None:
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
    [({"sigma": "<b>"}, "sigma must be a number, got &#x27;&lt;b&gt;&#x27;"), ({"model": "a/b"}, "&#x27;a/b&#x27;")],
    ids=["field", "model that is not loaded"],
)
def test_a_refusal_changes_the_message_alone(playground: Any, changes: dict[str, Any], words: str) -> None:
    ticket, message, *buttons = take(playground, **changes)
    assert words in message
    assert 'role="alert"' in message
    assert all(map(skipped, [ticket, *buttons]))
    assert not playground._runs


def test_draw_pressed_again_before_the_run_ends_changes_nothing(playground: Any) -> None:
    ticket, *_ = take(playground)
    assert all(map(skipped, take(playground, seed=2)))
    assert list(playground._runs) == [ticket]
    request = SimpleNamespace(session_hash="one")
    assert [button["interactive"] for button in playground._buttons(request)] == [False, True]
    assert "Drawn in" in shown(playground, list(playground._run(ticket))[-1])["message"]
    (again,) = playground._run(ticket)  # the page may send it twice
    assert all(map(skipped, again.values()))
    assert [button["interactive"] for button in playground._buttons(request)] == [True, False]
    assert not skipped(take(playground)[0])
    playground._runs.clear()


def test_two_pages_get_their_own_pictures(playground: Any) -> None:
    tickets = [take(playground, name, seed=seed)[0] for name, seed in (("one", 1), ("two", 2))]
    results = {}
    for ticket in reversed(tickets):
        *steps, last = [shown(playground, updates) for updates in playground._run(ticket)]
        assert [set(step) for step in steps] == [{"message"}] * 4
        assert "step 4 of 4" in steps[-1]["message"]
        results[ticket] = last
    seeds = [picture(Path(results[ticket]["guided"]["value"])).text["seed"] for ticket in tickets]
    assert seeds == ["1", "2"]
    first, second = (picture(Path(results[ticket]["plain"]["value"])) for ticket in tickets)
    assert difference(first, second) > 1
    assert not playground._runs


def test_everything_of_a_run_is_shown(playground: Any) -> None:
    last = shown(playground, list(playground._run(take(playground, energy=True, guidances=["SEG", "PAG"])[0]))[-1])
    assert last.keys() == {*playground._results, "message"}
    assert last["guided"]["label"] == "With guidance: CFG 3 + SEG + PAG"
    assert last["plain"]["value"] == last["plain_file"]["value"] != last["guided"]["value"]
    assert Path(last["maps"]).exists()
    assert "m0" in last["report"]
    assert "<th" in last["timing"]
    assert "guide(" in last["snippet"]


def test_stop_and_a_closed_page_end_their_own_run_only(playground: Any) -> None:
    mine, other, closed = (take(playground, name)[0] for name in ("one", "two", "three"))
    assert "will not be drawn" in playground._stop(mine)
    playground._leave(SimpleNamespace(session_hash="three"))
    assert [playground._runs[ticket].stopping for ticket in (mine, other, closed)] == [True, False, True]
    for ticket, words in ((mine, "Stopped"), (other, "Drawn in"), (closed, "Stopped")):
        last = shown(playground, list(playground._run(ticket))[-1])
        assert words in last["message"]
        assert ("plain" in last) == (ticket == other)
    assert skipped(playground._stop(mine))


def test_a_page_closed_in_the_middle_frees_the_pipeline(playground: Any) -> None:
    ticket = take(playground, steps=50)[0]
    steps = playground._run(ticket)
    next(steps)
    next(steps)
    assert "Stopping after this step" in playground._stop(ticket)
    steps.close()
    assert not playground._runs
    last = shown(playground, list(playground._run(take(playground)[0]))[-1])
    assert "Drawn in" in last["message"]
    assert last["guided"]["label"] == "With guidance: CFG 3 + SEG sigma inf"


def test_files_of_runs_long_past_are_removed(playground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segkern.playground.page._KEPT_RUNS", 1)
    files = []
    for _ in range(2):
        files.append(Path(shown(playground, list(playground._run(take(playground)[0]))[-1])["plain"]["value"]))
    assert [file.exists() for file in files] == [False, True]


def test_what_nobody_foresaw_is_said_too(playground: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("segkern.playground.page.carry_out", broken)
    steps = playground._run(take(playground)[0])
    assert "Drawing failed: out of memory" in shown(playground, next(steps))["message"]
    with pytest.raises(RuntimeError, match="out of memory"):
        next(steps)
    assert not playground._runs


def test_a_model_brings_its_sizes_and_layers(playground: Any) -> None:
    source, message, sizes, layers, examples = playground._load(f" {loading.DEMO} ", "")
    assert source == DEMO
    assert "is loaded" in message
    assert sizes["value"] == "64 x 64"
    assert ("u1", "u1") in layers["choices"]
    assert layers["value"] == ["mid"]
    assert examples["visible"]


def test_a_bad_model_leaves_the_old_one(playground: Any, tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for model, words in (("no/such/folder", "no/such/folder"), (str(tmp_path / "bare"), "model_index.json")):
        source, message, *others = playground._load(model, "")
        assert words in message
        assert 'role="alert"' in message
        assert all(map(skipped, [source, *others]))


def test_a_model_with_a_damaged_configuration_is_said(playground: Any, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(loading.DEMO, copied)
    (copied / "unet" / "config.json").write_text('{"block_out_channels": 7}', encoding="utf-8")
    source, message, *others = playground._load(str(copied), "")
    assert "copied&#x27; cannot be loaded: TypeError" in message
    assert all(map(skipped, [source, *others]))


def test_slider_and_field_follow_one_another() -> None:
    from segkern.playground import choices, layout

    assert layout.follow_sigma("inf") == layout.follow_sigma("∞") == choices.LAST
    assert layout.follow_sigma("4") == choices.position_of(4.0)
    assert all(skipped(layout.follow_sigma(text)) for text in ("-1", "0", "wide", "", None))
    assert '"4", "4.76"' in layout.follow_slider()
    assert layout.follow_slider().count('"inf"') == 1


def test_fields_of_other_guidances_are_hidden() -> None:
    from segkern.playground import layout

    def visible(*guidances: str) -> list[bool]:
        return [update["visible"] for update in layout.show_chosen(guidances)]

    assert visible("SEG") == [True, False, False, True]
    assert visible("PAG", "SAG") == [False, True, True, True]
    assert visible("SAG") == [False, False, True, False]

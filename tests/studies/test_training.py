# SPDX-License-Identifier: Apache-2.0
"""Training keeps finished parts and resumes interrupted ones, and a rehearsal of all parts writes checkpoints."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import typer
from torch import nn

from segkern.generation.demo import PROMPTED
from segkern.generation.loading import DEMO, find_model, load_pipeline
from studies.drawings.sheet import drawings
from studies.evaluation.judge import load_judge
from studies.training import __main__ as command
from studies.training import denoiser, loop, vae, words
from studies.training.data import scaled
from studies.training.loop import Plan, train
from studies.training.optimisers import Optimisers
from studies.training.text import Texts


class Line(nn.Module):
    """Layers with the names by which Muon's are told from AdamW's."""

    def __init__(self) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([nn.Conv2d(1, 8, (1, 3))])
        self.attentions = nn.ModuleList([nn.Linear(8, 8)])
        self.out = nn.Linear(8, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        state = self.resnets[0](points[:, None, None]).flatten(1)
        return self.out(nn.functional.silu(self.attentions[0](state)))


def line_fit(work: Path, plan: Plan, stop: int | None = None) -> list[torch.Tensor]:
    """Train a ``Line``, with an interruption at a step if ``stop`` is given."""
    torch.manual_seed(0)
    module = Line()

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        if step == stop:
            raise KeyboardInterrupt
        points = torch.randn(16, 3, generator=rng)
        return (module(points) - points.sum(1, keepdim=True)).square().mean()

    return list(train("line", module, loss_of, plan, work).parameters())


@pytest.mark.parametrize(("average", "muon"), [(None, None), (0.9, 2e-2)])
def test_losses_fall_and_a_part_that_is_done_is_kept(tmp_path: Path, average: float | None, muon: float | None) -> None:
    plan = Plan(steps=200, rate=2e-2, warmup=5, average=average, muon=muon)
    trained = line_fit(tmp_path, plan)
    log = (tmp_path / "line.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line)["loss"] for line in log.splitlines()]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2
    again = line_fit(tmp_path, plan)
    assert all(torch.equal(first, second) for first, second in zip(trained, again, strict=True))
    assert (tmp_path / "line.jsonl").read_text(encoding="utf-8") == log
    with pytest.raises(ValueError, match=r"line.pt was trained with .*'steps': 200.*choose another folder with --work"):
        line_fit(tmp_path, Plan(steps=20, rate=1e-2))


@pytest.mark.parametrize(("average", "muon"), [(None, None), (0.9, 2e-2)])
def test_an_interrupted_training_resumes_with_the_same_result(
    tmp_path: Path, average: float | None, muon: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVE_INTERVAL", 40)
    plan = Plan(steps=130, rate=2e-2, warmup=5, constant=0.5, average=average, muon=muon)
    expected = line_fit(tmp_path / "whole", plan)
    for stop in (35, 90, 125):
        with pytest.raises(KeyboardInterrupt):
            line_fit(tmp_path / "parts", plan, stop)
    resumed = line_fit(tmp_path / "parts", plan)
    assert all(torch.equal(first, second) for first, second in zip(expected, resumed, strict=True))
    logs = [(tmp_path / folder / "line.jsonl").read_text(encoding="utf-8") for folder in ("whole", "parts")]
    losses = [[(line["step"], line["loss"]) for line in map(json.loads, log.splitlines())] for log in logs]
    assert losses[0] == losses[1]
    assert [step for step, _ in losses[0]] == [50, 100]
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {"line.pt", "line.jsonl"}


def test_rates_rise_stay_and_fall() -> None:
    plan = Plan(steps=1000, rate=1.0, warmup=100, constant=0.6)
    shares = [plan.share(step) for step in (0, 49, 99, 300, 600, 800, 999)]
    assert shares == pytest.approx([0.01, 0.5, 1, 1, 1, 0.5, 0.0025])
    cosine = Plan(steps=1000, rate=1.0, warmup=100)
    assert [cosine.share(step) for step in (99, 500, 1000)] == pytest.approx([0.976, 0.5, 0], abs=1e-3)


def test_a_training_without_a_terminal_prints_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line_fit(tmp_path, Plan(steps=100, rate=1e-2))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["line: step 50 of 100", "line: step 100 of 100"]
    assert all("loss" in line and "s per step" in line for line in lines)


def test_untrained_autoencoder_passes_colours() -> None:
    torch.manual_seed(0)
    model = vae.build().eval()
    colours = (torch.rand(4, 3, 1, 1) - 0.5).expand(4, 3, 64, 64)
    with torch.no_grad():
        rebuilt = model.decode(model.encode(colours).latent_dist.mean).sample
    inside = rebuilt[:, :, 16:-16, 16:-16].mean((2, 3))
    assert torch.corrcoef(torch.stack([inside.flatten(), colours[:, :, 0, 0].flatten()]))[0, 1] > 0.95


def test_whitening_changes_the_latents_and_not_the_pictures() -> None:
    torch.manual_seed(0)
    model = vae.build().eval()
    pixels = scaled(torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        before = model.decode(model.encode(pixels[:4]).latent_dist.mean).sample
        vae.whiten(model, pixels)
        latents = model.encode(pixels).latent_dist.mean
        after = model.decode(latents[:4]).sample
    assert torch.allclose(before, after, atol=1e-4)
    spread = torch.cov(latents.transpose(0, 1).flatten(1))
    assert torch.allclose(spread, torch.eye(4), atol=1e-3)
    assert latents.mean((0, 2, 3)).abs().max() < 1e-3


def test_times_cover_the_schedule() -> None:
    drawn = denoiser.times(20_000, torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.int64
    assert 0 <= int(drawn.min()) < 20
    assert 980 < int(drawn.max()) <= 999
    assert math.isclose(float(drawn.float().mean()), 555, abs_tol=25)


def test_texts_encode_as_the_pipeline_does() -> None:
    pipe = load_pipeline(find_model("demo"), torch.float32, torch.device("cpu"))
    texts = Texts(DEMO)
    texts.first.load_state_dict(pipe.text_encoder.state_dict())
    texts.second.load_state_dict(pipe.text_encoder_2.state_dict())
    captions = [*(subject.prompt for subject in PROMPTED), ""]
    with torch.no_grad():
        states, whole = texts.eval()(texts.tokens(captions))
        expected, _, pooled, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    assert torch.allclose(states, expected, atol=1e-5)
    assert torch.allclose(whole, pooled, atol=1e-5)


def test_every_word_is_one_token(tmp_path: Path) -> None:
    words.write(tmp_path)
    for tokenizer in Texts(tmp_path).tokenizers:
        ids = tokenizer(words.words()).input_ids
        assert {len(tokens) for tokens in ids} == {3}
        assert len({tokens[1] for tokens in ids}) == len(ids)
        longest = max(drawings(), key=lambda name: len(tokenizer(name).input_ids))
        assert len(tokenizer(f"{longest} above {longest} on a purple background").input_ids) <= words.TOKENS


def test_muon_turns_every_direction_of_a_block_alike() -> None:
    """Its step on a convolution is nearly orthogonal, however lopsided the gradient; other weights go AdamW's way."""
    torch.manual_seed(0)
    line = Line()
    wide = nn.Conv2d(4, 16, 3).to(memory_format=torch.channels_last)
    line.resnets.append(wide)
    optimisers = Optimisers(line, rate=1e-3, decay=0.0, muon=1e-3)
    before = {name: weight.detach().clone() for name, weight in line.named_parameters()}
    strengths = torch.logspace(0, -1.5, 16)[:, None, None, None]
    wide.weight.grad = strengths * torch.randn_like(wide.weight)
    line.out.weight.grad = torch.logspace(0, -1.5, 8)[None]
    optimisers.step(1.0)
    turned = (wide.weight.detach() - before["resnets.1.weight"]).permute(0, 2, 3, 1).flatten(1)
    directions = torch.linalg.svdvals(turned)
    assert directions.min() > 0.4 * directions.max()
    assert turned.square().mean().sqrt() == pytest.approx(0.2 * 1e-3, rel=0.25)
    moved = line.out.weight.detach() - before["out.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, -1e-3), rtol=1e-3, atol=0)
    untouched = ("resnets.0.weight", "attentions.0.weight", "attentions.0.bias")
    assert all(torch.equal(before[name], line.get_parameter(name)) for name in untouched)


def test_muon_refuses_weights_that_are_no_matrix_in_memory() -> None:
    line = Line()
    line.resnets.append(nn.Conv2d(4, 16, 3))
    with pytest.raises(ValueError, match=r"\[16, 4, 3, 3\] .*channels_last"):
        Optimisers(line, rate=1e-3, decay=0.0, muon=1e-3)
    Optimisers(line, rate=1e-3, decay=0.0)


@pytest.mark.slow
def test_rehearsal_of_the_whole_training(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    command.main(work=work, out=out, share=0.0005)
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(out / "demo", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(PROMPTED[0].prompt, num_inference_steps=1, width=96, height=64).images[0]
    assert image.size == (96, 64)
    load_judge(out / "judge" / "model.safetensors")
    logs = {path.stem for path in work.glob("*.pt")}
    assert {"vae", "decoder", "denoiser", "judge"} == logs


def test_a_rehearsal_does_not_replace_the_bundled_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="--out"):
        command.main(work=tmp_path / "work", share=0.001)
    assert not (tmp_path / "work").exists()

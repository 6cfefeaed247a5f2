# SPDX-License-Identifier: Apache-2.0
"""``record_energy`` records the inputs of attention, and changes neither images nor pipelines."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLImg2ImgPipeline

from segkern.analysis import energy
from segkern.integrations.diffusers import SAG, SEG, EnergyRecorder, SEGAttnProcessor, guide, list_layers, record_energy
from tests.diffusers.probes import hooks_of
from tests.diffusers.small_pipelines import noise, run, tiny_pipeline

MID0 = "mid_block.attentions.0.transformer_blocks.0.attn1"
SIGMAS = (1.0, math.inf)


@contextmanager
def attention_inputs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Collect the queries and keys of every self-attention, as passed to PyTorch's attention."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    real = F.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if query.shape[2] == key.shape[2]:
            seen.append((query.clone(), key.clone()))
        return real(query, key, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy)
        yield seen


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "no CFG"])
def test_latents_are_bit_identical(guidance_scale: float) -> None:
    pipe = tiny_pipeline()
    latents = noise(2, 12, 20)
    plain = run(pipe, ["a red fox", "a tree"], latents=latents, guidance_scale=guidance_scale)
    hooks, processors = hooks_of(pipe.unet), dict(pipe.unet.attn_processors)
    with record_energy(pipe, sigmas=SIGMAS) as recorder:
        assert isinstance(recorder, EnergyRecorder)
        recorded = run(pipe, ["a red fox", "a tree"], latents=latents, guidance_scale=guidance_scale)
        assert dict(pipe.unet.attn_processors) == processors
    assert torch.equal(plain, recorded)
    assert hooks_of(pipe.unet) == hooks
    assert len(recorder.records) == 3 * len(list_layers(pipe))


def change(pipe: Any, how: str) -> None:
    """Change how queries and keys are computed."""
    if how == "fused":
        pipe.fuse_qkv_projections()
    if how == "norms":
        for layer in list_layers(pipe):
            attn = pipe.unet.get_submodule(layer.module)
            attn.norm_q, attn.norm_k = (torch.nn.RMSNorm(layer.head_dim) for _ in range(2))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "no CFG"])
@pytest.mark.parametrize("how", ["plain", "fused", "norms"])
def test_records_are_of_what_attention_gets(how: str, guidance_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records belong to the conditional half, on the layer's grid at this size."""
    pipe = tiny_pipeline(own_unet=True)
    change(pipe, how)
    with attention_inputs(monkeypatch) as seen, record_energy(pipe, sigmas=SIGMAS, dtype=torch.float64) as recorder:
        run(pipe, latents=noise(1, 12, 20), guidance_scale=guidance_scale)
    layers = list_layers(pipe, 12 * pipe.vae_scale_factor, 20 * pipe.vae_scale_factor)
    assert [record.layer for record in recorder.records] == layers * 3
    assert len({layer.grid for layer in layers}) > 1
    seen = seen[-len(recorder.records) :]  # text encoders, which run before, also use self-attention
    for record, (query, key) in zip(recorder.records, seen, strict=True):
        grid = record.layer.grid
        assert grid is not None
        half = slice(1, 2) if guidance_scale > 1 else slice(0, 1)
        for cut, recorded in (("keys", record.by_query), ("queries", record.by_key)):
            assert recorded is not None
            assert recorded.sigmas == (0.0, *SIGMAS)
            for i, sigma in enumerate(recorded.sigmas):
                options: dict[str, Any] = {"over": cut, "dtype": torch.float64}
                expected = energy.energies(query[half], key[half], grid, sigma, **options)
                torch.testing.assert_close(recorded.energies[i], expected, rtol=1e-5, atol=1e-5)
        assert record.map(math.inf).shape == (1, record.layer.heads, grid.height, grid.width)
        assert torch.equal(record.map().flatten(2), record.by_query.energies[0])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("share", [True, False], ids=["shared", "whole branches"])
@pytest.mark.parametrize("inside", [True, False], ids=["guided first", "recorded first"])
def test_beside_a_guidance_the_conditional_branch_is_recorded(share: bool, inside: bool) -> None:
    """In the first step, records equal those without guidance. Recording does not change the guided latents."""
    pipe, latents = tiny_pipeline(), noise(2, 12, 20)
    texts = ["a red fox", "a tree"]
    with record_energy(pipe, sigmas=SIGMAS) as alone:
        run(pipe, texts, latents=latents)
    spec = SEG(layers=["d0", "mid", "u1"], sigma=2.0)
    with guide(pipe, spec, share=share):
        guided = run(pipe, texts, latents=latents)
    if inside:
        with guide(pipe, spec, share=share), record_energy(pipe, sigmas=SIGMAS) as beside:
            both = run(pipe, texts, latents=latents)
    else:
        with record_energy(pipe, sigmas=SIGMAS) as beside, guide(pipe, spec, share=share):
            both = run(pipe, texts, latents=latents)
    assert torch.equal(both, guided)
    assert [r.layer for r in beside.records] == [r.layer for r in alone.records]
    for first, second in zip(alone.records, beside.records, strict=True):
        if first.step == 0:
            torch.testing.assert_close(first.by_query.energies, second.by_query.energies, rtol=1e-4, atol=1e-4)
    assert any(
        not torch.allclose(first.by_query.energy, second.by_query.energy, rtol=1e-4)
        for first, second in zip(alone.records, beside.records, strict=True)
        if first.step == 2
    )


def test_chosen_steps_have_all_sigmas_and_the_others_none() -> None:
    pipe = tiny_pipeline()
    with record_energy(pipe, "mid", SIGMAS, at_steps=(0, -1)) as recorder:
        run(pipe, latents=noise(), num_inference_steps=4)
        run(pipe, latents=noise(), num_inference_steps=2)
    count = sum(layer.part == "mid" for layer in list_layers(pipe))
    assert [(r.run, r.step, r.steps) for r in recorder.records[::count]] == [
        *((0, step, 4) for step in range(4)),
        *((1, step, 2) for step in range(2)),
    ]
    assert [len(r.by_query.sigmas) for r in recorder.records[::count]] == [3, 1, 1, 3, 3, 3]
    assert [r.by_key is None for r in recorder.records[::count]] == [False, True, True, False, False, False]
    with pytest.raises(ValueError, match="got inf"):
        recorder.records[count].map(math.inf)
    with pytest.raises(ValueError, match="by_key"):
        recorder.records[count].map(cut="by_key")
    with pytest.raises(ValueError, match="'rows'"):
        recorder.records[0].map(cut="rows")


def test_a_step_that_never_came_is_warned_of() -> None:
    pipe = tiny_pipeline()
    recorder = record_energy(pipe, at_steps=(0, 7))
    run(pipe, latents=noise())
    with pytest.warns(UserWarning, match=r"found no steps \[7\]: runs had 3"):
        recorder.__exit__(None, None, None)


@pytest.mark.parametrize("place", ["callback", "context"])
def test_an_exception_leaves_nothing_behind(place: str) -> None:
    pipe = tiny_pipeline()
    hooks = hooks_of(pipe.unet)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError

    def recorded() -> None:
        with record_energy(pipe, at_steps=(9,)):
            run(pipe, latents=noise(), callback_on_step_end=fail if place == "callback" else None)
            fail()

    with pytest.raises(ZeroDivisionError):
        recorded()
    assert hooks_of(pipe.unet) == hooks


@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "no CFG"])
@pytest.mark.parametrize("inside", [True, False], ids=["guided first", "recorded first"])
def test_the_second_forward_of_a_guidance_is_no_step(guidance_scale: float, inside: bool) -> None:
    pipe, latents = tiny_pipeline(), noise(2, 12, 20)
    texts = ["a red fox", "a tree"]
    arguments = {"latents": latents, "guidance_scale": guidance_scale}
    with guide(pipe, SAG()):
        guided = run(pipe, texts, **arguments)
    with contextlib.ExitStack() as stack:
        if inside:
            stack.enter_context(guide(pipe, SAG()))
        recorder = stack.enter_context(record_energy(pipe, "m0", sigmas=SIGMAS, at_steps=(-1,)))
        if not inside:
            stack.enter_context(guide(pipe, SAG()))
        assert torch.equal(run(pipe, texts, **arguments), guided)
    assert [(r.run, r.step, r.steps) for r in recorder.records] == [(0, step, 3) for step in range(3)]
    assert {len(r.by_query.energies[0]) for r in recorder.records} == {2}


def test_a_call_outside_of_any_run_is_no_step() -> None:
    pipe = tiny_pipeline(own_unet=True)
    with record_energy(pipe, "m0") as recorder:
        conditions = {
            "text_embeds": torch.zeros(1, pipe.text_encoder_2.config.projection_dim),
            "time_ids": torch.zeros(1, 6),
        }
        text = torch.zeros(1, 77, pipe.unet.config.cross_attention_dim)
        with torch.no_grad():
            pipe.unet(noise(), 5, encoder_hidden_states=text, added_cond_kwargs=conditions)
        run(pipe, latents=noise())
    assert [record.step for record in recorder.records] == [0, 1, 2]


def test_another_pipeline_on_the_same_denoiser_is_not_recorded() -> None:
    pipe, other = tiny_pipeline(), tiny_pipeline()
    assert pipe.unet is other.unet
    with record_energy(pipe) as recorder:
        run(other, latents=noise())
        copied = copy.deepcopy(pipe.unet)
        run(tiny_pipeline(unet=copied), latents=noise())
    assert recorder.records == []
    with pytest.raises(RuntimeError, match="removed"):
        recorder.__enter__()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"layers": "middle"}, "'middle'"),
        ({"sigmas": (-1.0,)}, "-1"),
        ({"sigmas": (1.0, 1.0)}, "distinct"),
        ({"boundary": "zero"}, "'zero'"),
        ({"dtype": torch.float16}, "float16"),
        ({"at_steps": (0.5,)}, "0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_quoted_and_leave_nothing(arguments: dict[str, Any], words: str) -> None:
    pipe = tiny_pipeline()
    hooks = hooks_of(pipe.unet)
    with pytest.raises(ValueError, match=words):
        record_energy(pipe, **arguments)
    assert hooks_of(pipe.unet) == hooks


def test_what_cannot_be_recorded_is_refused() -> None:
    with pytest.raises(ValueError, match="record_energy needs a pipeline"):
        record_energy(3)
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.get_submodule(MID0).set_processor(SEGAttnProcessor(1.0))
    with pytest.raises(ValueError, match="SEGAttnProcessor"):
        record_energy(pipe)
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.mid_block.compile()
    with pytest.raises(ValueError, match="not compiled"):
        record_energy(pipe)
    assert hooks_of(pipe.unet) == 0


def test_a_mask_is_refused_when_it_comes() -> None:
    pipe = tiny_pipeline()

    def mask(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "attention_mask": torch.zeros(2, 1, args[0].shape[1])}

    handle = pipe.unet.get_submodule(MID0).register_forward_pre_hook(mask, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match=r"layer m0 .* got a mask"), record_energy(pipe):
            run(pipe, latents=noise())
    finally:
        handle.remove()


@pytest.mark.parametrize("strength, first", [(1.0, 0), (0.5, 2)])
def test_image_to_image_counts_the_steps_that_it_takes(strength: float, first: int) -> None:
    """A run that begins in the middle has fewer steps, with its own first and last step."""
    pipe = tiny_pipeline(StableDiffusionXLImg2ImgPipeline)
    picture = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 5.0}
    with record_energy(pipe, "mid", SIGMAS, at_steps=(0, -1)) as recorder:
        pipe("a red fox", image=picture, strength=strength, generator=torch.Generator().manual_seed(1), **options)
    steps = 4 - first
    assert {record.steps for record in recorder.records} == {steps}
    assert sorted({record.step for record in recorder.records}) == list(range(steps))
    assert {record.step for record in recorder.records if record.by_key is not None} == {0, steps - 1}
    height, width = 64 // pipe.vae_scale_factor, 96 // pipe.vae_scale_factor
    grid = recorder.records[0].layer.grid
    assert grid is not None
    assert grid.height * width == grid.width * height

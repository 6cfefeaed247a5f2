# SPDX-License-Identifier: Apache-2.0
"""Guiders in modular pipelines: their results equal ``guide`` on the stock pipelines, unlike diffusers' own guiders."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance, PerturbedAttentionGuidance, SmoothedEnergyGuidance

from segkern.integrations.diffusers import (
    PAG,
    SAG,
    SEG,
    SLG,
    TPG,
    PAGGuider,
    SAGGuider,
    SEGGuider,
    SLGGuider,
    TPGGuider,
    guide,
)
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor
from tests.compatibility import proves
from tests.diffusers.modular_pipelines import TRANSFORMERS, modular_sdxl, modular_transformer, run_sdxl, run_transformer
from tests.diffusers.probes import hooks_of
from tests.diffusers.proven_cells import of_transformer
from tests.diffusers.slow_guidance import Perturbed, looped_run, transformer_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_stock

GUIDERS: dict[type, Any] = {SEG: SEGGuider, PAG: PAGGuider, SAG: SAGGuider, SLG: SLGGuider, TPG: TPGGuider}
SPECS = [
    SEG(scale=2.0),
    SEG(scale=2.0, sigma=1.0, layers=["d0", "mid"]),
    PAG(scale=2.0, layers=["mid", "u0"]),
    SAG(scale=2.0),
    SLG(scale=2.0, layers=["mid", "u0"], start=0.0, stop=1.0),
    TPG(scale=2.0, layers=["d0", "mid"], seed=4),
]
PROMPTS = ["a red fox", "a dog"]


def guider_of(spec: Any, **arguments: Any) -> Any:
    return GUIDERS[type(spec)](spec, **arguments)


@lru_cache(maxsize=len(MODELS))
def built(name: str) -> Any:
    return MODELS[name].build()


MODULAR = "modular pipeline"
PROVED = ("SEG at infinity", "SEG", "PAG", "SAG", "SLG", "TPG")  # one for each spec


@pytest.mark.one_in(3)
@proves(model="Stable Diffusion XL", task=MODULAR)
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "without CFG"])
@pytest.mark.parametrize(
    "spec",
    [pytest.param(spec, marks=proves(guidance=word)) for spec, word in zip(SPECS, PROVED, strict=True)],
    ids=str,
)
def test_it_is_guide_on_the_stock_pipeline(spec: Any, guidance_scale: float) -> None:
    """Compares with latents of ``guide`` on the stock pipeline, for two prompts and a non-square size."""
    pipe, latents = tiny_pipeline(), noise(2, 8, 12)
    plain = run(pipe, PROMPTS, latents=latents, guidance_scale=guidance_scale)
    with guide(pipe, spec):
        expected = run(pipe, PROMPTS, latents=latents, guidance_scale=guidance_scale)
    processors = dict(pipe.unet.attn_processors)
    guider = guider_of(spec, guidance_scale=guidance_scale)
    guided = run_sdxl(modular_sdxl(pipe, guider), pipe, PROMPTS, latents=latents)
    assert relative(guided, expected) < PIPELINE_TOLERANCE
    assert relative(guided, plain) > 1e-2
    if isinstance(spec, SEG):
        slow = looped_run(pipe, [spec], PROMPTS, latents=latents, guidance_scale=guidance_scale)
        assert relative(guided, slow) < PIPELINE_TOLERANCE
    report = guider.report()
    assert report.forwards == (6 if guidance_scale > 1.0 else 3)
    assert all(row.fired == 3 and row.moved > 0.1 for row in report.layers)
    assert hooks_of(pipe.unet) == 0
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(run(pipe, PROMPTS, latents=latents, guidance_scale=guidance_scale), plain)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("name", "cfg"),
    # Otherwise Qwen-Image's modular pipeline uses the norm of the conditional prediction, unlike its stock pipeline.
    [
        pytest.param(name, cfg, marks=of_transformer(name, task=MODULAR))
        for name in TRANSFORMERS
        for cfg in (True, False)
        if cfg or name != "qwen-image"
    ],
)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=proves(guidance=kind.__name__)) for kind in (SEG, PAG, SLG, TPG)]
)
def test_transformers(kind: type, name: str, cfg: bool) -> None:
    """Compares with latents of ``guide`` on the stock pipeline, and for two models also with the slow computation."""
    model, pipe = MODELS[name], built(name)
    own: dict[type, dict[str, Any]] = {SEG: {"sigma": 1.5}, SLG: {"start": 0.0, "stop": 1.0}}
    spec = kind(scale=2.0, layers=model.layers, **own.get(kind, {}))
    given: dict[str, Any] = {"guidance_scale": 4.0 if cfg else 1.0}
    if name == "z-image":  # its stock pipeline has this formula
        given = {"guidance_scale": 3.0 if cfg else 0.0, "use_original_formulation": True}
    more: dict[str, Any] = {}
    if name == "wan":  # without a VAE, its modular pipeline assumes 16 channels
        more["latents"] = torch.randn(2, 4, 3, 12, 8, generator=torch.Generator().manual_seed(5))
    guider = guider_of(spec, **given)
    guided = run_transformer(name, modular_transformer(name, pipe, guider), samples=2, cfg=cfg, **more)

    def stock() -> torch.Tensor:
        steps: list[torch.Tensor] = []
        note = {"callback_on_step_end": lambda pipe, i, t, given: steps.append(given["latents"]) or {}}
        latents = run_stock(model, pipe, 6, 4, samples=2, cfg=cfg, **more, **note)
        return steps[-1] if name == "flux2-klein" else latents  # its stock pipeline returns another layout

    with guide(pipe, spec):
        assert relative(guided, stock()) < PIPELINE_TOLERANCE
    if name in ("sd3.5", "qwen-image") and kind in (SEG, PAG):
        slow = [Perturbed(2.0, 1.5 if kind is SEG else None, model.modules)]
        assert relative(guided, transformer_run(model, pipe, slow, stock, cfg=cfg)) < PIPELINE_TOLERANCE
    assert relative(guided, stock()) > 10 * PIPELINE_TOLERANCE  # the effect is large enough to be measured
    report = guider.report()
    modules = {module.rpartition(".")[0] if kind in (SLG, TPG) else module for module in model.modules}
    assert {row.module for row in report.layers} == modules
    assert all(row.fired == 3 for row in report.layers)
    assert hooks_of(pipe.transformer) == 0
    layers = [pipe.transformer.get_submodule(module) for module in model.modules]
    assert not any(isinstance(layer.processor, GuidedProcessor) for layer in layers)


def test_diffusers_own_guider_does_nothing_at_the_price_of_a_third_call() -> None:
    pipe, latents = tiny_pipeline(), noise(1, 8, 12)
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(SmoothedEnergyGuidance):
        def forward(self, **predictions: torch.Tensor) -> Any:
            seen.append(predictions)
            return super().forward(**predictions)

    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        theirs = Watched(guidance_scale=5.0, seg_guidance_layers=[0, 1], seg_guidance_scale=3.0)
        output = run_sdxl(modular_sdxl(pipe, theirs), pipe, latents=latents)
        with_three = len(calls)
        plain = run_sdxl(modular_sdxl(pipe, ClassifierFreeGuidance(5.0)), pipe, latents=latents)
        with_two = len(calls) - with_three
        guider = SEGGuider(guidance_scale=5.0, scale=3.0)
        ours = run_sdxl(modular_sdxl(pipe, guider), pipe, latents=latents)
        assert len(calls) == with_three + 2 * with_two, "there is a separate call"
    finally:
        handle.remove()
    perturbed = [predictions for predictions in seen if "pred_cond_seg" in predictions]
    assert len(perturbed) == 2  # of three steps; it skips the first
    assert all(torch.equal(predictions["pred_cond_seg"], predictions["pred_cond"]) for predictions in perturbed)
    assert (with_three, with_two) == (8, 6)
    assert torch.equal(output, plain)
    assert relative(ours, plain) > 1e-2
    assert all(row.fired == 3 for row in guider.report().layers)


def test_without_cfg_diffusers_own_guiders_perturb_the_negative_prompt() -> None:
    """Our guider requests only the prompt, and so do pipelines that ask it what to encode."""
    prompts = {"prompt_embeds": (torch.ones(1), torch.zeros(1))}
    seg = SmoothedEnergyGuidance(guidance_scale=1.0, seg_guidance_layers=[0])
    pag = PerturbedAttentionGuidance(guidance_scale=1.0, perturbed_guidance_layers=[0], perturbed_guidance_stop=1.0)
    ours = SEGGuider(guidance_scale=1.0)
    for guider, asked in ((seg, [1.0, 0.0]), (pag, [1.0, 0.0]), (ours, [1.0])):
        guider.set_state(1, 3, torch.tensor(1.0))
        assert [batch.prompt_embeds.item() for batch in guider.prepare_inputs(prompts)] == asked
    assert ours.num_conditions == 1
    assert SEGGuider(guidance_scale=5.0).num_conditions == 2


@pytest.mark.parametrize("spec", [SEG(scale=2.0), SAG(scale=2.0)], ids=str)
def test_guidance_rescale_measures_the_unmodified_conditional_prediction(spec: Any) -> None:
    pipe, latents = tiny_pipeline(), noise(1, 8, 12)
    with guide(pipe, spec):
        expected = run(pipe, latents=latents, guidance_rescale=0.7)
    guider = guider_of(spec, guidance_scale=5.0, guidance_rescale=0.7)
    guided = run_sdxl(modular_sdxl(pipe, guider), pipe, latents=latents)
    assert relative(guided, expected) < PIPELINE_TOLERANCE
    if isinstance(spec, SEG):
        slow = looped_run(pipe, [spec], latents=latents, guidance_rescale=0.7)
        assert relative(guided, slow) < PIPELINE_TOLERANCE
    with guide(pipe, spec):
        unscaled = run(pipe, latents=latents, guidance_scale=1.0)
    guider = guider.new(guidance_scale=1.0)  # there is none without classifier-free guidance
    assert relative(run_sdxl(modular_sdxl(pipe, guider), pipe, latents=latents), unscaled) < PIPELINE_TOLERANCE


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    "spec",
    [
        SEG(stop=0.5),
        SEG(start=0.3, schedule="linear"),
        SEG(reuse=2),
        SEG(sigma=2.0, query_stride=2),
        SEG(sigma=[1.0, math.inf], blend=0.5),
        SEG(sigma={"d0": [[1.0, 2.0]], "mid": 2.0}, boundary="symmetric"),
        PAG(adaptive_scale=0.004),
        SAG(reuse=2, stop=0.7),
    ],
    ids=str,
)
def test_what_a_spec_asks_for(spec: Any) -> None:
    pipe, latents, arguments = tiny_pipeline(), noise(2, 8, 12), {"num_inference_steps": 4}
    with guide(pipe, spec) as guidance:
        expected = run(pipe, PROMPTS, latents=latents, **arguments)
    guider = guider_of(spec, guidance_scale=5.0)
    modular = modular_sdxl(pipe, guider)
    for _ in range(2 if spec.reuse > 1 else 1):
        guided = run_sdxl(modular, pipe, PROMPTS, latents=latents, **arguments)
        assert relative(guided, expected) < PIPELINE_TOLERANCE
    counts = {row.layer: row.fired for row in guidance.report().layers}
    runs = guider.report().forwards // 8
    assert {row.layer: row.fired for row in guider.report().layers} == {k: runs * n for k, n in counts.items()}


def test_both_calls_of_a_second_order_step_are_that_step() -> None:
    """diffusers' guiders use the number of the call as the number of the step, so they stop halfway."""
    for theirs in (SmoothedEnergyGuidance(seg_guidance_layers=[0]), ClassifierFreeGuidance()):
        theirs.set_state(4, 4, torch.tensor(1.0))  # the fifth of the seven calls of four steps
        assert theirs.num_conditions == 1
    pipe, latents = tiny_pipeline(scheduler=HeunDiscreteScheduler()), noise(1, 8, 12)
    spec = SEG(scale=2.0, stop=0.5)
    with guide(pipe, spec):
        expected = run(pipe, latents=latents, num_inference_steps=4)
    guided = run_sdxl(
        modular_sdxl(pipe, SEGGuider(spec, guidance_scale=5.0)), pipe, latents=latents, num_inference_steps=4
    )
    assert relative(guided, expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("original", [False, True], ids=["native", "original"])
def test_intervals_of_classifier_free_guidance(original: bool) -> None:
    """Outside of them, the result is ``c + s (c - p)``. Between runs, the guider requests both prompts."""
    pipe, latents = tiny_pipeline(), noise(1, 8, 12)
    guider = SEGGuider(
        guidance_scale=4.0 if original else 5.0,
        scale=2.0,
        guidance_stop=0.3,
        use_original_formulation=original,
    )
    modular = modular_sdxl(pipe, guider)
    first = run_sdxl(modular, pipe, latents=latents)
    assert guider.report().forwards == 4  # 2 + 1 + 1
    assert guider.num_conditions == 2
    assert torch.equal(run_sdxl(modular, pipe, latents=latents), first)
    both = run_sdxl(modular_sdxl(pipe, SEGGuider(guidance_scale=5.0, scale=2.0)), pipe, latents=latents)
    one = run_sdxl(modular_sdxl(pipe, SEGGuider(guidance_scale=1.0, scale=2.0)), pipe, latents=latents)
    assert min(relative(first, both), relative(first, one)) > 10 * PIPELINE_TOLERANCE
    native = SEGGuider(guidance_scale=5.0, scale=2.0, guidance_stop=0.3)
    assert relative(run_sdxl(modular_sdxl(pipe, native), pipe, latents=latents), first) < PIPELINE_TOLERANCE


def test_no_guidance_is_classifier_free_guidance_alone() -> None:
    pipe, latents = tiny_pipeline(), noise(1, 8, 12)
    plain = run_sdxl(modular_sdxl(pipe, ClassifierFreeGuidance(5.0)), pipe, latents=latents)
    guider = SEGGuider(guidance_scale=5.0, scale=0.0)
    assert torch.equal(run_sdxl(modular_sdxl(pipe, guider), pipe, latents=latents), plain)
    with pytest.warns(UserWarning, match="fired in none of 6 denoiser calls"):
        guider.report()


def test_it_is_disabled_and_enabled() -> None:
    """Uses a pipeline that does not enable the guider."""
    model, pipe = MODELS["sd3"], built("sd3")
    guider = SEGGuider(guidance_scale=4.0, layers=model.layers, enabled=False)
    modular = modular_transformer("sd3", pipe, guider)
    assert torch.equal(run_transformer("sd3", modular), run_stock(model, pipe, cfg=False))
    guider.enable()
    assert relative(run_transformer("sd3", modular), run_stock(model, pipe, cfg=False)) > 1e-3

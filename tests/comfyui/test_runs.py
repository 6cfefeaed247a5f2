# SPDX-License-Identifier: Apache-2.0
"""Runs with guidance: samplers, image to image, LoRA, guiders, windows, interrupts, memory, reports, refusals."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, DualCFGGuider
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from comfy_extras.nodes_perpneg import PerpNegGuider
from segkern_pack.guidance import add_guidance, guidances_of
from segkern_pack.recording import Recording

from segkern.integrations.specs import PAG, SEG

from .comparison import SPECS, independent, small
from .small_models import conditioning, forwards, latents, make_model, relative, sample
from .test_other_nodes import node
from .test_workflows import EITHER, LAYERS, same

SAMPLERS = [
    "euler_ancestral", "heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "dpmpp_2m",
    "dpmpp_3m_sde", "euler_cfg_pp", "res_multistep", "uni_pc", "lcm", "ddim", "lms", "er_sde",
]  # fmt: skip


def report(model: Any) -> str:
    return str(guidances_of(model.model_options)[0].report)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler: str) -> None:
    model, options = small("sdxl"), {"sampler": sampler, "steps": 3, "noise": latents("sdxl", 8, 6, 1)}
    ours = add_guidance(model, SPECS["seg 1.5"], "mid")
    reference = independent("sdxl", LAYERS["sdxl"]["mid"], SPECS["seg 1.5"])
    assert relative(sample(ours, "sdxl", **options), sample(reference.on(model, "sdxl"), "sdxl", **options)) < 1e-4
    evaluations = len(reference.guided)
    assert f"acted in {evaluations} of {evaluations} evaluations" in report(ours)
    assert "shared the model's own" in report(ours)


@EITHER
def test_an_image_to_begin_with(name: str, layers: str) -> None:
    image = latents(name, 9, 14, 1).flip(-1)
    same(name, layers, latent=image, noise=latents(name, 9, 14, 1), denoise=0.6)
    mask = torch.zeros(1, 1, 9, 14)
    mask[..., 4:] = 1.0
    painted = same(name, layers, latent=image, noise=latents(name, 9, 14, 1), noise_mask=mask)
    assert relative(painted[..., :4], image[..., :4]) < 1e-5


def test_lora() -> None:
    def patched(model: Any, guide: Any) -> Any:
        model = model.clone()
        keys = [key for key in model.model.state_dict() if key.endswith("attn1.to_q.weight")]
        generator = torch.Generator().manual_seed(3)
        model.add_patches(
            {
                key: ("diff", (0.3 * torch.randn(model.model.state_dict()[key].shape, generator=generator),))
                for key in keys
            },
            1.0,
        )
        return guide(model)

    noise = latents("sdxl", 9, 14, 2)
    first = same("sdxl", "mid", noise=noise)
    assert relative(same("sdxl", "mid", arrange=patched, noise=noise), first) > 1e-3
    assert torch.equal(same("sdxl", "mid", noise=noise), first)


def test_weights_that_stay_off_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with ``--lowvram``: layers cast their weights, and LoRA patches, in every forward pass."""
    noise = latents("sdxl", 9, 14, 1)
    first = same("sdxl", "mid", noise=noise)
    load = comfy.model_patcher.ModelPatcher.load

    def little(self: Any, *given: Any, **keywords: Any) -> Any:
        return load(self, *given, **{**keywords, "lowvram_model_memory": 64})

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "load", little)
    model = make_model("sdxl")
    guided = add_guidance(model, SPECS["seg 1.5"], "mid")
    assert relative(sample(guided, "sdxl", steps=2, noise=noise), first) < 2e-5


class Options:
    """Inputs of a guider's run."""

    noise = latents("sdxl", 8, 6, 1)
    positive, middle, negative = (conditioning("sdxl", seed) for seed in (2, 5, 3))


def run_guider(guider: Any, steps: int = 2) -> torch.Tensor:
    sampling = guider.model_patcher.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(Options.noise, torch.zeros_like(Options.noise), sampler, sigmas, disable_pbar=True, seed=4)


GUIDERS = {
    "BasicGuider": lambda model: BasicGuider.execute(model, Options.positive),
    "CFGGuider": lambda model: CFGGuider.execute(model, Options.positive, Options.negative, 4.0),
    "DualCFGGuider": lambda model: DualCFGGuider.execute(
        model, Options.positive, Options.middle, Options.negative, 4.0, 2.0, "regular"
    ),
    "DualCFGGuider nested": lambda model: DualCFGGuider.execute(
        model, Options.positive, Options.middle, Options.negative, 4.0, 2.0, "nested"
    ),
    "PerpNegGuider": lambda model: PerpNegGuider.execute(
        model, Options.positive, Options.negative, Options.middle, 4.0, 1.0
    ),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders(name: str) -> None:
    model, asked = small("sdxl"), SPECS["seg 1.5"]
    ours = add_guidance(model, asked, "mid")
    reference = independent("sdxl", LAYERS["sdxl"]["mid"], asked)
    latent = run_guider(GUIDERS[name](ours)[0])
    assert relative(latent, run_guider(GUIDERS[name](reference.on(model, "sdxl"))[0])) < 2e-5
    assert relative(latent, run_guider(GUIDERS[name](model)[0])) > 1e-3
    shares = name in ("BasicGuider", "CFGGuider")
    assert ("shared the model's own" if shares else "the guider or another node computes") in report(ours)


def test_a_guider_without_conditioning_is_refused() -> None:
    class Own(comfy.samplers.CFGGuider):
        def predict_noise(self, x: Any, timestep: Any, model_options: Any, seed: Any = None) -> Any:
            positive = self.conds["positive"]
            (c,) = comfy.samplers.calc_cond_batch(self.inner_model, [positive], x, timestep, model_options)
            return comfy.samplers.cfg_function(self.inner_model, c, c, 1.0, x, timestep, model_options)

    guider = Own(add_guidance(small("sdxl"), SPECS["pag"], "mid"))
    guider.set_conds(Options.positive, Options.negative)
    with pytest.raises(ValueError, match="this guider does not pass it to post-CFG functions; use another guider"):
        run_guider(guider)


def test_a_recording_serves_the_latents_that_it_was_made_of_alone() -> None:
    class Twice(comfy.samplers.CFGGuider):
        """Evaluates the model for two latents, and records for the first one."""

        def predict_noise(self, x: Any, timestep: Any, model_options: Any, seed: Any = None) -> Any:
            positive, given = self.conds["positive"], (timestep, model_options)
            comfy.samplers.sampling_function(self.inner_model, x.flip(-1), timestep, None, positive, 1.0, model_options)
            (c,) = comfy.samplers.calc_cond_batch(self.inner_model, [positive], x, *given)
            return comfy.samplers.cfg_function(self.inner_model, c, c, 1.0, x, *given, cond=positive)

    def run(guided: Any) -> torch.Tensor:
        guider = Twice(guided)
        guider.set_conds(Options.positive, Options.negative)
        return run_guider(guider)

    reference = independent("sdxl", LAYERS["sdxl"]["mid"], SPECS["seg 1.5"])
    reference_latent = run(reference.on(small("sdxl"), "sdxl"))
    assert relative(run(add_guidance(small("sdxl"), SPECS["seg 1.5"], "mid")), reference_latent) < 2e-5


@EITHER
@pytest.mark.parametrize("window", [(0.0, 0.5), (0.5, 1.0), (0.3, 0.7), (0.0, 0.001)])
def test_a_part_of_a_run(name: str, layers: str, window: tuple[float, float]) -> None:
    model, asked, options = small(name), SEG(scale=2.0, sigma=1.5, start=window[0], stop=window[1]), {"steps": 5}
    ours = add_guidance(model, asked, layers)
    reference = independent(name, LAYERS[name][layers], asked, window=window)
    latent = sample(ours, name, **options)
    assert relative(latent, sample(reference.on(model, name), name, **options)) < 2e-5
    acted = len(reference.moved) // len(reference.layers)
    assert 0 < acted < 5
    assert f"acted in {acted} of 5" in report(ours)


def test_two_windows_that_meet_at_a_steps_noise_level_act_once_in_every_step() -> None:
    for name, layers in (("sdxl", "mid"), ("flux", "1,4")):
        model = small(name)
        sampling = model.get_model_object("model_sampling")
        whole = add_guidance(model, PAG(scale=2.0), layers)
        for percent in (0.25, 0.5):
            level = sampling.percent_to_sigma(percent)
            halves = add_guidance(model, PAG(scale=2.0, stop=percent), layers)
            halves = add_guidance(halves, PAG(scale=2.0, start=percent), layers)
            sigmas = torch.tensor([float(sampling.sigma_max), level, 0.5 * level, 0.0])
            latent = [sample(guided, name, sigmas=sigmas) for guided in (whole, halves)]
            assert torch.equal(*latent)
            first, second = (guidance.report.acted for guidance in guidances_of(halves.model_options))
            assert first + second == 3
            assert first in (1, 2)


def test_percents_follow_a_noise_schedule_that_is_changed_afterwards() -> None:
    model, asked = small("sd3"), SEG(scale=2.0, sigma=1.5, stop=0.5)
    shift = node(ModelSamplingSD3, shift=8.0)
    shifted = [shift(add_guidance(model, asked, "1-2")), add_guidance(shift(model), asked, "1-2")]
    assert torch.equal(*(sample(guided, "sd3", steps=6) for guided in shifted))


def structure(options: Any) -> Any:
    """Return the keys of nested options and the identities of the objects in them."""
    if isinstance(options, dict):
        return {key: structure(value) for key, value in options.items()}
    return [structure(value) for value in options] if isinstance(options, list) else id(options)


class Interrupted(Exception):
    """Like ComfyUI's own exception, raised from a callback in the middle."""


@EITHER
@pytest.mark.parametrize("where", ["callback", "own forward", "perturbed forward"])
def test_nothing_is_left_of_an_interrupted_run(name: str, layers: str, where: str, monkeypatch: Any) -> None:
    model = small(name)
    guided = add_guidance(add_guidance(model, SPECS["seg 1.5"], layers), SPECS["pag"], layers)
    options_before = structure(guided.model_options), structure(model.model_options)
    plain, expected = sample(model, name), sample(guided, name)
    kept = watched(monkeypatch)
    stop = {"callback": 10**9, "own forward": 4, "perturbed forward": 5}[where]  # three forward passes per step
    calls = 0

    def maybe(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Interrupted

    def callback(step: int, *given: Any) -> None:
        if step == 1 and where == "callback":
            raise Interrupted

    handle = model.model.diffusion_model.register_forward_hook(maybe)
    try:
        with pytest.raises(Interrupted):
            sample(guided, name, callback=callback)
    finally:
        handle.remove()
    assert guidances_of(guided.model_options)[0].evaluation.recording is None
    gc.collect()
    assert kept
    assert not any(tensor() is not None for tensor in kept)
    assert "acted in" in report(guided)
    assert (structure(guided.model_options), structure(model.model_options)) == options_before
    assert torch.equal(sample(model, name), plain)
    assert torch.equal(sample(guided, name), expected)


def watched(monkeypatch: Any) -> list[weakref.ref[torch.Tensor]]:
    """Collect weak references to all recorded tensors."""
    references: list[weakref.ref[torch.Tensor]] = []
    keep = Recording.keep

    def watch(self: Recording, *given: Any, **keywords: Any) -> None:
        keep(self, *given, **keywords)
        references.extend(weakref.ref(rows) for place in self._kept.values() for rows in place.values())

    monkeypatch.setattr(Recording, "keep", watch)
    return references


@EITHER
def test_what_was_recorded_is_released_in_every_step(name: str, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    guided = add_guidance(small(name), SPECS["seg 1.5"], layers)
    kept = watched(monkeypatch)
    alive: list[int] = []
    gc.disable()  # memory must be released without the cyclic garbage collector
    try:
        sample(guided, name, callback=lambda *given: alive.append(sum(tensor() is not None for tensor in kept)))
    finally:
        gc.enable()
    assert kept
    assert alive == [0, 0, 0]


@EITHER
def test_runs_repeat_whatever_ran_between(name: str, layers: str) -> None:
    model = small(name)
    plain = sample(model, name)
    options = structure(model.model_options)
    guided = add_guidance(model, SPECS["seg 1.5"], layers)
    first = sample(guided, name)
    assert structure(model.model_options) == options
    sample(guided, name, steps=5, noise=latents(name, 8, 6, 1), cfg=1.0)
    other = add_guidance(guided, SPECS["pag"], layers)
    both = sample(other, name)
    assert torch.equal(sample(guided, name), first)
    assert torch.equal(sample(model, name), plain)
    assert torch.equal(sample(other, name), both)
    assert len(guidances_of(guided.model_options)) == 1
    assert relative(both, first) > 1e-3


@pytest.mark.parametrize(
    "spec, words",
    [
        (SEG(scale=0.0), "It had no effect: its scale is 0."),
        (SEG(sigma=0.0), "It had no effect: its sigma is 0."),
        (PAG(start=0.95, stop=0.96), "It had no effect: no step is between start_percent 0.95 and end_percent 0.96."),
    ],
)
def test_guidance_that_does_nothing_says_why_and_costs_nothing(spec: SEG | PAG, words: str) -> None:
    model = small("sdxl")
    guided = add_guidance(model, spec, "mid")
    with forwards(model) as outputs:
        latent = sample(guided, "sdxl")
    assert len(outputs) == 3
    assert torch.equal(latent, sample(model, "sdxl"))
    assert words in report(guided)
    assert "acted in 0 of 3 evaluations" in report(guided)


def test_a_report_before_any_run() -> None:
    assert "has not run" in report(add_guidance(small("sdxl"), PAG(), "mid"))


def test_guidance_at_a_noise_level_of_zero() -> None:
    model = small("flux")
    guided = add_guidance(model, PAG(scale=2.0), "1")
    sigmas = torch.tensor([0.5, 0.0, 0.0])
    sample(guided, "flux", sigmas=sigmas)
    assert "acted in 2 of 2" in report(guided)


@pytest.mark.parametrize("layers", ["middle.7", "x", "d99", "mid,nothing", "7", "0-99", "input.3.0.0"])
def test_unknown_layers(layers: str) -> None:
    with pytest.raises(ValueError, match=f"unknown layer '{layers.split(',')[-1]}'; valid names are"):
        add_guidance(small("sdxl"), PAG(), layers)


def test_models_that_are_not_known() -> None:
    model = small("sdxl").clone()
    model.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match="guidance does not support Linear; supported are Stable Diffusion 1, 2 and XL, Flux"
    ):
        add_guidance(model, PAG(), "mid")
    with pytest.raises(ValueError, match="there is no default layer for this model; name one or more of"):
        add_guidance(small("flux"), PAG(), " , ")


def test_a_compiled_transformer_that_forgets_its_options_is_refused() -> None:
    """TorchCompileModel drops the guards on options, so all forward passes use the options of the first."""
    guided = add_guidance(small("flux"), PAG(scale=2.0), "1").clone()

    def forgetful(executor: Any, *given: Any, **rest: Any) -> Any:
        def old(x: Any) -> Any:
            return {k: v for k, v in x.items() if k != "segkern_latents"} if isinstance(x, dict) else x

        return executor(*map(old, given), **rest)

    guided.add_wrapper_with_key("diffusion_model", "forgetful", forgetful)
    with pytest.raises(RuntimeError, match=r"another node \(TorchCompileModel\) compiles .*; remove that node"):
        sample(guided, "flux", steps=1)


@pytest.mark.parametrize("name, layers", [("sdxl", "middle.0.1"), ("flux", "1,4")])
def test_layers_that_another_node_skips_are_refused(name: str, layers: str) -> None:
    guided = add_guidance(small(name), PAG(scale=2.0), layers).clone()
    patches = guided.model_options["transformer_options"].setdefault("patches", {})
    if name == "sdxl":
        patches["forward_timestep_embed_patch"] = [(SpatialTransformer, lambda layer, x, *given: x)]
    else:
        guided.set_model_patch_replace(lambda given, extra: given, "dit", "single_block", 1)
    missing = "middle.0.1" if name == "sdxl" else "single.1"
    with pytest.raises(RuntimeError, match=f"could not reach the attention of {missing}: another node replaces"):
        sample(guided, name, steps=1)

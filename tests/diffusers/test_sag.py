# SPDX-License-Identifier: Apache-2.0
"""Self-Attention Guidance on stock pipelines: equal to diffusers' on SD 1, and to a separate loop on SDXL."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    StableDiffusionSAGPipeline,
    UniPCMultistepScheduler,
)

from segkern.integrations.diffusers import CFG, SAG, SEG, guide
from segkern.integrations.diffusers.runtime.sag_blur import levels
from tests.compatibility import proves
from tests.diffusers.probes import hooks_of
from tests.diffusers.slow_guidance import conditions
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline, tiny_sd


def theirs(pipe: Any, scale: float, **arguments: Any) -> torch.Tensor:
    """diffusers' pipeline leaves a processor in a layer that it did not save by name; our run must not use it."""
    original = dict(pipe.unet.attn_processors)
    try:
        return run(pipe, sag_scale=scale, **arguments)
    finally:
        pipe.unet.set_attn_processor(original)
        for module in pipe.unet.modules():
            module._forward_hooks.clear()


@pytest.mark.one_in(5)
@proves(model="Stable Diffusion 1", task="text to image", guidance="SAG")
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "without CFG"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_it_is_that_of_the_pipeline_with_sag(prediction: str, guidance_scale: float) -> None:
    """Compares with latents of diffusers' own SAG pipeline, for denoisers that predict noise, v or the image."""
    arguments = {"latents": noise(2, 16, 24), "guidance_scale": guidance_scale, "num_images_per_prompt": 2}
    expected = theirs(tiny_sd(StableDiffusionSAGPipeline, prediction_type=prediction), 0.75, **arguments)
    pipe = tiny_sd(prediction_type=prediction)
    plain = run(pipe, **arguments)
    with guide(pipe, SAG()) as guidance:
        ours = run(pipe, **arguments)
    assert relative(ours, expected) < PIPELINE_TOLERANCE
    assert relative(ours, plain) > 1e-3
    (row,) = guidance.report().layers
    assert row.layer == "m0"
    assert row.fired == 3
    assert row.moved is not None
    assert 0.0 < row.moved < 1.0
    assert torch.equal(run(pipe, **arguments), plain)
    assert hooks_of(pipe.unet) == 0


@torch.no_grad()
def sag_run(pipe: Any, latents: torch.Tensor, guidance_scale: float, steps: int, scale: float, layer: Any) -> Any:
    """Compute SDXL with SAG by definition: a matrix of attention, a 2-D convolution, the scheduler's noise."""
    cfg = guidance_scale > 1.0
    conditional, unconditional = conditions(pipe, "a red fox", latents, 1, cfg)
    degraded_prompt = unconditional if cfg else conditional
    seen: list[torch.Tensor] = []

    def mass(module: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        q, k = (lin(x[:1]).unflatten(-1, (module.heads, -1)).transpose(1, 2) for lin in (module.to_q, module.to_k))
        seen.append((q @ k.transpose(-2, -1) * module.scale).softmax(-1).mean(1).sum(1))

    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    x = latents * scheduler.init_noise_sigma
    grid = (
        latents.shape[2] // 2 ** (len(pipe.unet.down_blocks) - 1),
        latents.shape[3] // 2 ** (len(pipe.unet.down_blocks) - 1),
    )
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        hook = layer.register_forward_pre_hook(mass, with_kwargs=True)
        u = pipe.unet(scaled, t, **degraded_prompt).sample
        hook.remove()
        c = pipe.unet(scaled, t, **conditional).sample
        guided = u + guidance_scale * (c - u)
        if isinstance(scheduler, EulerDiscreteScheduler):
            sigma = scheduler.sigmas[scheduler.step_index]
        else:
            kept = scheduler.alphas_cumprod[int(t)]
            sigma = ((1 - kept) / kept) ** 0.5
        signal, amount = 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5
        clean = (scaled - amount * u) / signal
        mask = F.interpolate((seen.pop() > 1.0).float().view(1, 1, *grid), latents.shape[2:])
        taps = torch.exp(-0.5 * torch.linspace(-4, 4, 9) ** 2)
        kernel = torch.outer(taps, taps) / taps.sum() ** 2
        smooth = F.conv2d(F.pad(clean, (4,) * 4, mode="reflect"), kernel.expand(4, 1, 9, 9), groups=4)
        degraded = signal * (smooth * mask + clean * (1 - mask)) + amount * u
        guided = guided + scale * (u - pipe.unet(degraded, t, **degraded_prompt).sample)
        x = scheduler.step(guided, t, x).prev_sample
    return x


@pytest.mark.one_in(3)
@proves(model="Stable Diffusion XL", task="text to image", guidance="SAG")
@pytest.mark.parametrize("guidance_scale", [5.0, 1.0], ids=["CFG", "without CFG"])
@pytest.mark.parametrize("scheduler", ["Euler", "DDIM"])
def test_stable_diffusion_xl_is_guided_by_the_same_definition(scheduler: str, guidance_scale: float) -> None:
    """Compares with latents of a loop that follows the paper's definition, for two schedulers.

    Euler's latents have growing variance, and its timesteps are not integers.
    """
    pipe = tiny_pipeline(own_unet=True)
    if scheduler == "Euler":
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="linspace")
    else:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    latents = noise(1, 16, 24)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    for weight in (layer.to_q.weight, layer.to_k.weight):
        weight.data *= 3.0  # attention far from uniform, so that no mass is close to the threshold
    expected = sag_run(pipe, latents, guidance_scale, 3, 0.75, layer)
    with guide(pipe, SAG()):
        ours = run(pipe, latents=latents, guidance_scale=guidance_scale)
    assert relative(ours, expected) < PIPELINE_TOLERANCE
    assert relative(ours, run(pipe, latents=latents, guidance_scale=guidance_scale)) > 1e-3


def test_beside_a_cfg_spec_the_negative_branch_is_degraded() -> None:
    """Together, they equal the pipeline's own guidance with SAG."""
    pipe = tiny_sd()
    arguments = {"latents": noise(2, 16, 24), "num_images_per_prompt": 2}
    with guide(pipe, SAG(), SEG(sigma=2.0)):
        expected = run(pipe, guidance_scale=5.0, **arguments)
    with guide(pipe, CFG(4.0), SAG(), SEG(sigma=2.0)):
        assert relative(run(pipe, guidance_scale=1.0, **arguments), expected) < PIPELINE_TOLERANCE
    with pytest.raises(ValueError, match=r"CFG.reuse must be 1 with SAG"):
        guide(pipe, CFG(reuse=2), SAG())


def test_lists_that_the_denoiser_takes_apart_are_whole_for_the_second_forward() -> None:
    """A T2I-Adapter's residuals are popped from the list that the pipeline passes."""
    pipe = tiny_sd()
    residuals = [0.3 * torch.randn(2, c, *s) for c, s in ((32, (16, 16)), (64, (8, 8)))]
    given = {"encoder_hidden_states": torch.randn(2, 77, pipe.unet.config.cross_attention_dim)}
    pipe.scheduler.set_timesteps(10)
    seen = []
    t = pipe.scheduler.timesteps[5]
    inner = pipe.unet.down_blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("additional_residuals")), with_kwargs=True
    )
    guidance = guide(pipe, SAG(), cfg="batch")
    with torch.no_grad(), guidance, guidance.run(pipe.scheduler.timesteps):
        pipe.unet(noise().repeat(2, 1, 1, 1), t, down_intrablock_additional_residuals=list(residuals), **given)
    inner.remove()
    first, second = seen
    assert torch.equal(first[:1], second)


def test_with_others_its_part_is_added() -> None:
    """Uses one step: the prediction is linear in the differences, so two methods move it by the sum of both."""
    pipe = tiny_sd()
    arguments = {"latents": noise(), "num_inference_steps": 1}
    outputs = {}
    for name, specs in {"none": (), "both": (SEG(sigma=2.0), SAG()), "seg": (SEG(sigma=2.0),), "sag": (SAG(),)}.items():
        if not specs:
            outputs[name] = run(pipe, **arguments).double()
            continue
        with guide(pipe, *specs):
            outputs[name] = run(pipe, **arguments).double()
    moved = outputs["both"] - outputs["none"]
    apart = outputs["seg"] + outputs["sag"] - 2 * outputs["none"]
    assert relative(moved, apart) < 1e-4


def test_steps_outside_of_its_part_of_the_run_are_plain() -> None:
    pipe = tiny_sd()
    calls = []
    handle = pipe.unet.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    with guide(pipe, SAG(stop=0.5)):
        run(pipe, latents=noise(), num_inference_steps=4)
    handle.remove()
    # Other hooks see every call: two guided steps with a second call each, and two unguided steps.
    assert sorted(calls) == [1, 1, 2, 2, 2, 2]


SCHEDULERS = {
    "Euler": lambda: EulerDiscreteScheduler(timestep_spacing="linspace"),
    "Euler, Karras": lambda: EulerDiscreteScheduler(use_karras_sigmas=True),
    "Euler, exponential": lambda: EulerDiscreteScheduler(use_exponential_sigmas=True),
    "Heun": lambda: HeunDiscreteScheduler(),
    "KDPM2, Karras": lambda: KDPM2DiscreteScheduler(use_karras_sigmas=True),
    "DPM++, Karras": lambda: DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "UniPC": lambda: UniPCMultistepScheduler(),
    "DDIM": lambda: DDIMScheduler(clip_sample=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_noise_level_is_that_of_every_call_of_a_run(name: str) -> None:
    """Rounded timesteps repeat, and those of second-order calls are not integers."""
    scheduler = SCHEDULERS[name]()
    scheduler.set_timesteps(60)
    sigmas = getattr(scheduler, "sigmas", None)
    x = torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    for call, t in enumerate(scheduler.timesteps):
        signal, amount = levels(scheduler, t)
        assert signal**2 + amount**2 == pytest.approx(1.0)
        ones = scheduler.scale_model_input(torch.ones(1, dtype=torch.float64), t)
        if float(ones) != 1.0:
            assert signal == pytest.approx(float(ones), rel=1e-6)
        elif sigmas is not None:
            assert amount / signal == pytest.approx(float(sigmas[call]), rel=1e-5)
        else:
            assert signal**2 == pytest.approx(float(scheduler.alphas_cumprod[t]), rel=1e-5)
        x = scheduler.step(0.1 * torch.ones_like(x), t, x).prev_sample


def test_an_input_of_nothing_but_noise() -> None:
    """With zero terminal signal-to-noise ratio, predicted v determines the image, but predicted noise does not."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(4)
    assert levels(scheduler, scheduler.timesteps[0]) == pytest.approx((0.0, 1.0), abs=1e-6)
    pipe = tiny_sd(scheduler=DDIMScheduler.from_config(scheduler.config, prediction_type="v_prediction"))
    with guide(pipe, SAG()):
        assert run(pipe, latents=noise()).isfinite().all()
    pipe = tiny_sd(scheduler=scheduler)
    with pytest.raises(ValueError, match="pure noise"), guide(pipe, SAG()):
        run(pipe, latents=noise())


def test_projections_that_cannot_be_taken_apart_are_whole() -> None:
    pipe = tiny_sd(unet=copy.deepcopy(tiny_sd().unet))
    pipe.unet.fuse_qkv_projections()
    with guide(pipe, SAG()):
        expected = run(pipe, latents=noise())
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    handle = layer.to_qkv.register_forward_hook(lambda module, args, output: output * 1.5)
    with guide(pipe, SAG()):
        hooked = run(pipe, latents=noise())
    handle.remove()
    layer.to_qkv.weight.data *= 1.5
    with guide(pipe, SAG()):
        assert relative(hooked, run(pipe, latents=noise())) < PIPELINE_TOLERANCE
    assert relative(hooked, expected) > 1e-3


def test_what_it_cannot_degrade_is_refused() -> None:
    pipe = tiny_sd()
    before = dict(pipe.unet.attn_processors)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"SAG needs a scheduler with alphas_cumprod.*FlowMatchEuler"):
        guide(pipe, SAG())
    pipe = tiny_sd()
    with pytest.raises(ValueError, match=r"SAG.layer='mid' must name one layer|unknown layer"):
        guide(tiny_pipeline(), SAG(layer="mid"))
    with pytest.raises(ValueError, match=r"SAG.kernel_size must be an odd integer of at least 3, got 4"):
        SAG(kernel_size=4)
    with pytest.raises(ValueError, match=r"SAG.sigma must be a positive number of pixels, got 0"):
        SAG(sigma=0)
    with pytest.raises(ValueError, match="kernel_size=33 does not fit latents"), guide(pipe, SAG(kernel_size=33)):
        run(pipe, latents=noise())
    assert pipe.unet.attn_processors == before
    assert hooks_of(pipe.unet) == 0

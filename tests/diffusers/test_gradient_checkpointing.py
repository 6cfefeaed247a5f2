# SPDX-License-Identifier: Apache-2.0
"""Gradients of guided runs with gradient checkpointing equal those without it, whenever the backward pass runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, SLG, TPG, guide
from tests.diffusers.probes import hooks_of
from tests.diffusers.small_pipelines import noise, relative, smaller_pipeline
from tests.diffusers.transformer_cases import MODELS


def small() -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """Return a UNet and a short differentiable run of its pipeline with variable arguments."""
    pipe = smaller_pipeline()
    given = {"prompt": "a red fox", "latents": noise(1, 8, 8), "num_inference_steps": 2, "guidance_scale": 5.0}
    return pipe.unet, partial(differentiable, pipe, **given)


def transformer(name: str) -> tuple[nn.Module, Callable[..., torch.Tensor]]:
    """Return a transformer and a short differentiable run of its pipeline."""
    model = MODELS[name]
    pipe = model.build()
    cfg = name != "qwen-image"  # its scale is unknown if the call is not observed
    given = model.call(4, 4, 1, cfg) | {"height": 4 * model.factor, "width": 4 * model.factor}
    return pipe.transformer, partial(differentiable, pipe, **given, num_inference_steps=2)


def differentiable(
    pipe: Any,
    specs: Sequence[Any] = (),
    share: bool = True,
    loss: Callable[..., None] | None = None,
    trust: Sequence[Any] = (),
    **given: Any,
) -> torch.Tensor:
    """Return a weighted sum of a guided run's latents; ``loss`` receives it before guidance is removed."""
    if "latents" in given:
        given |= {"height": pipe.vae_scale_factor * given["latents"].shape[2]}
        given |= {"width": pipe.vae_scale_factor * given["latents"].shape[3]}
    kind: Any = type(pipe)
    call = partial(kind.__call__.__wrapped__, pipe, output_type="latent")  # without no_grad
    generator = torch.Generator().manual_seed(5)

    def total() -> torch.Tensor:
        output = call(generator=generator, **given)
        latents = output.images if hasattr(output, "images") else output.frames
        return (latents * torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))).sum()

    if not specs:
        return total()
    with guide(pipe, *specs, share=share, trust=trust) as guidance:
        result = total()
        if loss is not None:
            before = guidance.report()
            loss(result)
            if loss is torch.Tensor.backward:
                assert guidance.report() == before, "a recomputation was counted as a call"
    return result


def gradients(model: nn.Module, act: Callable[[], Any]) -> torch.Tensor:
    """Return the gradients of all parameters."""
    model.zero_grad()
    act()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def reentrant(module: Any, *args: Any) -> Any:
    return checkpoint(module, *args, use_reentrant=True)


def of_bound_method(module: Any, *args: Any) -> Any:
    return checkpoint(module.__call__, *args, use_reentrant=False, preserve_rng_state=False)


SPECS = {
    "SEG": (SEG(sigma=1.0, layers="mid"),),
    "SEG of infinite sigma": (SEG(layers=["d0", "u0"]),),
    "SEG with a stride": (SEG(sigma=2.0, layers="mid", query_stride=2, blend=0.5),),
    "PAG": (PAG(layers="m0"),),
    "SAG": (SAG(),),
    "SLG": (SLG(layers="mid", start=0.0, stop=1.0),),
    "TPG": (TPG(layers=["d0", "u0"]),),
    "several": (SEG(sigma=1.0, layers="u0"), PAG(layers="mid"), SAG()),
}


@pytest.mark.robustness
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("specs", SPECS.values(), ids=SPECS)
def test_gradients_are_those_without_checkpointing(specs: Sequence[Any], share: bool) -> None:
    unet, run = small()
    expected = gradients(unet, lambda: run(specs, share).backward())
    assert relative(gradients(unet, lambda: run().backward()), expected) > 1e-4, "guidance would not be detected"
    unet.enable_gradient_checkpointing()
    functions = {id(module): vars(module).get("_gradient_checkpointing_func") for module in unet.modules()}
    after = gradients(unet, lambda: run(specs, share).backward())
    inside = gradients(unet, lambda: run(specs, share, loss=torch.Tensor.backward))
    assert relative(after, expected) < 1e-6
    assert relative(inside, expected) < 1e-6
    assert hooks_of(unet) == 0
    assert functions == {id(module): vars(module).get("_gradient_checkpointing_func") for module in unet.modules()}


def test_with_a_guidance_that_leads_away_from_a_text() -> None:
    unet, run = small()
    specs = (CFG(scale=3.0, negative_prompt="blurry"), SEG(sigma=1.0, layers="u0"))
    expected = gradients(unet, lambda: run(specs, guidance_scale=1.0).backward())
    unet.enable_gradient_checkpointing()
    assert relative(gradients(unet, lambda: run(specs, guidance_scale=1.0).backward()), expected) < 1e-6


@pytest.mark.one_in(4)
@pytest.mark.parametrize(
    "name", ["sd3", "sd3.5", "flux", "qwen-image", "pixart-sigma", "wan", "flux2-klein", "cogvideox"]
)
def test_transformers(name: str) -> None:
    model, run = transformer(name)
    layers = MODELS[name].layers
    for spec in (SEG(sigma=1.0, layers=layers), PAG(layers=layers), SLG(1.0, layers, 0.0, 1.0), TPG(layers=layers)):
        model.disable_gradient_checkpointing()
        expected = gradients(model, lambda spec=spec: run((spec,)).backward())
        model.enable_gradient_checkpointing()
        after = gradients(model, lambda spec=spec: run((spec,)).backward())
        inside = gradients(model, lambda spec=spec: run((spec,), loss=torch.Tensor.backward))
        assert relative(after, expected) < 1e-6
        assert relative(inside, expected) < 1e-6


@pytest.mark.parametrize("function", [reentrant, of_bound_method])
def test_another_checkpointing_function(function: Callable[..., Any]) -> None:
    unet, run = small()
    specs, latents = (SEG(sigma=1.0, layers=["d0", "mid"]),), noise(1, 8, 8).requires_grad_()
    expected = gradients(unet, lambda: run(specs, latents=latents).backward())
    unet.enable_gradient_checkpointing(function)
    # Nested backward passes add the gradients of a parameter in another order.
    assert relative(gradients(unet, lambda: run(specs, latents=latents).backward()), expected) < 1e-5


def test_other_forwards_come_before_backward() -> None:
    """Other guided calls, sizes and batches, and unguided calls; each is recomputed with its own plan."""
    unet, run = small()

    def act() -> None:
        losses = [
            run((SEG(sigma=1.0, layers="mid"),)),
            run(),
            run((PAG(layers="u0"), SEG(layers="d0")), False, latents=noise(1, 16, 8)),
            run((SEG(sigma=2.0, layers="u0", start=0.5),), prompt=["a", "b"], latents=noise(2, 8, 16)),
        ]
        for loss in (losses[2], losses[0], losses[3], losses[1]):
            loss.backward()

    expected = gradients(unet, act)
    unet.enable_gradient_checkpointing()
    assert relative(gradients(unet, act), expected) < 1e-6


def test_backward_in_the_middle_of_another_run() -> None:
    unet, run = small()

    def act() -> None:
        losses = [run((SEG(sigma=1.0, layers="mid"),))]

        def between(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if losses:
                losses.pop().backward(retain_graph=True)
            return kwargs

        with torch.no_grad():
            drawn.append(run((PAG(layers=["d0", "u0"]),), callback_on_step_end=between))

    drawn: list[torch.Tensor] = []
    expected = gradients(unet, act)
    unet.enable_gradient_checkpointing()
    assert relative(gradients(unet, act), expected) < 1e-6
    assert torch.equal(*drawn)


def test_backward_while_another_thread_draws() -> None:
    unet, run = small()
    specs = (SEG(sigma=1.0, layers=["d0", "mid"]),)
    drawn: list[torch.Tensor] = []

    def draw() -> None:
        with torch.no_grad():
            drawn.append(run(latents=noise(1, 16, 8)))

    def beside(loss: torch.Tensor) -> None:
        """Run the backward pass of one run during another guided run."""
        threads = [threading.Thread(target=loss.backward), threading.Thread(target=draw)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def one_by_one(loss: torch.Tensor) -> None:
        loss.backward()
        draw()

    expected = gradients(unet, lambda: run(specs, loss=one_by_one))
    unet.enable_gradient_checkpointing()
    assert relative(gradients(unet, lambda: run(specs, loss=beside)), expected) < 1e-6
    assert torch.equal(*drawn)


def test_what_is_checkpointed_may_be_checkpointed_inside() -> None:
    """A whole transformer is checkpointed, and its blocks again, so the blocks are computed three times."""
    unet, run = small()
    specs = (SEG(sigma=1.0, layers=["d0", "mid"]), PAG(layers="u0"))
    expected = gradients(unet, lambda: run(specs).backward())
    unet.enable_gradient_checkpointing()
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for attention in getattr(block, "attentions", None) or ():
            attention.forward = partial(_whole, block, attention, attention.forward)
    assert relative(gradients(unet, lambda: run(specs, trust=[_whole]).backward()), expected) < 1e-6


def _whole(block: Any, module: Any, forward: Callable[..., Any], hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    return block._gradient_checkpointing_func(_Bound(module, partial(forward, **kwargs)), hidden_states)


class _Bound:
    def __init__(self, module: Any, function: Callable[..., Any]) -> None:
        self.__self__, self._function = module, function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _checkpointed(forward: Callable[..., Any], reentrant_: bool, *args: Any, **kwargs: Any) -> Any:
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant_)


@pytest.mark.parametrize("reentrant_", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpoint_that_says_nothing_is_refused(reentrant_: bool) -> None:
    """The backward pass would repeat the block without guidance."""
    unet, run = small()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    block.forward = partial(_checkpointed, block.forward, reentrant_)
    with pytest.raises(RuntimeError, match=r"mid_block.*enable_gradient_checkpointing"):
        run((SEG(sigma=1.0, layers="mid"),), trust=[_checkpointed])
    assert hooks_of(unet) == 0
    with torch.no_grad():
        assert run((SEG(sigma=1.0, layers="mid"),), trust=[_checkpointed]).isfinite()


def test_saved_tensors_may_be_kept_elsewhere() -> None:
    unet, run = small()
    specs = (SEG(sigma=1.0, layers="mid"),)
    expected = gradients(unet, lambda: run(specs).backward())
    unet.enable_gradient_checkpointing()
    with torch.autograd.graph.save_on_cpu():
        assert relative(gradients(unet, lambda: run(specs).backward()), expected) < 1e-6


@pytest.mark.parametrize("wrapped", [False, True], ids=["in place", "wrapped"])
def test_checkpointing_inside_of_a_compiled_denoiser_is_refused(wrapped: bool) -> None:
    pipe = smaller_pipeline()
    run = partial(differentiable, pipe, prompt="a red fox", latents=noise(1, 8, 8), num_inference_steps=1)
    pipe.unet.enable_gradient_checkpointing()
    if wrapped:
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="compile_repeated_blocks"):
        run((SEG(sigma=1.0, layers="mid"),))
    torch._dynamo.reset()


def loop(unet: nn.Module, given: dict[str, Any], layout: str, call: Callable[..., Any]) -> torch.Tensor:
    """Return the latents of a custom denoising loop, which require gradients."""
    latents = noise(1, 8, 8).requires_grad_(True)
    for timestep in (999.0, 500.0):
        if layout == "batch":
            added = {name: torch.cat([value] * 2) for name, value in given["added_cond_kwargs"].items()}
            text = torch.cat([given["encoder_hidden_states"]] * 2)
            both: dict[str, Any] = {"encoder_hidden_states": text, "added_cond_kwargs": added}
            u, c = call(unet, torch.cat([latents] * 2), timestep, **both)[0].chunk(2)
        else:
            c = call(unet, latents, timestep, **given)[0]
            u = call(unet, latents, timestep, **given)[0] if layout == "separate" else c
        latents = latents - 0.3 * (u + 5.0 * (c - u))
    return latents


@pytest.mark.parametrize("layout", ["batch", "separate", "none"])
@pytest.mark.parametrize("reentrant_", [False, True], ids=["not reentrant", "reentrant"])
def test_a_checkpoint_of_whole_calls_is_refused_and_one_of_the_run_is_right(layout: Any, reentrant_: bool) -> None:
    pipe = smaller_pipeline()
    unet: nn.Module = pipe.unet
    text, _, pooled, _ = (x.detach() for x in pipe.encode_prompt("a red fox"))
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])}
    given = {"encoder_hidden_states": text, "added_cond_kwargs": added}

    def whole(unet: nn.Module, latents: torch.Tensor, timestep: float, **kwargs: Any) -> Any:
        return checkpoint(lambda x: unet(x, timestep, **kwargs), latents, use_reentrant=reentrant_)

    def guided(call: Callable[..., Any]) -> torch.Tensor:
        with guide(unet, SEG(sigma=1.0, layers="m0"), cfg=layout) as guidance, guidance.run([999.0, 500.0]):
            return loop(unet, given, layout, call)

    with pytest.raises(RuntimeError, match=r"under torch.utils.checkpoint.*enable_gradient_checkpointing"):
        guided(whole)
    assert hooks_of(unet) == 0
    expected = gradients(unet, lambda: guided(nn.Module.__call__).square().sum().backward())
    anchor = torch.ones((), requires_grad=True)

    def checkpointed_run() -> None:
        run = checkpoint(lambda x: x * guided(nn.Module.__call__), anchor, use_reentrant=reentrant_)
        run.square().sum().backward()

    assert relative(gradients(unet, checkpointed_run), expected) < 1e-6
    with torch.no_grad():
        assert guided(lambda unet, latents, *args, **kwargs: unet(latents.detach(), *args, **kwargs)).isfinite().all()

# SPDX-License-Identifier: Apache-2.0
"""Caches, replaced forwards, and unknown processors and blocks: refused by name, or correct if the user trusts them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLPAGPipeline, hooks
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0
from torch import nn

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, PAGGuider, SEGGuider, guide
from tests.diffusers.modular_pipelines import modular_sdxl, modular_transformer, run_sdxl
from tests.diffusers.modular_pipelines import run_transformer as run_modular
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.test_pag_pipelines import other
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer

FLUX = MODELS["flux"]


def first_block(model: nn.Module) -> None:
    hooks.apply_first_block_cache(model, hooks.FirstBlockCacheConfig(threshold=10.0))


def broadcast(model: nn.Module) -> None:
    hooks.apply_pyramid_attention_broadcast(
        model,
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_block_identifiers=("transformer_blocks",),
            current_timestep_callback=lambda: 500,
        ),
    )


def faster(model: nn.Module) -> None:
    config = hooks.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=("transformer_blocks",),
        tensor_format="BCHW",
        is_guidance_distilled=True,
        current_timestep_callback=lambda: 500,
    )
    hooks.apply_faster_cache(model, config)


def magnitudes(model: nn.Module) -> None:
    hooks.apply_mag_cache(model, hooks.MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)))


def taylor(model: nn.Module) -> None:
    hooks.apply_taylorseer_cache(model, hooks.TaylorSeerCacheConfig())


def skipped(model: nn.Module) -> None:
    hooks.apply_layer_skip(model, hooks.LayerSkipConfig(indices=[1], fqn="transformer_blocks"))


class Mine(ModelHook):
    """A custom hook that keeps no state according to diffusers."""


def mine(model: nn.Module) -> None:
    HookRegistry.check_if_exists_or_initialize(model.get_submodule("transformer_blocks.1")).register_hook(Mine(), "my")


CACHES: dict[str, Callable[[nn.Module], None]] = {
    f.__name__: f for f in (first_block, broadcast, faster, magnitudes, taylor)
}


@pytest.mark.parametrize("apply", [*CACHES.values(), skipped, mine], ids=lambda apply: apply.__name__)
def test_hooks_of_diffusers_registry_are_refused(apply: Callable[[nn.Module], None]) -> None:
    pipe = FLUX.build()
    apply(pipe.transformer)
    with pytest.raises(ValueError, match="with a cache.*remove_hook" if apply in CACHES.values() else "with a hook"):
        guide(pipe, SEG(layers=FLUX.layers))


@pytest.mark.parametrize("apply", [first_block, skipped], ids=lambda apply: apply.__name__)
@pytest.mark.parametrize("start", [0.0, 0.5])
def test_a_cache_that_comes_between_runs_is_refused_before_the_first_step(
    start: float, apply: Callable[[nn.Module], None]
) -> None:
    pipe, steps = FLUX.build(), []
    with guide(pipe, SEG(layers=FLUX.layers, start=start)):
        run_transformer(FLUX, pipe)
        apply(pipe.transformer)
        with pytest.raises(ValueError, match="FluxTransformer2DModel with a"):
            run_transformer(FLUX, pipe, callback_on_step_end=lambda *a: steps.append(1) or {})
    assert not steps


def test_a_cache_that_comes_within_a_run_is_refused_in_the_next_step() -> None:
    pipe, steps = FLUX.build(), []

    def apply(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        steps.append(step)
        if step == 0:
            first_block(pipe.transformer)
        return {}

    with guide(pipe, SEG(layers=FLUX.layers)), pytest.raises(ValueError, match="with a cache"):
        run_transformer(FLUX, pipe, callback_on_step_end=apply)
    assert steps == [0]


def test_the_registrys_hook_for_blurred_queries_is_refused() -> None:
    """It is diffusers' own hook, which its guider never attaches."""
    from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook

    pipe = tiny_pipeline(own_unet=True)
    query = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    HookRegistry.check_if_exists_or_initialize(query).register_hook(SmoothedEnergyGuidanceHook(), "seg")
    with pytest.raises(ValueError, match=r"with a hook: mid_block\S+attn1.to_q .* has 'seg'.*SmoothedEnergyGuidance"):
        guide(pipe, PAG())


def test_hooks_that_only_move_or_cast_weights_are_none_of_it() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    with guide(pipe, SEG()):
        expected = run(pipe, latents=latents)
    pipe.unet.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    hooks.apply_layerwise_casting(pipe.unet, storage_dtype=torch.float32, compute_dtype=torch.float32)
    with guide(pipe, SEG()):
        assert torch.equal(run(pipe, latents=latents), expected)


class Keeper:
    """Replaces forwards of deep blocks: every second step returns the previous result, like DeepCache."""

    def __init__(self, unet: Any) -> None:
        self.calls = 0
        self.kept: dict[str, Any] = {}
        for name, block in {"mid": unet.mid_block, "up": unet.up_blocks[0]}.items():
            block.forward = self.wrapped(name, block.forward)

    def wrapped(self, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)  # this hides its origin
        def kept(*args: Any, **kwargs: Any) -> Any:
            self.calls += name == "mid"
            if self.calls % 2:
                self.kept[name] = forward(*args, **kwargs)
            return self.kept[name]

        return kept


@pytest.mark.parametrize("spec", [PAG(), PAG(stop=0.5), SAG(), PAG(layers="down")], ids=str)
def test_replaced_forwards_are_refused(spec: Any) -> None:
    pipe = tiny_pipeline(own_unet=True)
    Keeper(pipe.unet)
    with pytest.raises(ValueError, match=r"(mid|up)_block.*replaced by tests\S+kept: .*DeepCache"):
        guide(pipe, spec)


def test_replaced_forwards_that_are_trusted() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    block = pipe.unet.mid_block

    def less(*args: Any, forward: Any = block.forward, **kwargs: Any) -> Any:
        return 0.5 * forward(*args, **kwargs)

    block.forward = less
    expected = run(other(StableDiffusionXLPAGPipeline, pipe, "mid_block"), latents=latents, pag_scale=3.0)
    for trusted in (less, block.forward):
        with guide(pipe, PAG(), trust=[trusted]):
            assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE


def test_a_cache_that_is_trusted_does_as_in_diffusers_pag_where_every_step_is_guided() -> None:
    latents = noise()
    pipe = tiny_pipeline(own_unet=True)
    Keeper(pipe.unet)
    expected = run(other(StableDiffusionXLPAGPipeline, pipe, "mid_block"), latents=latents, pag_scale=3.0)
    pipe = tiny_pipeline(own_unet=True)
    Keeper(pipe.unet)
    with guide(pipe, PAG(), trust=[pipe.unet.mid_block.forward]):
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE


def test_forwards_replaced_between_runs_and_within_one() -> None:
    pipe, steps = tiny_pipeline(own_unet=True), []

    def replace(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        steps.append(step)
        Keeper(pipe.unet)
        return {}

    with guide(pipe, PAG()):
        with pytest.raises(ValueError, match=r"(mid|up)_block.*forward was replaced"):
            run(pipe, latents=noise(), callback_on_step_end=replace)
        with pytest.raises(ValueError, match=r"(mid|up)_block.*forward was replaced"):
            run(pipe, latents=noise(), callback_on_step_end=replace)
        assert steps == [0]
        del pipe.unet.mid_block.forward, pipe.unet.up_blocks[0].forward
        run(pipe, latents=noise())


def test_replaced_forwards_before_the_first_branch_are_nobodys_business() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    block = pipe.unet.down_blocks[0]

    def halves(*args: Any, forward: Any = block.forward, **kwargs: Any) -> Any:
        hidden, skips = forward(*args, **kwargs)
        weight = torch.arange(1.0, 1 + len(hidden)).view(-1, 1, 1, 1)
        return hidden * weight, tuple(skip * weight for skip in skips)

    block.forward = halves
    expected = run(other(StableDiffusionXLPAGPipeline, tiny_pipeline(), "mid_block"), latents=latents, pag_scale=3.0)
    with guide(pipe, PAG()):
        assert relative(run(pipe, latents=latents), expected) > 1e-3
    for given in ({"share": False}, {"trust": [Keeper], "share": False}):
        with pytest.raises(ValueError, match=r"down_blocks.0 .*replaced by tests\S+halves"):
            guide(pipe, PAG(), **given)
    for spec in (SAG(), CFG(negative_prompt="a boat")):
        with pytest.raises(ValueError, match=r"down_blocks.0 .*replaced by tests\S+halves"):
            guide(pipe, spec)


class Halves:
    """Attention for a batch [unconditional half, conditional half] that halves the second half."""

    def __init__(self, parts: int = 2) -> None:
        self.parts = parts

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kw: Any) -> Any:
        out = attend(attn, hidden_states, encoder_hidden_states)
        first = len(out) // self.parts
        return torch.cat([out[:first], 0.5 * out[first:]])


class Scaled:
    """A custom class of attention with a factor that is the same for all samples."""

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kw: Any) -> Any:
        return 0.5 * attend(attn, hidden_states, encoder_hidden_states)


def scaled(attn: Any, hidden_states: Any, encoder_hidden_states: Any = None, *args: Any, **kw: Any) -> Any:
    return 0.5 * attend(attn, hidden_states, encoder_hidden_states)


def attend(attn: Any, hidden_states: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    text = hidden_states if text is None else text
    q, k, v = (
        x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        for x in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text))
    )
    return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def with_processors(processor: Any, where: str = "attn2") -> Any:
    pipe = tiny_pipeline(own_unet=True)
    for name, module in pipe.unet.named_modules():
        if name.endswith(where):
            module.processor = processor
    return pipe


@pytest.mark.one_in(3)
@pytest.mark.parametrize("spec", [PAG(), SEG(), SAG(), CFG(negative_prompt="a boat")], ids=str)
@pytest.mark.parametrize("processor", [Halves(), Scaled(), scaled], ids=["halves", "scaled", "function"])
def test_unknown_processors_are_refused(processor: Any, spec: Any) -> None:
    name = getattr(processor, "__name__", type(processor).__name__)
    words = rf"attn2 .*tests.diffusers.test_module_checks.{name} .*appends samples.*trust=\[{name}\]"
    with pytest.raises(ValueError, match=words):
        guide(with_processors(processor), spec)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("processor", [Scaled(), scaled], ids=["class", "function"])
def test_processors_that_are_trusted(processor: Any, images: int) -> None:
    pipe, latents = with_processors(processor), noise(images)
    prompts = ["a red fox", "a boat"][:images]
    expected = run(other(StableDiffusionXLPAGPipeline, pipe, "mid_block"), prompts, latents=latents, pag_scale=3.0)
    trust = [processor if callable(processor) and hasattr(processor, "__code__") else type(processor)]
    with guide(pipe, PAG(), trust=trust):
        assert relative(run(pipe, prompts, latents=latents), expected) < PIPELINE_TOLERANCE


def test_processors_that_are_set_inside_the_context() -> None:
    pipe, steps = tiny_pipeline(own_unet=True), []
    attention = pipe.unet.up_blocks[0].attentions[0].transformer_blocks[0].attn2
    own = attention.processor

    def change(pipe: Any, step: int, *rest: Any) -> dict[str, Any]:
        steps.append(step)
        attention.processor = Halves()
        return {}

    with guide(pipe, PAG(start=0.5)):
        with pytest.raises(ValueError, match="Halves"):
            run(pipe, latents=noise(), callback_on_step_end=change)
        assert steps == [0]
        with pytest.raises(ValueError, match="Halves"):
            run(pipe, latents=noise(), callback_on_step_end=change)
        assert steps == [0]
        attention.processor = own
        run(pipe, latents=noise())


def test_processors_before_the_first_branch_see_the_pipelines_own_batch() -> None:
    pipe, latents = with_processors(Halves()), noise()
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2") and not name.startswith("down"):
            module.processor = tiny_pipeline().unet.get_submodule(name).processor
    expected_pipe = with_processors(Halves(3))
    for name, module in expected_pipe.unet.named_modules():
        if name.endswith("attn2") and not name.startswith("down"):
            module.processor = tiny_pipeline().unet.get_submodule(name).processor
    expected = run(other(StableDiffusionXLPAGPipeline, expected_pipe, "mid_block"), latents=latents, pag_scale=3.0)
    with guide(pipe, PAG()):
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE


def test_processors_of_transformers_are_asked_about_too() -> None:
    pipe = FLUX.build()
    block = pipe.transformer.transformer_blocks[-1]
    processor = block.attn.processor

    class Other(type(processor)):  # type: ignore[misc]
        """A custom class with the same computation."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    block.attn.processor = Other()
    with pytest.raises(ValueError, match=r"transformer_blocks\.\d.attn .*Other as its processor"):
        guide(pipe, SEG(layers=0))
    with guide(pipe, SEG(layers=0), trust=[Other]):
        guided = run_transformer(FLUX, pipe)
    block.attn.processor = processor
    with guide(pipe, SEG(layers=0)):
        assert torch.equal(run_transformer(FLUX, pipe), guided)


def test_processors_of_diffusers_that_take_the_batch_apart_are_refused() -> None:
    pipe = with_processors(PAGCFGIdentitySelfAttnProcessor2_0(), "up_blocks.0.attentions.0.transformer_blocks.0.attn1")
    with pytest.raises(ValueError, match=r"PAGCFGIdentitySelfAttnProcessor2_0 .*splits the batch"):
        guide(pipe, SEG())


class Weighing(BasicTransformerBlock):
    """A block that weights samples by their position."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = super().forward(*args, **kwargs)
        return out * torch.arange(1.0, 1 + len(out)).view(-1, 1, 1)


class Around(nn.Module):
    """A mid block inside another module."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.has_cross_attention = True
        self.attentions, self.resnets = block.attentions, block.resnets

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        return 0.5 * self.block(hidden_states, temb, **kwargs)


def test_blocks_of_other_packages() -> None:
    pipe = tiny_pipeline(own_unet=True)
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = Weighing
    with pytest.raises(ValueError, match=r"mid_block\S+ of this UNet\S+ is a tests.diffusers.\S+Weighing.*trust="):
        guide(pipe, PAG())
    with guide(pipe, PAG(layers="up")):
        run(pipe, latents=noise())
    with guide(pipe, PAG(), trust=[Weighing]):  # the user declares it
        run(pipe, latents=noise())


def test_a_block_in_another_module() -> None:
    pipe, latents = tiny_pipeline(own_unet=True), noise()
    pipe.unet.mid_block = Around(pipe.unet.mid_block)
    with pytest.raises(ValueError, match=r"mid_block of this UNet\S+ is a tests\S+Around"):
        guide(pipe, PAG())
    expected = run(other(StableDiffusionXLPAGPipeline, pipe, "mid_block"), latents=latents, pag_scale=3.0)
    with guide(pipe, PAG(), trust=[Around]):
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE


def test_a_forward_replaced_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = BasicTransformerBlock.forward

    @functools.wraps(forward)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(BasicTransformerBlock, "forward", patched)
    pipe = tiny_pipeline(own_unet=True)
    with pytest.raises(ValueError, match=r"forward replaced by tests\S+patched"):
        guide(pipe, PAG())
    with guide(pipe, PAG(), trust=[patched]):
        run(pipe, latents=noise())


@pytest.mark.parametrize("trust", [Scaled, [3], "Scaled", None], ids=str)
def test_trust_is_a_list_of_classes_or_functions(trust: Any) -> None:
    with pytest.raises(ValueError, match="trust must be a list of classes or functions"):
        guide(tiny_pipeline(), PAG(), trust=trust)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_guiders_refuse_the_same_and_trust_the_same(start: float) -> None:
    pipe, latents = with_processors(Scaled()), noise()
    guider = SEGGuider(guidance_scale=5.0, start=start)
    modular = modular_sdxl(pipe, guider)
    with pytest.raises(ValueError, match=r"attn2 of .*Scaled as its processor.*guider.trust = \[Scaled\]"):
        run_sdxl(modular, pipe, latents=latents)
    guider = SEGGuider(guidance_scale=5.0, start=start)
    guider.trust = [Scaled]
    with guide(pipe, SEG(start=start), trust=[Scaled]):
        expected = run(pipe, latents=latents)
    modular = modular_sdxl(pipe, guider)
    assert relative(run_sdxl(modular, pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    Keeper(pipe.unet)
    with pytest.raises(ValueError, match="forward was replaced"):
        run_sdxl(modular, pipe, latents=latents)


def test_guiders_refuse_caches() -> None:
    pipe = MODELS["qwen-image"].build()
    first_block(pipe.transformer)
    with pytest.raises(ValueError, match="QwenImageTransformer2DModel with a cache"):
        run_modular("qwen-image", modular_transformer("qwen-image", pipe, PAGGuider(guidance_scale=5.0)))

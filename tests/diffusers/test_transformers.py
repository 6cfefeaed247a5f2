# SPDX-License-Identifier: Apache-2.0
"""Transformers under ``guide``, each compared with slow guidance that does not use the adapter."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch._dynamo.testing import CompileCounterWithBackend

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, guide, list_layers
from tests.compatibility import proves
from tests.diffusers.probes import hooks_of
from tests.diffusers.proven_cells import of_transformer
from tests.diffusers.slow_guidance import Perturbed, transformer_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.transformer_cases import MODELS, run

GUIDANCES = {
    "seg": (SEG(scale=2.0, sigma=1.5), 1.5),
    "seg-inf": (SEG(scale=2.0), math.inf),
    "pag": (PAG(scale=2.0), None),
}
PROVED = {"seg": "SEG", "seg-inf": "SEG at infinity", "pag": "PAG"}


@lru_cache(maxsize=len(MODELS))
def built(name: str) -> Any:
    return MODELS[name].build()


def with_layers(spec: Any, layers: Any) -> Any:
    return type(spec)(scale=spec.scale, layers=layers, **({"sigma": spec.sigma} if isinstance(spec, SEG) else {}))


@pytest.mark.one_in(5)
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no-cfg"])
@pytest.mark.parametrize("guidance", [pytest.param(name, marks=proves(guidance=PROVED[name])) for name in GUIDANCES])
@pytest.mark.parametrize("name", [pytest.param(name, marks=of_transformer(name)) for name in MODELS])
def test_equals_the_slow_way(name: str, guidance: str, cfg: bool) -> None:
    """Reference: a separate call per branch with float64 blurred logits; not square, two samples."""
    model, pipe = MODELS[name], built(name)
    spec, sigma = GUIDANCES[guidance]
    plain = run(model, pipe, 6, 4, samples=2, cfg=cfg)
    slow = [Perturbed(2.0, sigma, model.modules)]
    expected = transformer_run(model, pipe, slow, lambda: run(model, pipe, 6, 4, samples=2, cfg=cfg), cfg=cfg)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE  # the effect is large enough to be measured
    processors = [pipe.transformer.get_submodule(name).processor for name in model.modules]
    with guide(pipe, with_layers(spec, model.layers)) as active:
        guided = run(model, pipe, 6, 4, samples=2, cfg=cfg)
    assert relative(guided, expected) < PIPELINE_TOLERANCE
    assert relative(guided - plain, expected - plain) < 2e-3  # some models change little at this size
    report = active.report()
    assert {row.module for row in report.layers} == set(model.modules)
    assert all(row.fired == 3 and row.moved is not None and row.moved > 0 for row in report.layers)
    assert [pipe.transformer.get_submodule(name).processor for name in model.modules] == processors
    assert hooks_of(pipe.transformer) == 0
    assert torch.equal(run(model, pipe, 6, 4, samples=2, cfg=cfg), plain)


@pytest.mark.parametrize("name", MODELS)
def test_branches_join_at_the_first_perturbed_block(name: str) -> None:
    model, pipe = MODELS[name], built(name)
    order = list(dict.fromkeys(layer.module.rsplit(".", 1)[0] for layer in list_layers(pipe)))

    def batches(**options: Any) -> list[set[int]]:
        sizes: dict[str, set[int]] = {block: set() for block in order}
        handles = []
        for block in order:

            def note(module: Any, args: Any, kwargs: Any, block: str = block) -> None:
                sizes[block].add(len(args[0] if args else kwargs["hidden_states"]))

            handles.append(pipe.transformer.get_submodule(block).register_forward_pre_hook(note, with_kwargs=True))
        with guide(pipe, SEG(layers=model.layers), **options):
            run(model, pipe, cfg=False)
        for handle in handles:
            handle.remove()
        return list(sizes.values())

    shared, first = batches(), order.index(model.modules[0].rsplit(".", 1)[0])
    # The recording hooks run before the joining hooks: a block sees the output of the previous block.
    assert shared[1 : first + 1] == [{1}] * first
    assert shared[first + 1 :] == [{2}] * (len(order) - first - 1)
    assert batches(share=False) == [{2}] * len(order)


@pytest.mark.parametrize("name", ["sd3", "flux", "z-image"])
def test_two_guidances_add_up(name: str) -> None:
    model, pipe = MODELS[name], built(name)
    last = model.modules[-1]
    slow = [Perturbed(2.0, 2.5, model.modules), Perturbed(-1.0, None, [last])]
    expected = transformer_run(model, pipe, slow, lambda: run(model, pipe))
    with guide(pipe, SEG(scale=2.0, sigma=2.5, layers=model.layers), PAG(scale=-1.0, layers=last)):
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_guidance_of_the_first_block_and_a_later_one(name: str) -> None:
    """The second branch joins inside, although the first one does not."""
    model, pipe = MODELS[name], built(name)
    first, last = list_layers(pipe)[0].module, model.modules[-1]
    slow = [Perturbed(2.0, 2.5, [first]), Perturbed(-1.0, None, [last])]
    expected = transformer_run(model, pipe, slow, lambda: run(model, pipe))
    with guide(pipe, SEG(scale=2.0, sigma=2.5, layers=first), PAG(scale=-1.0, layers=last)):
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "flux", "qwen-image", "wan"])
def test_schedule_reuse_and_intervals(name: str) -> None:
    """Steps without guidance are unguided; a call for the negative prompt is not a step."""
    model, pipe = MODELS[name], built(name)
    plain = run(model, pipe)
    with pytest.warns(UserWarning, match="fired in none"), guide(pipe, SEG(layers=model.layers, scale=0.0)):
        assert torch.equal(run(model, pipe), plain)
    with guide(pipe, SEG(layers=model.layers, stop=0.5)) as active:
        run(model, pipe)
    assert {row.fired for row in active.report().layers} == {2}  # steps 0 and 1 of 3
    with guide(pipe, SEG(layers=model.layers, reuse=2)) as active:
        reused = run(model, pipe)
    assert {row.fired for row in active.report().layers} == {2}
    with guide(pipe, SEG(layers=model.layers)):
        exact = run(model, pipe)
    assert 0.0 < relative(reused, exact) < relative(plain, exact)


@pytest.mark.parametrize("name", ["ltx-video", "hunyuan-dit"])
def test_guidance_rescale_measures_the_unguided_prediction(name: str) -> None:
    """``guidance_rescale`` uses the standard deviation of the conditional prediction without guidance."""
    model, pipe = MODELS[name], built(name)
    seen: list[torch.Tensor] = []
    module = "diffusers.pipelines." + ("ltx.pipeline_ltx" if name == "ltx-video" else "hunyuandit.pipeline_hunyuandit")
    rescale = __import__(module, fromlist=["rescale_noise_cfg"]).rescale_noise_cfg

    def noted(noise: torch.Tensor, conditional: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(conditional.clone())
        return rescale(noise, conditional, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{module}.rescale_noise_cfg", noted)
        run(model, pipe, guidance_rescale=0.7)
        with guide(pipe, SEG(layers=model.layers)):
            run(model, pipe, guidance_rescale=0.7)
    assert len(seen) == 6
    assert relative(seen[3], seen[0]) < PIPELINE_TOLERANCE


def test_cfg_truncation_of_z_image() -> None:
    """Late steps without classifier-free guidance have half the batch."""
    model, pipe = MODELS["z-image"], built("z-image")
    with guide(pipe, SEG(layers=model.layers)) as active:
        truncated = run(model, pipe, cfg_truncation=0.5)
        assert {row.fired for row in active.report().layers} == {3}
        assert relative(truncated, run(model, pipe)) > PIPELINE_TOLERANCE


@pytest.mark.parametrize("name", ["sd3.5", "flux", "z-image", "wan"])
def test_a_sigma_for_each_image_and_each_layer(name: str) -> None:
    model, pipe = MODELS[name], built(name)
    slow = [Perturbed(2.0, [1.0, math.inf], model.modules)]
    expected = transformer_run(model, pipe, slow, lambda: run(model, pipe, samples=2))
    with guide(pipe, SEG(scale=2.0, sigma=[1.0, math.inf], layers=model.layers)):
        assert relative(run(model, pipe, samples=2), expected) < PIPELINE_TOLERANCE
    first, last = model.modules[0], model.modules[-1]
    layers = {module: 1.0 if module == last else [[math.inf] * 2] for module in model.modules}
    with guide(pipe, SEG(scale=2.0, sigma=layers)):
        by_layer = run(model, pipe)
    with guide(pipe, SEG(scale=2.0, sigma=1.0, layers=model.layers)):
        assert (relative(run(model, pipe), by_layer) > PIPELINE_TOLERANCE) == (first != last)


@pytest.mark.parametrize(
    ("name", "compilations", "compile_first"),
    [
        ("sd3", 1, True),
        pytest.param("z-image", 1, False, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("flux", 2, False), ("wan", 2, True)]),
    ],
)
def test_under_compile(name: str, compilations: int, compile_first: bool) -> None:
    """The denoiser has no graph break, and images are the same. Calls for the negative prompt have a separate graph."""
    model = MODELS[name]
    pipe = model.build()
    with guide(pipe, SEG(sigma=1.5, layers=model.layers)):
        expected = run(model, pipe)
    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    if compile_first:
        pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    with guide(pipe, SEG(sigma=1.5, layers=model.layers)):
        if not compile_first:
            pipe.transformer.compile(backend=counter, fullgraph=True)
        compiled = run(model, pipe)
    assert relative(compiled, expected) < PIPELINE_TOLERANCE
    assert counter.frame_count == compilations


class Multiplying(AttnProcessor):
    """Multiplies matrices itself."""


def test_attention_that_is_not_met_is_an_error() -> None:
    model = MODELS["pixart-sigma"]
    pipe = model.build()
    pipe.transformer.transformer_blocks[2].attn1.set_processor(Multiplying())
    plain = run(model, pipe)
    guidance = guide(pipe, SEG(layers=2), trust=[Multiplying])
    with (
        pytest.raises(RuntimeError, match=r"could not intercept the attention.*test_transformers.Multiplying"),
        guidance,
    ):
        run(model, pipe)
    assert torch.equal(run(model, pipe), plain)
    assert hooks_of(pipe.transformer) == 0


@pytest.mark.parametrize(
    ("spec", "quoted"),
    [
        (SEG(layers="mid"), "unknown layer 'mid'; valid names are 'transformer_blocks' .b0 to b3., block numbers 0 to"),
        (SEG(layers=[1, 7]), "unknown layer '7'"),
        (SEG(layers=range(2, 9)), "unknown layer '2-8'"),
        (SEG(layers=1, query_stride=2), "query_stride=2 needs a UNet2DConditionModel"),
        (SAG(), "SAG needs a UNet2DConditionModel; a SD3Transformer2DModel supports"),
        (CFG(), "CFG needs a UNet2DConditionModel"),
    ],
)
def test_refusals(spec: Any, quoted: str) -> None:
    pipe = built("sd3")
    with pytest.raises(ValueError, match=quoted):
        guide(pipe, spec)
    assert hooks_of(pipe.transformer) == 0


def test_linear_attention_is_refused() -> None:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=4,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    with pytest.raises(ValueError, match=r"SanaPipeline.*SanaTransformer2DModel.*linear attention"):
        guide(pipe, SEG(layers=0))


def test_two_denoisers_take_turns() -> None:
    """Wan 2.2 has one denoiser for noisy steps and one for the rest. Both are guided in one run, with one report."""
    model = MODELS["wan"]
    first, second = model.build(), model.build()
    torch.manual_seed(8)
    for parameter in second.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    config = {**first.components, "transformer_2": second.transformer}
    pipe = type(first)(**config, boundary_ratio=0.9, expand_timesteps=False)
    pipe.set_progress_bar_config(disable=True)
    plain = run(model, pipe)
    guided = SEG(scale=2.0, sigma=1.5, layers=model.layers, stop=0.9)
    with guide(pipe, guided) as active:
        both = run(model, pipe)
        again = run(model, pipe)
    assert torch.equal(both, again)
    assert {row.fired for row in active.report().layers} == {6}
    assert active.report().forwards == 12
    # The slow computation, for the model that is called.
    calls = dict.fromkeys(("transformer", "transformer_2"), 0)
    for name in calls:
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: calls.update({name: calls[name] + 1}))
    expected = transformer_run(model, pipe, [Perturbed(2.0, 1.5, model.modules)], lambda: run(model, pipe))
    assert calls["transformer"] > 0
    assert calls["transformer_2"] > 0
    assert relative(both, expected) < PIPELINE_TOLERANCE < relative(plain, expected)
    with pytest.raises(ValueError, match="already guided"), guide(pipe, guided):
        guide(pipe, guided)
    assert hooks_of(pipe.transformer) + hooks_of(pipe.transformer_2) == 2  # the test's own hooks


def test_default_layers() -> None:
    """The recommended layers if there are any and the model is deep enough, otherwise the middle block."""
    model, pipe = MODELS["sd3"], built("sd3")
    with guide(pipe, SEG()) as active:
        run(model, pipe)
    assert [row.layer for row in active.report().layers] == ["b2"]
    assert SEG().layers is None  # the spec itself does not change
    size = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    deep = {**pipe.transformer.config, "num_layers": 12, **size}
    other = type(pipe)(**{**pipe.components, "transformer": type(pipe.transformer).from_config(deep)})
    with guide(other, SEG()) as active:
        run(model, other)
    assert [row.layer for row in active.report().layers] == ["b7", "b8", "b9"]


def test_layers_are_listed_with_grids() -> None:
    layers = list_layers(built("flux"), height=96, width=64)
    assert [layer.name for layer in layers] == ["b0", "b1", "s0", "s1", "s2"]
    assert [layer.block for layer in layers] == [0, 1, 2, 3, 4]
    assert {(layer.grid.height, layer.grid.width) for layer in layers if layer.grid is not None} == {(6, 4)}
    assert {(layer.heads, layer.head_dim) for layer in layers} == {(2, 8)}

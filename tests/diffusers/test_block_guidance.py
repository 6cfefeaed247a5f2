# SPDX-License-Identifier: Apache-2.0
"""Skip-layer guidance and token perturbation guidance, compared with slow guidance and with diffusers' own."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from diffusers.hooks import HookRegistry, LayerSkipConfig, apply_layer_skip
from torch.utils.flop_counter import FlopCounterMode

from segkern.integrations.diffusers import PAG, SEG, SLG, TPG, guide, list_layers
from tests.compatibility import proves
from tests.diffusers.probes import hooks_of
from tests.diffusers.proven_cells import of_transformer
from tests.diffusers.slow_guidance import ChangedBlocks, Perturbed, transformer_run, unet_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, tiny_pipeline, tiny_sd
from tests.diffusers.small_pipelines import run as run_unet
from tests.diffusers.transformer_cases import MODELS, run


@lru_cache(maxsize=len(MODELS))
def built(name: str) -> Any:
    return MODELS[name].build()


def blocks_of(modules: tuple[str, ...] | list[str]) -> list[str]:
    return list(dict.fromkeys(module.rpartition(".")[0] for module in modules))


def shuffled(pipe: Any, spec: TPG, blocks: list[str], sequence: tuple[str, ...] = ()) -> ChangedBlocks:
    """Return the slow form of a spec."""
    names: dict[str, str] = {}
    for layer in list_layers(pipe):
        names.setdefault(layer.module.rpartition(".")[0], layer.name.partition(".")[0])

    def order(step: int, block: str, tokens: int) -> torch.Tensor:
        return spec.order(step, names[block], tokens)

    return ChangedBlocks(spec.scale, blocks, order, sequence=sequence)


METHODS = [pytest.param(name, marks=proves(guidance=name.upper())) for name in ("slg", "tpg")]


@pytest.mark.one_in(4)
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no-cfg"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=of_transformer(name)) for name in MODELS])
def test_transformers_equal_the_slow_way(name: str, method: str, cfg: bool) -> None:
    """Reference: a separate call per branch with changed blocks; not square, two samples."""
    model, pipe = MODELS[name], built(name)
    blocks = blocks_of(model.modules)
    spec: Any = SLG(2.0, model.layers, 0.0, 1.0) if method == "slg" else TPG(2.0, model.layers, seed=3)
    slow = ChangedBlocks(2.0, blocks) if method == "slg" else shuffled(pipe, spec, blocks, model.sequence)

    def short() -> torch.Tensor:
        return run(model, pipe, 6, 4, samples=2, cfg=cfg)

    plain = short()
    expected = transformer_run(model, pipe, [slow], short, cfg=cfg)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE  # the effect is large enough to be measured
    for share in (True, False):
        with guide(pipe, spec, share=share) as active:
            guided = short()
        assert relative(guided, expected) < PIPELINE_TOLERANCE
        assert relative(guided - plain, expected - plain) < 2e-3
        rows = active.report().layers
        assert [row.module for row in rows] == blocks
        assert all(row.fired == 3 and row.moved is not None and row.moved > 0 for row in rows)
    assert hooks_of(pipe.transformer) == 0
    assert torch.equal(short(), plain)


@proves(task="text to image")
@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no-cfg"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("sdxl", marks=proves(model="Stable Diffusion XL")),
        pytest.param("sd", marks=proves(model="Stable Diffusion 1")),
    ],
)
def test_unets_equal_the_slow_way(kind: str, method: str, cfg: bool) -> None:
    """Reference: a separate call per branch with changed blocks; not square, two samples."""
    pipe = tiny_pipeline() if kind == "sdxl" else tiny_sd()
    layers = ["mid", "u1"]
    modules = [layer.module for layer in list_layers(pipe) if layer.part == "mid" or layer.name == "u1"]
    blocks = blocks_of(modules)
    spec: Any = SLG(2.0, layers, 0.0, 1.0) if method == "slg" else TPG(2.0, layers, seed=3)
    slow = ChangedBlocks(2.0, blocks) if method == "slg" else shuffled(pipe, spec, blocks)
    latents = noise(2, 16, 24)

    def short() -> torch.Tensor:
        return run_unet(pipe, ["a red fox", "a cat"], latents=latents, guidance_scale=5.0 if cfg else 1.0)

    plain = short()
    expected = unet_run(pipe, [slow], short, (16, 24), cfg)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE
    for share in (True, False):
        with guide(pipe, spec, share=share):
            guided = short()
        assert relative(guided, expected) < PIPELINE_TOLERANCE
        assert relative(guided - plain, expected - plain) < 2e-3


@pytest.mark.parametrize("method", ["slg", "tpg"])
@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_float64_equals_the_slow_way(name: str, method: str) -> None:
    if name == "sdxl":
        pipe: Any = copy.deepcopy(tiny_pipeline())
        pipe.to(torch.float64)
        layers, part = "mid", "unet"
        blocks = blocks_of([layer.module for layer in list_layers(pipe) if layer.part == "mid"])
    else:
        model = MODELS[name]
        pipe, layers, part = model.build(), model.layers, "transformer"
        pipe.transformer.double()
        blocks = blocks_of(model.modules)
    spec: Any = SLG(2.0, layers, 0.0, 1.0) if method == "slg" else TPG(2.0, layers, seed=3)
    slow = ChangedBlocks(2.0, blocks) if method == "slg" else shuffled(pipe, spec, blocks)

    def short() -> torch.Tensor:
        if name == "sdxl":
            return run_unet(pipe, latents=noise(1, 12, 16).double())
        given = {key: value.double() for key, value in model.call(6, 4, 1, True).items() if torch.is_tensor(value)}
        return run(model, pipe, 6, 4, **given)

    if name == "sdxl":
        expected = unet_run(pipe, [slow], short, (12, 16), True)
    else:
        expected = transformer_run(model, pipe, [slow], short)
    with guide(pipe, spec):
        assert relative(short(), expected) < 1e-9
    assert getattr(pipe, part).dtype == torch.float64


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_methods_that_change_the_same_blocks_add_up(name: str) -> None:
    model, pipe = MODELS[name], built(name)
    blocks = blocks_of(model.modules)
    tpg = TPG(-0.5, model.layers, seed=1)
    slow = [
        ChangedBlocks(2.0, blocks),
        shuffled(pipe, tpg, blocks),
        Perturbed(1.0, 1.5, model.modules),
        Perturbed(-1.0, None, model.modules[-1:]),
    ]
    expected = transformer_run(model, pipe, slow, lambda: run(model, pipe))
    specs = SLG(2.0, model.layers, 0.0, 1.0), tpg, SEG(1.0, 1.5, model.layers), PAG(-1.0, model.modules[-1])
    for given in (specs, specs[::-1]):
        with guide(pipe, *given):
            assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE


def test_methods_in_the_same_block_of_a_unet_add_up() -> None:
    pipe = tiny_pipeline()
    modules = [layer.module for layer in list_layers(pipe) if layer.part == "mid"]
    tpg = TPG(-0.5, "mid", seed=1)
    slow = [
        ChangedBlocks(2.0, blocks_of(modules)),
        shuffled(pipe, tpg, blocks_of(modules)),
        Perturbed(1.0, 1.5, modules),
    ]
    latents = noise(2, 16, 12)

    def short() -> torch.Tensor:
        return run_unet(pipe, ["a red fox", "a cat"], latents=latents)

    expected = unet_run(pipe, slow, short, (16, 12), True)
    with guide(pipe, SEG(1.0, 1.5, "mid"), tpg, SLG(2.0, "mid", 0.0, 1.0)):
        assert relative(short(), expected) < PIPELINE_TOLERANCE


def test_equals_the_skipped_layers_of_stable_diffusion_3() -> None:
    """diffusers compares ``step > steps * start``, so its first step is never guided."""
    model, pipe = MODELS["sd3"], built("sd3")
    own = {"skip_layer_guidance_scale": 2.8, "skip_layer_guidance_start": 0.01, "skip_layer_guidance_stop": 0.7}
    expected = run(model, pipe, skip_guidance_layers=[1, 2], **own)
    with guide(pipe, SLG(layers=range(1, 3), stop=0.7)):
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE


class HookedBlocks(ChangedBlocks):
    """Blocks that diffusers' own hook skips, as for its guider ``SkipLayerGuidance``."""

    @contextmanager
    def applied(self, denoiser: Any, place_of: Any, step: int) -> Iterator[None]:
        numbers = [int(block.rpartition(".")[2]) for block in self.blocks]
        stack = self.blocks[0].rpartition(".")[0]
        apply_layer_skip(denoiser, LayerSkipConfig(numbers, fqn=stack))
        try:
            yield
        finally:
            HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook("layer_skip_hook")


def test_equals_the_hook_of_diffusers() -> None:
    """Only for blocks that return one tensor: in Stable Diffusion 3 and Flux, diffusers' hook swaps image and text."""
    model = MODELS["wan"]
    pipe = model.build()
    slow = HookedBlocks(2.0, blocks_of(model.modules))
    expected = transformer_run(model, pipe, [slow], lambda: run(model, pipe))
    with guide(pipe, SLG(2.0, model.layers, 0.0, 1.0)):
        assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE


def test_the_hook_of_diffusers_swaps_image_and_text() -> None:
    """A block of Stable Diffusion 3 returns text and image; the hook returns its arguments, image and text."""
    transformer = MODELS["sd3"].build().transformer
    image, text = torch.zeros(1, 24, 16), torch.zeros(1, 5, 16)
    temb = torch.zeros(1, transformer.inner_dim)
    shapes = []
    for skip in (False, True):
        if skip:
            apply_layer_skip(transformer, LayerSkipConfig([1], fqn="transformer_blocks"))
        block = transformer.transformer_blocks[1]
        image, text = (x.new_zeros(1, x.shape[1], transformer.inner_dim) for x in (image, text))
        output = block(hidden_states=image, encoder_hidden_states=text, temb=temb)
        shapes.append([x.shape[1] for x in output])
    assert shapes == [[5, 24], [24, 5]]


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_seed_gives_the_same_image_alone_and_in_a_batch(name: str) -> None:
    if name == "sdxl":
        pipe, latents = tiny_pipeline(), noise(3)
        spec = TPG(3.0, "down", seed=7)
        with guide(pipe, spec):
            together = run_unet(pipe, ["a red fox"] * 3, latents=latents)
            alone = torch.cat([run_unet(pipe, latents=latents[i : i + 1]) for i in range(3)])
        with guide(pipe, TPG(3.0, "down", seed=8)):
            other = run_unet(pipe, ["a red fox"] * 3, latents=latents)
        assert relative(alone, together) < PIPELINE_TOLERANCE
        assert relative(other, together) > 100 * PIPELINE_TOLERANCE
        return
    model, pipe = MODELS[name], built(name)
    with guide(pipe, SLG(2.0, range(4), 0.0, 1.0, count=2, seed=4)) as active:
        first, again = run(model, pipe), run(model, pipe)
    assert torch.equal(first, again)
    assert sum(row.fired for row in active.report().layers) == 2 * 3 * 2  # blocks, steps, runs


def test_blocks_drawn_at_random_equal_the_slow_way() -> None:
    model, pipe = MODELS["sd3"], built("sd3")
    spec = SLG(2.0, range(4), 0.0, 1.0, count=1, seed=4)
    names = [f"b{number}" for number in range(4)]
    chosen = [spec.chosen(step, names) for step in range(3)]
    assert len(set(chosen)) > 1

    class Drawn(ChangedBlocks):
        def applied(self, denoiser: Any, place_of: Any, step: int) -> Any:
            blocks = [f"transformer_blocks.{name[1:]}" for name in chosen[step]]
            return ChangedBlocks(2.0, blocks).applied(denoiser, place_of, step)

    expected = transformer_run(model, pipe, [Drawn(2.0, [])], lambda: run(model, pipe))
    for share in (True, False):
        with guide(pipe, spec, share=share):
            assert relative(run(model, pipe), expected) < PIPELINE_TOLERANCE


def test_shuffled_tokens_cost_what_comes_from_the_first_block_on() -> None:
    model, pipe = MODELS["sd3"], built("sd3")

    def count(*specs: TPG, share: bool = True) -> dict[str, int]:
        with ExitStack() as guidance, FlopCounterMode(display=False) as counter:
            if specs:
                guidance.enter_context(guide(pipe, *specs, share=share))
            run(model, pipe, cfg=False)
        return {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}

    plain = count()
    whole, before = plain["Global"], sum(plain[f"SD3Transformer2DModel.transformer_blocks.{i}"] for i in range(2))
    assert count(TPG(layers="2-3"))["Global"] == 2 * whole - before
    assert count(TPG(layers="2-3"), share=False)["Global"] == 2 * whole


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SLG(count=0), "SLG.count must be None or a positive number of blocks, got 0"),
        (lambda: SLG(seed=1.5), "SLG.seed must be an integer, got 1.5"),
        (lambda: TPG(seed=None), "TPG.seed must be an integer, got None"),
        (lambda: TPG(layers=1.5), "TPG.layers must be a layer name"),
    ],
)
def test_invalid_specs_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

# SPDX-License-Identifier: Apache-2.0
"""Skip-layer guidance equals ComfyUI's own node, and token perturbation guidance equals a third full forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from segkern_pack.guidance import add_guidance, guidances_of

from segkern.integrations.specs import SEG, SLG, TPG

from .comparison import compare, independent, small
from .independent import STAGES
from .small_models import latents, relative, sample

TEXT = 5  # tokens of text before the image in a single block of Flux
# The blocks of each choice: number in the list of blocks, and the position of the image in a block's arguments.
CHOICES: dict[str, tuple[str, dict[str, tuple[str, int, int | str]]]] = {
    "flux": ("1,4", {"d1": ("double_blocks", 1, "img"), "s1": ("single_blocks", 1, 0)}),
    "sd3": ("1-2", {"b1": ("joint_blocks", 1, 1), "b2": ("joint_blocks", 2, 1)}),
    "qwen": ("1", {"b1": ("transformer_blocks", 1, "hidden_states")}),
    "wan": ("0,2", {"b0": ("blocks", 0, 0), "b2": ("blocks", 2, 0)}),
}
SKIPPED = {"flux": {"double_layers": "1", "single_layers": "1"}}
# The spatial transformers of each choice, with the layers in them.
UNETS: dict[str, tuple[str, dict[str, list[str]]]] = {
    "sd15": ("input.3,mid", {"input_blocks.3.1": ["d1"], "middle_block.1": ["m0"]}),
    "sdxl": ("m1-2,u1", {"middle_block.1": ["m1", "m2"], "output_blocks.0.1": ["u1"]}),
}


@dataclass
class Shuffled:
    """Token perturbation guidance in a third full forward pass.

    Attributes:
        spec: The guidance spec.
        hooked: Registers the hooks that shuffle tokens, given a model and a function that returns a layer's order.
        evaluations: Number of evaluations of the model so far.
    """

    spec: TPG
    hooked: Callable[[Any, Callable[[str, int], torch.Tensor]], list[Any]]
    evaluations: int = 0

    def on(self, model: Any) -> Any:
        guided = model.clone()
        guided.set_model_sampler_post_cfg_function(self._post_cfg)
        return guided

    def _post_cfg(self, arguments: dict[str, Any]) -> torch.Tensor:
        options = comfy.model_patcher.create_model_options_clone(arguments["model_options"])
        model = arguments["model"]
        with self._hooks(model.diffusion_model):
            (p,) = comfy.samplers.calc_cond_batch(
                model, [arguments["cond"]], arguments["input"], arguments["sigma"], options
            )
        self.evaluations += 1
        return arguments["denoised"] + self.spec.scale * (arguments["cond_denoised"] - p)

    @contextmanager
    def _hooks(self, model: Any) -> Iterator[None]:
        handles = self.hooked(model, lambda layer, tokens: self.spec.order(self.evaluations, layer, tokens))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def shuffled_transformer(name: str, spec: TPG) -> Shuffled:
    """Return guidance that shuffles the image in the arguments of the blocks of ``CHOICES``."""

    def hooked(model: Any, order: Callable[[str, int], torch.Tensor]) -> list[Any]:
        def hook_of(layer: str, stage: str, place: int | str) -> Callable[..., Any]:
            start = TEXT if stage == "single_blocks" else 0

            def hook(block: Any, args: Any, kwargs: Any) -> Any:
                x = kwargs[place] if isinstance(place, str) else args[place]
                x = torch.cat([x[:, :start], x[:, start:][:, order(layer, x.shape[1] - start)]], dim=1)
                if isinstance(place, str):
                    return args, {**kwargs, place: x}
                return (*args[:place], x, *args[place + 1 :]), kwargs

            return hook

        return [
            getattr(model, stage)[number].register_forward_pre_hook(hook_of(layer, stage, place), with_kwargs=True)
            for layer, (stage, number, place) in CHOICES[name][1].items()
        ]

    return Shuffled(spec, hooked)


def shuffled_unet(name: str, spec: TPG) -> Shuffled:
    """Return guidance that shuffles what spatial transformers add to their inputs.

    Their blocks have no positional information, so shuffling before a block equals shuffling after it.
    """

    def hooked(model: Any, order: Callable[[str, int], torch.Tensor]) -> list[Any]:
        def hook_of(layers: list[str]) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                added = (output - args[0]).flatten(2)
                for layer in layers:
                    added = added[:, :, order(layer, added.shape[2])]
                return args[0] + added.unflatten(2, output.shape[2:])

            return hook

        return [
            model.get_submodule(module).register_forward_hook(hook_of(layers))
            for module, layers in UNETS[name][1].items()
        ]

    return Shuffled(spec, hooked)


@pytest.mark.parametrize("cfg", [4.0, 1.0], ids=["CFG", "without CFG"])
@pytest.mark.parametrize("name", CHOICES)
def test_slg_equals_comfyui(name: str, cfg: float) -> None:
    model, (layers, blocks) = small(name), CHOICES[name]
    numbers = {"double_layers": ",".join(str(number) for _, number, _ in blocks.values()), "single_layers": ""}
    window = {"start_percent": 0.0, "end_percent": 1.0}
    theirs = SkipLayerGuidanceDiT.execute(model, 2.0, **window, **SKIPPED.get(name, numbers)).result[0]
    ours = add_guidance(model, SLG(2.0, start=0.0, stop=1.0), layers)
    latent = compare(model, name, ours, theirs, 1e-5, noise=latents(name, 9, 14, 2), cfg=cfg)
    plain = sample(model, name, steps=2, noise=latents(name, 9, 14, 2), cfg=cfg)
    assert relative(latent, plain) > 1e-3
    report = guidances_of(ours.model_options)[0].report
    assert not report.full
    assert "moved the block's output by" in str(report)


@pytest.mark.parametrize("name", [*CHOICES, *UNETS])
def test_tpg_equals_a_third_forward_pass(name: str) -> None:
    model, spec = small(name), TPG(2.0, seed=3)
    layers = CHOICES[name][0] if name in CHOICES else UNETS[name][0]
    make = shuffled_transformer if name in CHOICES else shuffled_unet
    noise = latents(name, 9, 14, 2)
    expected = sample(make(name, spec).on(model), name, steps=2, noise=noise)
    ours = add_guidance(model, spec, layers)
    exact = 1e-5 if name in CHOICES else 1e-10
    compare(model, name, ours, make(name, spec).on(model), exact, noise=noise)
    assert relative(sample(ours, name, steps=2, noise=noise), expected) < 2e-5
    assert relative(sample(model, name, steps=2, noise=noise), expected) > 1e-3
    other = add_guidance(model, TPG(2.0, seed=4), layers)
    assert relative(sample(other, name, steps=2, noise=noise), expected) > 1e-3
    report = guidances_of(ours.model_options)[0].report
    assert not report.full
    assert report.acted == 2
    assert str(report).count("moved the block's output by") == len(report.layers)


def test_a_seed_gives_the_same_image_alone_and_in_a_batch() -> None:
    model, noise = small("sdxl"), latents("sdxl", 9, 14, 2)
    ours = add_guidance(model, TPG(2.0, seed=5), "mid")
    together = sample(ours, "sdxl", steps=2, noise=noise)
    alone = torch.cat([sample(ours, "sdxl", steps=2, noise=noise[i : i + 1]) for i in range(2)])
    assert relative(alone, together) < 2e-5


def test_methods_that_change_the_same_blocks_add_up() -> None:
    model, (layers, _) = small("flux"), CHOICES["flux"]
    noise = latents("flux", 9, 14, 2)
    seg, slg, tpg = SEG(scale=1.0, sigma=1.5), SLG(1.0, start=0.0, stop=1.0), TPG(-0.5, seed=3)
    theirs = SkipLayerGuidanceDiT.execute(
        model, 1.0, start_percent=0.0, end_percent=1.0, double_layers="1", single_layers="1"
    ).result[0]
    reference = shuffled_transformer("flux", tpg).on(independent("flux", [1, 4], seg).on(theirs, "flux"))
    expected = sample(reference, "flux", steps=2, noise=noise)
    for specs in ((seg, slg, tpg), (tpg, slg, seg)):
        ours = model
        for spec in specs:
            ours = add_guidance(ours, spec, layers)
        assert relative(sample(ours, "flux", steps=2, noise=noise), expected) < 2e-5
        assert not any(guidance.report.full for guidance in guidances_of(ours.model_options))


@pytest.mark.parametrize(
    ("name", "spec", "words"),
    [
        (
            "sdxl",
            SLG(),
            "SLG does not support this model: ComfyUI has no hook that skips a transformer block",
        ),
        ("lumina", SLG(), "SLG does not support this model: ComfyUI has no hook that replaces blocks of Lumina 2"),
        ("lumina", TPG(), "TPG does not support this model: ComfyUI has no hook that replaces blocks of Lumina 2"),
        ("flux", SLG(), "there is no default layer for this model"),
    ],
    ids=["SLG of a UNet", "SLG of Lumina", "TPG of Lumina", "no default"],
)
def test_models_whose_blocks_cannot_be_changed_are_refused(name: str, spec: SLG | TPG, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        add_guidance(small(name), spec, "")


def test_tpg_is_refused_on_a_compiled_unet() -> None:
    ours = add_guidance(small("sdxl"), TPG(), "mid")

    def compiled(executor: Any, *given: Any, **more: Any) -> Any:
        return executor(*given, **more)

    ours.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", compiled)
    with pytest.raises(ValueError, match="TPG does not work with it on any model"):
        sample(ours, "sdxl", steps=1)


def test_hooks_are_removed_after_an_exception() -> None:
    model = small("sdxl")
    ours = add_guidance(model, TPG(), "mid")
    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    handle = block.attn2.register_forward_hook(failing_after(3))
    with pytest.raises(RuntimeError, match="stopped"):
        sample(ours, "sdxl", steps=2)
    handle.remove()
    assert not block._forward_pre_hooks
    assert not block._forward_hooks


def failing_after(calls: int) -> Callable[..., None]:
    """Return a hook that raises an exception in one of its calls."""
    count = iter(range(calls))

    def hook(*given: Any) -> None:
        if next(count, None) is None:
            raise RuntimeError("stopped")

    return hook


assert set(CHOICES) == set(STAGES) - {"lumina"}

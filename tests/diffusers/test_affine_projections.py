# SPDX-License-Identifier: Apache-2.0
"""The mean query is the projection of the mean token if the projection is affine, otherwise the mean of the queries."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accelerate
import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

import segkern
from segkern import Grid
from segkern.integrations.diffusers import SEG, SEGAttnProcessor, guide, list_layers
from segkern.integrations.diffusers.runtime.affine import is_affine, is_plain_linear, passes_on
from segkern.ops import flops  # noqa: F401  the counter knows our operators by it
from tests.diffusers.slow_guidance import Perturbed, self_attentions, unet_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline
from tests.diffusers.test_processor import by_steps, make

SIZE = (8, 12)
MID = ["mid_block.*"]


class BentLinear(nn.Linear):
    """An adapter with a non-linearity in addition to the layer's product."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 2.0 * F.gelu(super().forward(x))


class QuantisedLinear(nn.Linear):
    """Quantises activations to 16 steps of each token's maximum."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().amax(dim=-1, keepdim=True) / 7.0
        return super().forward((x / step).round() * step)


class Around(nn.Module):
    """A module that contains the original layer, like PEFT's adapters."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base_layer(x)
        return y + torch.tanh(3.0 * y)


class AddPositions(accelerate.hooks.ModelHook):
    """A custom accelerate hook."""

    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return with_positions(output)


def with_positions(x: torch.Tensor) -> torch.Tensor:
    """Add a different value to each token."""
    tokens, channels = x.shape[-2:]
    return x + torch.sin(torch.arange(tokens * channels, dtype=x.dtype)).view(tokens, channels)


def _subclass(kind: type[nn.Linear]) -> Callable[[nn.Module, str], None]:
    def change(owner: nn.Module, name: str) -> None:
        linear = owner.get_submodule(name)
        linear.__class__ = kind

    return change


def _wrap(owner: nn.Module, name: str) -> None:
    owner.set_submodule(name, Around(owner.get_submodule(name)))


def _replace_forward(owner: nn.Module, name: str) -> None:
    linear = owner.get_submodule(name)
    own = linear.forward
    linear.forward = lambda x: F.gelu(own(x))


def _hook_after(owner: nn.Module, name: str) -> None:
    owner.get_submodule(name).register_forward_hook(lambda module, args, output: with_positions(output))


def _hook_before(owner: nn.Module, name: str) -> None:
    owner.get_submodule(name).register_forward_pre_hook(lambda module, args: with_positions(args[0]))


def _hook_of_accelerate(owner: nn.Module, name: str) -> None:
    accelerate.hooks.add_hook_to_module(owner.get_submodule(name), AddPositions())


def _adapter(owner: nn.Module, name: str) -> None:
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False), owner)


def _adapter_with_a_hook(owner: nn.Module, name: str) -> None:
    _adapter(owner, name)
    owner.get_submodule(f"{name}.lora_B.default").register_forward_hook(lambda _, args, output: with_positions(output))


CHANGES: dict[str, Callable[[nn.Module, str], None]] = {
    "a subclass": _subclass(BentLinear),
    "quantised activations": _subclass(QuantisedLinear),
    "a module around": _wrap,
    "another forward": _replace_forward,
    "a hook after": _hook_after,
    "a hook before": _hook_before,
    "a hook of accelerate's": _hook_of_accelerate,
    "a hook in an adapter": _adapter_with_a_hook,
}
PLACES = ["to_q", "to_out.0"]


@pytest.mark.one_in(5)
@pytest.mark.parametrize("place", ["to_q", pytest.param("to_out.0", marks=pytest.mark.robustness)])
@pytest.mark.parametrize("kind", CHANGES)
def test_guidance_with_projections_that_are_not_affine(kind: str, place: str) -> None:
    """Covers one image and a batch, with and without classifier-free guidance, in one denoiser call and shared."""
    pipe = tiny_pipeline(own_unet=True)
    names = self_attentions(pipe.unet, MID)
    for name in names:
        CHANGES[kind](pipe.unet.get_submodule(name), place)
    for batch, cfg, shares in [(2, True, (True, False)), (1, False, (True, False))]:
        given: dict[str, Any] = {"latents": noise(batch, *SIZE), "num_inference_steps": 2}
        given |= {"guidance_scale": 5.0 if cfg else 1.0, "prompt": ["a red fox", "a blue cup"][:batch]}
        expected = unet_run(pipe, [Perturbed(3.0, math.inf, names)], lambda given=given: run(pipe, **given), SIZE, cfg)
        assert relative(run(pipe, **given), expected) > 1e-3
        for share in shares:
            with guide(pipe, SEG(), share=share):
                assert relative(run(pipe, **given), expected) < PIPELINE_TOLERANCE


def _strided(attn: Any, x: torch.Tensor, sigmas: list[float], grid: Grid) -> torch.Tensor:
    """Compute the layer in float64 with queries at every second point."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        strided = [
            segkern.reference.seg_attention(
                q[i : i + 1], k[i : i + 1], v[i : i + 1], grid, sigma, query_stride=2 if sigma else 1
            )
            for i, sigma in enumerate(sigmas)
        ]
        return torch.cat(strided)

    return by_steps(attn, x, attend)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", CHANGES)
@torch.no_grad()
def test_points_of_a_stride_with_projections_that_are_not_affine(kind: str, place: str) -> None:
    attn, x, grid = make().double(), torch.randn(3, 8 * 9, 32, dtype=torch.float64), Grid(8, 9)
    CHANGES[kind](attn, place)
    expected = _strided(attn, x, [0.0, 0.0, 3.0], grid)
    attn.set_processor(SEGAttnProcessor([0.0, 0.0, 3.0], grid, query_stride=2))
    assert relative(attn(x), expected) < 1e-9


@torch.no_grad()
def test_a_hook_of_all_modules_is_seen() -> None:
    attn, x = make().double(), torch.randn(2, 15, 32, dtype=torch.float64)
    grid = Grid(3, 5)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return with_positions(output) if module is attn.to_q else None

    def mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q[1:] = q[1:].mean(dim=2, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v)

    handle = register_module_forward_hook(hook)
    try:
        expected = by_steps(attn, x, mean)
        attn.set_processor(SEGAttnProcessor([0.0, math.inf], grid))
        assert relative(attn(x), expected) < 1e-9
    finally:
        handle.remove()


@pytest.mark.parametrize("where", [(F, "linear"), (nn.Linear, "forward")], ids=["function", "class"])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_replaced_linear_layer_is_seen(where: Any, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x = make().double(), torch.randn(2, 15, 32, dtype=torch.float64)
    stock = getattr(*where)

    def bent(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tanh(3.0 * stock(*args, **kwargs))

    def mean(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q[1:] = q[1:].mean(dim=2, keepdim=True)
        return F.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr(*where, bent)
    expected = by_steps(attn, x, mean)
    if fused:
        attn.fuse_projections()
    attn.set_processor(SEGAttnProcessor([0.0, math.inf], Grid(3, 5)))
    assert relative(attn(x), expected) < 1e-9


def _lora(**options: Any) -> Any:
    attn = make()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"], **options), attn)
    return attn.to_q


@pytest.mark.filterwarnings("ignore")
def test_what_is_known_to_be_affine() -> None:
    quantised, offloaded = nn.Linear(4, 4), nn.Linear(4, 4)
    quantised.weight = nn.Parameter(_Subclass(quantised.weight.data))
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    known = [nn.Linear(4, 4), offloaded, _lora(), _lora(lora_bias=True), _lora(lora_dropout=0.1).eval()]
    assert [is_affine(module) for module in known] == [True] * len(known)
    others = [quantised, BentLinear(4, 4), nn.GELU(), _lora(use_dora=True), _lora(lora_dropout=0.1).train()]
    assert [is_affine(module) for module in others] == [False] * len(others)
    assert [is_plain_linear(module) for module in (nn.Linear(4, 4), offloaded, quantised)] == [True, False, False]
    dropouts = [nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.Dropout(0.5), nn.GELU()]
    assert [passes_on(module) for module in dropouts] == [True, True, False, False]


class _Subclass(torch.Tensor):
    """A tensor subclass, like quantised weights."""


def test_a_lora_costs_one_row_at_infinity() -> None:
    """Its two products process one token, exactly; with a finite sigma they process every token."""
    pipe = tiny_pipeline(own_unet=True)

    def saved() -> int:
        counts = []
        for sigma in (1.0, math.inf):
            with FlopCounterMode(display=False) as counter, guide(pipe, SEG(sigma=sigma, layers="m0")):
                run(pipe, latents=noise(1, *SIZE), num_inference_steps=1)
            counts.append(counter.get_total_flops())
        return counts[0] - counts[1]

    without = saved()
    layer = next(
        layer for layer in list_layers(pipe, *(pipe.vae_scale_factor * side for side in SIZE)) if layer.name == "m0"
    )
    assert layer.grid is not None
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=[f"{layer.module}.to_out.0"]))
    linear = pipe.unet.get_submodule(layer.module).to_out[0]
    assert saved() - without == 2 * 2 * (linear.in_features + linear.out_features) * (layer.grid.tokens - 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["a hook after", "a subclass", "an adapter"])
@torch.no_grad()
def test_a_compiled_layer(kind: str) -> None:
    attn, x = make(), torch.randn(2, 15, 32)
    attn.set_processor(SEGAttnProcessor([0.0, math.inf], Grid(3, 5)))
    (CHANGES | {"an adapter": _adapter})[kind](attn, "to_q")
    expected = attn(x)
    assert relative(torch.compile(attn, backend="aot_eager", fullgraph=True)(x), expected) < 1e-6

# SPDX-License-Identifier: Apache-2.0
"""Results of guidance in ComfyUI equal a third full forward pass with dense matrices, with and without sharing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from segkern_pack.guidance import add_guidance, guidances_of

from segkern.integrations.specs import PAG, SEG

from .comparison import SPECS, TRANSFORMER_LAYERS, UNET_LAYERS, compare, independent, small
from .small_models import conditioning, latents, make_model, relative, sample

ALL, TWO = tuple(SPECS), ("seg 1.5", "pag")


def cases(layers: dict[str, dict[str, Any]]) -> list[Any]:
    """Return all choices of layers, with all specs for a model's first choice."""
    return [
        (name, choice, spec)
        for name, choices in layers.items()
        for number, choice in enumerate(choices)
        for spec in (ALL if number == 0 else TWO)
    ]


@pytest.mark.parametrize("name, layers, spec", cases(UNET_LAYERS))
def test_unets(name: str, layers: str, spec: str) -> None:
    model, asked = small(name), SPECS[spec]
    ours = add_guidance(model, asked, layers)
    reference = independent(name, UNET_LAYERS[name][layers], asked)
    compare(model, name, ours, reference.on(model, name), 1e-10, noise=latents(name, 9, 14, 2))
    assert not guidances_of(ours.model_options)[0].report.full


@pytest.mark.parametrize("name, layers, spec", cases(TRANSFORMER_LAYERS))
def test_transformers(name: str, layers: str, spec: str) -> None:
    model, asked = small(name), SPECS[spec]
    ours = add_guidance(model, asked, layers)
    reference = independent(name, TRANSFORMER_LAYERS[name][layers], asked)
    compare(model, name, ours, reference.on(model, name), 1e-5, noise=latents(name, 9, 14, 2))


def test_a_run_without_guidance_is_another() -> None:
    for name in (*UNET_LAYERS, *TRANSFORMER_LAYERS):
        plain = sample(small(name), name, steps=2)
        guided = sample(add_guidance(small(name), PAG(scale=2.0), "mid" if name in UNET_LAYERS else "1"), name, steps=2)
        assert relative(guided, plain) > 1e-3, name


def test_padded_tokens_of_z_image_are_not_blurred() -> None:
    model, asked = make_model("lumina", torch.float32, pad_tokens_multiple=8), SPECS["seg 1.5"]
    reference = independent("lumina", [1], asked, text=8)
    compare(
        model, "lumina", add_guidance(model, asked, "1"), reference.on(model, "lumina"), 1e-5,
        noise=latents("lumina", 9, 14, 2),
    )  # fmt: skip


@pytest.mark.parametrize("method", ["offset", "index", "index_timestep_zero", "uxo"])
@pytest.mark.parametrize("spec", TWO)
def test_reference_images_of_flux_are_not_blurred(spec: str, method: str) -> None:
    # Like Flux 2, which doubles timesteps.
    two = {"vec_in_dim": None, "guidance_embed": False, "global_modulation": True}
    model = make_model("flux", torch.float32, **two) if method == "index_timestep_zero" else small("flux")
    asked = SPECS[spec]
    extra = {
        "reference_latents": [latents("flux", 6, 7, 1), latents("flux", 4, 4, 1)],
        "reference_latents_method": method,
    }
    given = {name: conditioning("flux", seed, **extra) for name, seed in (("positive", 2), ("negative", 3))}
    reference = independent("flux", [1, 4], asked)
    ours = add_guidance(model, asked, "1,4")
    with_references = compare(
        model, "flux", ours, reference.on(model, "flux"), 1e-5, noise=latents("flux", 9, 14, 2), **given
    )
    assert relative(with_references, sample(ours, "flux", steps=2, noise=latents("flux", 9, 14, 2))) > 1e-3


def test_text_masked_out_in_qwen() -> None:
    model, asked = small("qwen"), SPECS["seg 1.5"]
    masks = {"attention_mask": torch.tensor([[1, 1, 1, 0, 0]])}
    given = {name: conditioning("qwen", seed, **masks) for name, seed in (("positive", 2), ("negative", 3))}
    reference = independent("qwen", [0, 1, 2], asked)
    ours = add_guidance(model, asked, "0-2")
    latent = compare(model, "qwen", ours, reference.on(model, "qwen"), 1e-5, noise=latents("qwen", 9, 14, 2), **given)
    assert relative(latent, sample(ours, "qwen", steps=2, noise=latents("qwen", 9, 14, 2))) > 1e-3


def test_lumina_cannot_share_and_says_so() -> None:
    ours = add_guidance(small("lumina"), SPECS["pag"], "1")
    sample(ours, "lumina", steps=2)
    assert "no hook that skips blocks of Lumina 2, Z-Image (2 times)" in str(guidances_of(ours.model_options)[0].report)


def test_rescaled_guidance() -> None:
    model, asked = small("sdxl"), SPECS["seg inf"]
    ours = add_guidance(model, asked, "mid", rescale=0.7)
    reference = independent("sdxl", UNET_LAYERS["sdxl"]["mid"], asked, rescale=0.7)
    latent = compare(model, "sdxl", ours, reference.on(model, "sdxl"), 1e-10, noise=latents("sdxl", 9, 14, 2))
    other = sample(add_guidance(model, asked, "mid"), "sdxl", steps=2, noise=latents("sdxl", 9, 14, 2))
    assert relative(latent, other) > 1e-3


@pytest.mark.parametrize("order", [0, 1], ids=["SEG first", "PAG first"])
@pytest.mark.parametrize("name, first, second", [("sdxl", "up", "mid"), ("flux", "4", "1,2"), ("sd15", "mid", "down")])
def test_two_guidances_in_either_order(name: str, first: str, second: str, order: int) -> None:
    model, layers = small(name), {**UNET_LAYERS, "flux": {"4": [4], "1,2": [1, 2]}}[name]
    given = [(SPECS["seg 1.5"], first), (SPECS["pag"], second)]
    ours = reference = model
    for spec, choice in given if order == 0 else given[::-1]:
        ours = add_guidance(ours, spec, choice)
        reference = independent(name, layers[choice], spec).on(reference, name)
    exact = 1e-5 if name == "flux" else 1e-10
    compare(model, name, ours, reference, exact, noise=latents(name, 9, 14, 2))
    assert not any(guidance.report.full for guidance in guidances_of(ours.model_options))
    if order:
        other = add_guidance(add_guidance(model, *given[0]), *given[1])
        assert relative(*(sample(x, name, steps=2) for x in (ours, other))) < 2e-5


def test_the_report_tells_how_far_each_layer_moved() -> None:
    for name, layers in (("sdxl", "mid"), ("flux", "1,4"), ("sd3", "1-2"), ("wan", "1")):
        model, asked = small(name), SPECS["seg 1.5"]
        chosen = {**UNET_LAYERS, **TRANSFORMER_LAYERS}[name][layers]
        reference = independent(name, chosen, asked)
        ours = add_guidance(model, asked, layers)
        for guided in (reference.on(model, name), ours):
            sample(guided, name, steps=2, noise=latents(name, 9, 14, 2))
        expected = [by for (by,) in reference.moved]
        expected = expected[: len(expected) // 2]
        report = guidances_of(ours.model_options)[0].report
        moved = [float(by) for by in report._moved.values()]
        assert moved == pytest.approx(expected, rel=1e-4)
        for by in expected:
            assert f"moved attention by {by:.1%}" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize(
    "height, width, asked, batch, cfg",
    [
        (512, 512, SPECS["seg inf"], 3, 5.0),
        (1536, 640, SEG(scale=2.0, sigma=1.0), 1, 1.0),
        (896, 576, SPECS["seg 10"], 1, 5.0),
        (640, 1536, SPECS["pag"], 1, 1.0),
    ],
    ids=["512x512", "1536x640", "896x576", "640x1536"],
)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
def test_sizes_that_people_use(name: str, height: int, width: int, asked: SEG | PAG, batch: int, cfg: float) -> None:
    """Uses four steps. UNets have no attention at the resolution of the latents, whose matrices would not fit."""
    levels = {
        "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 2],
        "transformer_depth": [0, 0, 1],
        "transformer_depth_output": [0, 0, 0, 0, 1, 1],
    }
    unet = name in UNET_LAYERS
    changes = levels if unet else {"depth": 2, "depth_single_blocks": 1}
    model = make_model(name, torch.float64 if unet else torch.float32, **changes)
    ours = add_guidance(model, asked, "mid" if unet else "1")
    middle = [("middle", 0, i) for i in range(3 if name == "sdxl" else 1)]
    reference = independent(name, middle if unet else [1], asked).on(model, name)
    noise = latents(name, height // 8, width // 8, batch if unet else 1)
    compare(model, name, ours, reference, 1e-9 if unet else 2e-5, steps=4, noise=noise, cfg=cfg)

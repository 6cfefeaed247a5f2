# SPDX-License-Identifier: Apache-2.0
"""``segkern layers`` on every kind of model, and shares of the work against counts of real runs."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from segkern.integrations.diffusers import list_layers
from segkern.integrations.diffusers.models.costs import flop_shares
from segkern.integrations.diffusers.models.layers import default_layers_of
from tests.cli.cli_tools import done, refusal
from tests.diffusers import unet_cases
from tests.diffusers.small_pipelines import noise, tiny_pipeline, tiny_sd
from tests.diffusers.small_pipelines import run as run_unet
from tests.diffusers.transformer_cases import MODELS, TEXT, run
from tests.diffusers.unet_video_cases import MOTION

COUNTED = ("sd3", "sd3.5", "flux", "qwen-image", "z-image", "pixart-sigma", "hunyuan-dit", "wan", "ltx-video")
FRAMES = {"wan": 9, "ltx-video": 17}
TOKENS = {name: f"{'3x' if name in FRAMES else ''}6x4" for name in COUNTED}


def counted(pipe: Any, go: Any) -> dict[str, float]:
    """Shares of a real step; matrix products of attention are counted where PyTorch takes them apart."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        go()
    counts = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
    model = getattr(pipe, "unet", None) or pipe.transformer
    name = type(model).__name__
    return {layer.module: counts[f"{name}.{layer.module}"] / counts[name] for layer in list_layers(pipe)}


@pytest.mark.parametrize("name", COUNTED)
def test_shares_of_a_transformer_are_those_of_a_real_step(name: str) -> None:
    model = MODELS[name]
    pipe = model.build()
    expected = counted(pipe, lambda: run(model, pipe, 6, 4, cfg=False, num_inference_steps=1))
    shares = flop_shares(pipe, 6 * model.factor, 4 * model.factor, FRAMES.get(name), TEXT)
    assert shares == pytest.approx(expected)
    assert 0.1 < sum(expected.values()) < 1.0


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd], ids=["SDXL", "SD 1"])
def test_shares_of_a_unet_are_those_of_a_real_step(make: Any) -> None:
    pipe = make()
    options = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": noise(1, 16, 24)}
    expected = counted(pipe, lambda: run_unet(pipe, **options))
    text = pipe.tokenizer.model_max_length
    factor = pipe.vae_scale_factor
    assert flop_shares(pipe, 16 * factor, 24 * factor, text=text) == pytest.approx(expected)


def test_shares_and_layers_of_a_unet_for_videos(tmp_path: Path) -> None:
    """Each frame is attended to by itself, so that a layer's tokens are those of one."""
    case = MOTION["animatediff"]
    pipe = case.build(case)
    one = replace(case, samples=1, steps=1)
    expected = counted(pipe, lambda: unet_cases.run(one, pipe, False))
    height, width = case.pixels
    shares = flop_shares(pipe, height, width, case.frames, unet_cases.TEXT)
    assert shares == pytest.approx(expected)
    pipe.save_pretrained(tmp_path)
    output = done("layers", tmp_path, "--height", height, "--width", width, "--frames", case.frames)
    assert re.search(r"u1 +. up +. 2 +. 8 +. 8x12 +. \d+\.\d% +. u1\.0 +. up_blocks\.1\.attentions\.1", output)


def test_a_unet_with_other_inputs_has_no_shares() -> None:
    pipe = tiny_pipeline(own_unet=True)
    pipe.unet.register_to_config(addition_embed_type="image")
    assert flop_shares(pipe, 64, 64) is None


def test_defaults_and_whose_advice_they_are() -> None:
    assert default_layers_of(tiny_pipeline()) == (
        "mid",
        "the method's paper (arXiv 2408.00760) and its official implementation",
    )
    assert default_layers_of(MODELS["sd3"].build()) == ("2", "no advice is known: the block in the middle")


@pytest.mark.parametrize("name", COUNTED)
def test_the_command_lists_a_transformer_from_its_configuration(name: str, tmp_path: Path) -> None:
    """Without the weights, which are deleted here; every name in the table is one of ``list_layers``."""
    model = MODELS[name]
    pipe = model.build()
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    size = ["--height", 6 * model.factor, "--width", 4 * model.factor]
    size += ["--frames", FRAMES[name]] if name in FRAMES else []
    output = done("layers", tmp_path, *size)
    shares = flop_shares(pipe, 6 * model.factor, 4 * model.factor, FRAMES.get(name))
    assert shares is not None
    for layer in list_layers(pipe):
        cells = [layer.name, layer.part, layer.heads, layer.head_dim, TOKENS[name], f"{shares[layer.module]:.1%}"]
        line = " +. ".join(re.escape(str(cell)) for cell in [*cells, layer.block, layer.module])
        assert re.search(line, output), (line, output)
    assert re.search(r"where no layers are named, SEG and PAG act in 2 .* the block in the middle", output)


def test_the_command_says_which_advice_it_follows(tmp_path: Path) -> None:
    pipe = MODELS["sd3"].build()
    deep = {**pipe.transformer.config, "num_layers": 12}
    with torch.device("meta"):
        transformer = type(pipe.transformer).from_config(deep)
    pipe.save_pretrained(tmp_path)
    transformer.save_config(tmp_path / "transformer")
    assert re.search(r"act in 7-9 \(3 layers, .*%.*\); diffusers' guider for SEG", done("layers", tmp_path))


def test_sizes_and_models_that_the_command_refuses(tmp_path: Path) -> None:
    MODELS["sd3"].build().save_pretrained(tmp_path)
    assert "width must be a positive multiple of 16, such as 48, got 50" in refusal("layers", tmp_path, "--width", 50)
    assert "is a SD3Transformer2DModel, and this command needs a UNet" in refusal("generate", tmp_path, "a red fox")
    assert "frames are of pipelines for videos, got 5" in refusal("layers", tmp_path, "--frames", 5)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("SD3Transformer2DModel", "NoTransformer"))
    assert "has a NoTransformer, which diffusers" in refusal("layers", tmp_path)


def test_pixels_are_those_of_the_autoencoder(tmp_path: Path) -> None:
    """One that halves each side, where the pipeline's own size is 128 latents."""
    pipe = MODELS["flux"].build()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    pipe.register_modules(vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks))
    pipe.save_pretrained(tmp_path)
    output = done("layers", tmp_path)
    assert "256 x 256" in output
    assert "64x64" in output

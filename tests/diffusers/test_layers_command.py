# SPDX-License-Identifier: Apache-2.0
"""``segkern layers`` on every kind of model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from segkern.integrations.diffusers import list_layers
from segkern.integrations.diffusers.models.layers import default_layers_of
from tests.cli.cli_tools import done, refusal
from tests.diffusers.small_pipelines import tiny_pipeline
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.unet_video_cases import MOTION

NAMES = ("sd3.5", "flux", "wan")  # two attentions in a block, two lists of blocks, a video
FRAMES = {"wan": 9}
TOKENS = {name: f"{'3x' if name in FRAMES else ''}6x4" for name in NAMES}


def test_layers_of_a_unet_for_videos(tmp_path: Path) -> None:
    """Each frame has its own attention, so a layer's tokens are those of one frame."""
    case = MOTION["animatediff"]
    case.build(case).save_pretrained(tmp_path)
    height, width = case.pixels
    output = done("layers", tmp_path, "--height", height, "--width", width, "--frames", case.frames)
    assert re.search(r"u1 +8x12 +2x8 +u1\.0 +up_blocks\.1\.attentions\.1", output)


def test_defaults_and_whose_advice_they_are() -> None:
    assert default_layers_of(tiny_pipeline()) == (
        "mid",
        "the method's paper (arXiv 2408.00760) and its official implementation",
    )
    assert default_layers_of(tiny_pipeline(), "TPG") == default_layers_of(tiny_pipeline())
    assert default_layers_of(MODELS["sd3"].build()) == ("2", "no published recommendation; the middle block")


@pytest.mark.parametrize("name", NAMES)
def test_the_command_lists_a_transformer_from_its_configuration(name: str, tmp_path: Path) -> None:
    """Weights are not needed and are deleted here. Every name in the table is a name of ``list_layers``."""
    model = MODELS[name]
    pipe = model.build()
    pipe.save_pretrained(tmp_path)
    for weights in tmp_path.rglob("*.safetensors"):
        weights.unlink()
    size = ["--height", 6 * model.factor, "--width", 4 * model.factor]
    size += ["--frames", FRAMES[name]] if name in FRAMES else []
    output = done("layers", tmp_path, *size)
    for layer in list_layers(pipe):
        cells = [layer.name, TOKENS[name], f"{layer.heads}x{layer.head_dim}", layer.block, layer.module]
        line = " +".join(re.escape(str(cell)) for cell in cells)
        assert re.search(line, output), (line, output)
    assert re.search(r"Default layers of SEG, PAG, SLG and TPG: block 2 .*\n.* the middle block", output)


def test_the_command_says_which_advice_it_follows(tmp_path: Path) -> None:
    pipe = MODELS["sd3"].build()
    deep = {**pipe.transformer.config, "num_layers": 12}
    with torch.device("meta"):
        transformer = type(pipe.transformer).from_config(deep)
    pipe.save_pretrained(tmp_path)
    transformer.save_config(tmp_path / "transformer")
    assert re.search(r"blocks 7-9 \(3 layers\)\nSource: diffusers' guider for SEG", done("layers", tmp_path))


def test_sizes_and_models_that_the_command_refuses(tmp_path: Path) -> None:
    MODELS["sd3"].build().save_pretrained(tmp_path)
    assert "--width must be a positive multiple of 16, such as 48, got 50" in refusal("layers", tmp_path, "--width", 50)
    assert "has a SD3Transformer2DModel, and this command needs a UNet" in refusal("energy", tmp_path, "a red fox")
    assert "--frames 5 needs a video pipeline" in refusal("layers", tmp_path, "--frames", 5)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("SD3Transformer2DModel", "NoTransformer"))
    assert "needs NoTransformer, which diffusers" in refusal("layers", tmp_path)


def test_pixels_are_those_of_the_autoencoder(tmp_path: Path) -> None:
    """The autoencoder halves each side, and the pipeline's default size is 128 latents."""
    pipe = MODELS["flux"].build()
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    pipe.register_modules(vae=AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks))
    pipe.save_pretrained(tmp_path)
    output = done("layers", tmp_path)
    assert "256 x 256" in output
    assert "64x64" in output

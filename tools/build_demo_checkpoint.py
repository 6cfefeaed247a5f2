# SPDX-License-Identifier: Apache-2.0
"""Builds the small SDXL-layout checkpoint that comes with segkern, from a seed and nothing else.

    python tools/build_demo_checkpoint.py                 # rewrites segkern/checkpoints/demo
    python tools/build_demo_checkpoint.py --out /tmp/demo --seed 1

The weights are random, not trained. Four things are arranged, so that a run looks like something and guidance
acts on it; each is a function below:

1. 3x3 convolutions are a random mixing of channels times a fixed low-pass kernel (`smooth_convolutions`).
2. Query and key weights of the self-attention are enlarged, so attention is far from uniform (`shape_attention`).
3. The denoiser's latents pass through to its output, high frequencies only, so that a step removes noise
   (`pass_noise_through`).
4. Its output is a fixed share of random structure besides (`NETWORK_SHARE`).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

DEFAULT_OUT = Path(__file__).resolve().parents[1] / "segkern" / "checkpoints" / "demo"

START, END = "<|startoftext|>", "<|endoftext|>"
TOKENS = 77
WORDS = (
    "a an the of in on at and with red green blue white black gold fox cat dog bird horse fish tree forest river "
    "mountain sea city house garden flower sky sun moon star light night day photo painting drawing portrait "
    "landscape small large old new"
)

LATENT_CHANNELS = 4
PASS_THROUGH = 2 * LATENT_CHANNELS
NOISE_SHARE = 2.0  # of the latents' high frequencies in the predicted noise
NETWORK_SHARE = 1.2  # of everything else the network computes
RESIDUAL_GAIN = 0.3
COLOUR_GAIN = 0.8
LOW_PASS = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16


def byte_symbols() -> list[str]:
    """The printable character of each byte in the byte-level alphabet of GPT-2 and CLIP, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def merges_of(words: str) -> list[tuple[str, str]]:
    """Merges that make each word one token, left to right."""
    merges: dict[tuple[str, str], None] = {}
    for word in words.split():
        *body, last = word
        symbols = [*body, last + "</w>"]
        while len(symbols) > 1:
            left, right, *rest = symbols
            merges[left, right] = None
            symbols = [left + right, *rest]
    return list(merges)


def write_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """Writes a CLIP tokenizer (vocab.json, merges.txt and its configuration) and loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    symbols = byte_symbols()
    merges = merges_of(WORDS)
    vocabulary = [*symbols, *(s + "</w>" for s in symbols), *dict.fromkeys("".join(m) for m in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, **special}
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(vocabulary)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special)
    return CLIPTokenizer.from_pretrained(folder)


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,
    )


def build_unet() -> UNet2DConditionModel:
    """SDXL's block layout at a small width: 64x64 latents, self-attention at 32x32 and 16x16 tokens."""
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 32, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 1, 2),  # the number of heads, as in SDXL's own configuration
        cross_attention_dim=32 + 64,
        use_linear_projection=True,
        norm_num_groups=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )
    smooth_convolutions(unet)
    shape_attention(unet)
    pass_noise_through(unet)
    return unet


def build_vae() -> AutoencoderKL:
    """An autoencoder that halves each side; its decoder paints smooth colours."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        scaling_factor=0.13025,
    )
    smooth_convolutions(vae.decoder)
    mixing = torch.randn(16, 3)
    colours = torch.linalg.qr(mixing - mixing.mean(0)).Q.T  # at right angles, and no colour prevails
    vae.decoder.conv_out.weight.data.copy_(COLOUR_GAIN * colours[:, :, None, None] * LOW_PASS)
    vae.decoder.conv_out.bias.data.zero_()
    return vae


@torch.no_grad()
def smooth_convolutions(module: torch.nn.Module) -> None:
    """Makes every 3x3 convolution a random mixing of channels that keeps the variance, times the low-pass kernel."""
    residuals: list[torch.nn.Conv2d] = []
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
            mixing = torch.randn(layer.out_channels, layer.in_channels) * layer.in_channels**-0.5
            layer.weight.copy_(mixing[:, :, None, None] * LOW_PASS)
        elif isinstance(layer, ResnetBlock2D):
            residuals.append(layer.conv2)
    for layer in residuals:
        layer.weight.mul_(RESIDUAL_GAIN)


@dataclass(frozen=True)
class AttentionGains:
    """Standard deviations of an attention's projections, for inputs and outputs of variance 1.

    Logits then have a standard deviation near ``query_key ** 2``.
    """

    query_key: float
    output: float


MID_SELF = AttentionGains(query_key=2.0, output=6.0)
OTHER_SELF = AttentionGains(query_key=0.6, output=0.3)
CROSS = AttentionGains(query_key=0.6, output=0.5)


@torch.no_grad()
def shape_attention(unet: UNet2DConditionModel) -> None:
    """Makes the self-attention of the mid block sharp and strong and every other attention soft.

    Soft elsewhere keeps a run well conditioned: sharp attention everywhere enlarges rounding errors thousandfold.
    """
    for name, layer in unet.named_modules():
        if not name.endswith(("attn1", "attn2")):
            continue
        own = MID_SELF if name.startswith("mid_block") else OTHER_SELF
        gains = own if name.endswith("attn1") else CROSS
        for projection, gain in (
            (layer.to_q, gains.query_key),
            (layer.to_k, gains.query_key),
            (layer.to_v, 1.0),
            (layer.to_out[0], gains.output),
        ):
            projection.weight.normal_(std=gain * projection.in_features**-0.5)


@torch.no_grad()
def pass_noise_through(unet: UNet2DConditionModel) -> None:
    """Leads the latents around the random blocks to the output, as channel pairs (x, -x).

    ``silu(x) - silu(-x) = x``, so the last convolution gets the latents back through the last activation, divided by
    their standard deviation in the last normalisation, where they are a group of their own.
    """
    pair = torch.cat([torch.eye(LATENT_CHANNELS), -torch.eye(LATENT_CHANNELS)])
    unet.conv_in.weight[:PASS_THROUGH] = 0
    unet.conv_in.weight[:PASS_THROUGH, :, 1, 1] = pair
    unet.conv_in.bias[:PASS_THROUGH] = 0

    last = unet.up_blocks[-1].resnets[-1]
    width = unet.config.block_out_channels[0]
    skip = last.conv_shortcut.in_channels - width
    last.conv_shortcut.weight[:PASS_THROUGH] = 0
    last.conv_shortcut.weight[:PASS_THROUGH, skip : skip + PASS_THROUGH, 0, 0] = torch.eye(PASS_THROUGH)
    last.conv_shortcut.bias[:PASS_THROUGH] = 0
    last.conv2.weight[:PASS_THROUGH] = 0
    last.conv2.bias[:PASS_THROUGH] = 0

    high_pass = -LOW_PASS.clone()
    high_pass[1, 1] += 1
    unet.conv_out.weight.mul_(NETWORK_SHARE)
    unet.conv_out.weight[:, :PASS_THROUGH] = NOISE_SHARE * pair.T[:, :, None, None] * high_pass
    unet.conv_out.bias.zero_()


def build(out: Path, seed: int) -> None:
    """Writes the whole checkpoint to ``out``."""
    torch.manual_seed(seed)
    tokenizers = write_tokenizer(out / "tokenizer", END), write_tokenizer(out / "tokenizer_2", "!")
    pipeline = StableDiffusionXLPipeline(
        vae=build_vae(),
        text_encoder=CLIPTextModel(text_config(tokenizers[0], 32, "quick_gelu")),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizers[1], 64, "gelu")),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=build_unet(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
    )
    pipeline.to(dtype=torch.float16)
    pipeline.save_pretrained(out)
    for name in ("tokenizer", "tokenizer_2"):  # saved as tokenizer.json, which older releases cannot read
        (out / name / "tokenizer.json").unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--seed", type=int, default=20240801)
    arguments = parser.parse_args()
    build(arguments.out, arguments.seed)
    size = sum(file.stat().st_size for file in arguments.out.rglob("*") if file.is_file())
    print(f"{arguments.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()

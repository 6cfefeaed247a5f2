# SPDX-License-Identifier: Apache-2.0
"""The autoencoder: 4 pixels per latent along each side, 4 channels, as small as the drawings allow."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional as F

from studies.drawings.scenes import PICTURE_SIZES
from studies.training.data import COUNT, Size, compositions, scaled, size_of_step
from studies.training.loop import DEVICE, Plan, half_precision, train

PLAN = Plan(steps=3000, rate=4e-4, average=0.995, seed=1)
SHARPEN = Plan(steps=2000, rate=2.5e-4, average=0.995, seed=5)
BATCH = 24
LATENT_NOISE = 0.06  # highest standard deviation of the noise that the decoder learns to ignore; the latents' is 1
KL_WEIGHT = 1e-6  # with a much larger weight, only one channel stays in use
WHITENED = 1024  # images that the whitening is computed from

COLOURS = 3
CONSTANT = 2 * COLOURS
CONSTANT_LEVEL = 8.0  # large compared with colours of -1 to 1: normalization then scales all images almost equally


def build() -> AutoencoderKL:
    """Return an untrained autoencoder that already passes colours through at a quarter of the resolution."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # several groups, normalized separately, would lose the tint of a flat image
        mid_block_add_attention=False,
        sample_size=64,
    )
    lead_colours_through(vae)
    return vae


@torch.no_grad()
def lead_colours_through(vae: AutoencoderKL) -> None:
    """Initialize the autoencoder to average 4x4 pixels, which would otherwise take most of the training to learn.

    The first channels of every layer are (colours, -colours, constant). ``silu(x) - silu(-x) = x`` recovers the
    colours, and the constant preserves the brightness of an image in normalization. Every residual branch starts at
    zero.
    """
    passed = torch.eye(CONSTANT + 1)
    pair = torch.cat([torch.eye(COLOURS), -torch.eye(COLOURS)])
    for layer in vae.modules():
        if isinstance(layer, ResnetBlock2D):
            layer.conv2.weight.zero_()
            layer.conv2.bias.zero_()
            if layer.conv_shortcut is not None:
                _put(layer.conv_shortcut, passed)
        elif isinstance(layer, Upsample2D):
            _put(layer.conv, passed)
        elif isinstance(layer, Downsample2D):
            _put(layer.conv, passed)
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # the four pixels that become one
                layer.conv.weight[: CONSTANT + 1, : CONSTANT + 1, row, column] = passed / 4
    for half in (vae.encoder, vae.decoder):
        _put(half.conv_in, torch.cat([pair, torch.zeros(1, COLOURS)]))
        half.conv_in.bias[CONSTANT] = CONSTANT_LEVEL
        _put(half.conv_out, 2 * pair.T)  # normalization roughly halves the colours
    for layer in (vae.quant_conv, vae.post_quant_conv):
        _put(layer, torch.eye(layer.out_channels))
    vae.encoder.conv_out.bias[vae.config.latent_channels :] = -6.0  # logarithm of the latents' variance


def _put(layer: torch.nn.Conv2d, mixing: torch.Tensor) -> None:
    """Set the weights of the layer's first output channels to this matrix at the middle tap and to zero elsewhere."""
    assert layer.bias is not None
    out, into = mixing.shape
    middle = layer.kernel_size[0] // 2
    layer.weight[:out] = 0
    layer.weight[:out, :into, middle, middle] = mixing
    layer.bias[:out] = 0


def random_pixels(pictures: dict[Size, torch.Tensor], step: int, rng: torch.Generator) -> torch.Tensor:
    """Return a batch of images of the step's size."""
    of_size = pictures[size_of_step(step)]
    chosen = torch.randint(len(of_size), (BATCH,), generator=rng)
    return scaled(of_size[chosen]).to(DEVICE).contiguous(memory_format=torch.channels_last)


def fit(work: Path, plan: Plan = PLAN, count: int = COUNT) -> AutoencoderKL:
    """Train the autoencoder. The channels of its latents have mean 0 and variance 1 and are uncorrelated."""
    torch.manual_seed(plan.seed)
    vae = build().to(DEVICE, memory_format=torch.channels_last)
    data = compositions(count).pictures

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        pixels = random_pixels(data, step, rng)
        with half_precision():
            latents = vae.encode(pixels).latent_dist
            noise = torch.randn(latents.mean.shape, generator=rng).to(DEVICE)
            rebuilt = vae.decode(latents.mean.float() + latents.std.float() * noise).sample.float()
        error = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)
        return error + KL_WEIGHT * (latents.kl().mean() / latents.mean[0].numel())

    vae = train("vae", vae, loss_of, plan, work)
    whiten(vae, scaled(data[PICTURE_SIZES[0]][:WHITENED]).to(DEVICE))
    return vae.requires_grad_(False)


def sharpen(work: Path, vae: AutoencoderKL, plan: Plan = SHARPEN, count: int = COUNT) -> AutoencoderKL:
    """Train only the decoder for longer, on slightly noisy latents. The latents do not change."""
    torch.manual_seed(plan.seed)
    data = compositions(count).pictures
    halves = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    vae.train()

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        pixels = random_pixels(data, step, rng)
        with half_precision():
            with torch.no_grad():
                latents = vae.encode(pixels).latent_dist.mean.float()
            noise = torch.randn(latents.shape, generator=rng).to(DEVICE)
            amount = LATENT_NOISE * torch.rand(BATCH, 1, 1, 1, generator=rng).to(DEVICE)
            post_quant_conv, decoder = halves
            rebuilt = decoder(post_quant_conv(latents + amount * noise)).float()
        return F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)

    vae.post_quant_conv, vae.decoder = train("decoder", halves, loss_of, plan, work)
    return vae.requires_grad_(False).eval()


@torch.no_grad()
def whiten(vae: AutoencoderKL, pixels: torch.Tensor) -> None:
    """Whiten the latents by changing the two 1x1 convolutions around them; the reconstructions stay the same.

    The change of basis is the symmetric one, which does not depend on the signs of the eigenvectors.
    """
    vae.register_to_config(scaling_factor=1.0)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)]).transpose(0, 1).flatten(1)
    mean = latents.mean(1)
    variances, basis = torch.linalg.eigh(torch.cov(latents))
    forward, back = basis / variances.sqrt() @ basis.T, basis * variances.sqrt() @ basis.T

    inward, outward, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    inward.weight[:channels] = torch.einsum("oc,cihw->oihw", forward, inward.weight[:channels])
    inward.bias[:channels] = forward @ (inward.bias[:channels] - mean)
    inward.weight[channels:], inward.bias[channels:] = (
        0,
        -8.0,
    )  # almost no variance: the encoder's estimate carries little information
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight.copy_(torch.einsum("oihw,ic->ochw", outward.weight, back))

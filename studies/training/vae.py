# SPDX-License-Identifier: Apache-2.0
"""The autoencoder: four pixels to a latent along each side, four channels, as small as the drawings allow."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional as F

from studies.evaluation.shapes import PICTURE_SIZES
from studies.training.data import COUNT, Size, drawings, scaled
from studies.training.loop import DEVICE, Plan, half_precision, train

PLAN = Plan(steps=2600, rate=2.5e-4, average=0.995, seed=1)
SHARPEN = Plan(steps=2400, rate=2.5e-4, average=0.995, seed=5)
BATCH = 12
LATENT_NOISE = 0.06  # standard deviation of what the decoder learns to overlook; the latents' own is 1
KL_WEIGHT = 1e-6  # far more of it, and all channels but one fall silent

COLOURS = 3
CONSTANT = 2 * COLOURS
CONSTANT_LEVEL = 8.0  # large beside colours of -1 to 1, so that normalisation divides all pictures by nearly the same


def build() -> AutoencoderKL:
    """Untrained, but colours at a quarter of the resolution already pass through it."""
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # more groups lose the tint of a flat picture: each is normalised on its own
        mid_block_add_attention=False,
        sample_size=64,
    )
    lead_colours_through(vae)
    return vae


@torch.no_grad()
def lead_colours_through(vae: AutoencoderKL) -> None:
    """Start from an autoencoder that averages 4x4 pixels, instead of spending most of the training to get there.

    The first channels everywhere are (colours, -colours, constant): ``silu(x) - silu(-x) = x`` at both ends, and the
    constant keeps normalisation from losing how bright a picture is. Every residual branch begins at zero.
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
            for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):  # of the taps, those on the pixels that become one
                layer.conv.weight[: CONSTANT + 1, : CONSTANT + 1, row, column] = passed / 4
    for half in (vae.encoder, vae.decoder):
        _put(half.conv_in, torch.cat([pair, torch.zeros(1, COLOURS)]))
        half.conv_in.bias[CONSTANT] = CONSTANT_LEVEL
        _put(half.conv_out, 2 * pair.T)  # each normalisation halves what passes, or nearly
    for layer in (vae.quant_conv, vae.post_quant_conv):
        _put(layer, torch.eye(layer.out_channels))
    vae.encoder.conv_out.bias[vae.config.latent_channels :] = -6.0  # of the logarithm of the latents' variance


def _put(layer: torch.nn.Conv2d, mixing: torch.Tensor) -> None:
    """Give the layer's first channels this mixing at the middle tap and nothing else."""
    assert layer.bias is not None
    out, into = mixing.shape
    middle = layer.kernel_size[0] // 2
    layer.weight[:out] = 0
    layer.weight[:out, :into, middle, middle] = mixing
    layer.bias[:out] = 0


def random_pixels(pictures: dict[Size, torch.Tensor], step: int, rng: torch.Generator) -> torch.Tensor:
    """A batch of the size whose turn it is."""
    of_size = pictures[PICTURE_SIZES[step % len(PICTURE_SIZES)]]
    chosen = torch.randint(len(of_size), (BATCH,), generator=rng)
    return scaled(of_size[chosen]).to(DEVICE).contiguous(memory_format=torch.channels_last)


def fit(work: Path, plan: Plan = PLAN, count: int = COUNT) -> AutoencoderKL:
    """Train on the drawings; afterwards the latents' channels have mean 0, variance 1 and no correlation."""
    torch.manual_seed(plan.seed)
    vae = build().to(DEVICE, memory_format=torch.channels_last)
    data = drawings(count).pictures

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        pixels = random_pixels(data, step, rng)
        with half_precision():
            latents = vae.encode(pixels).latent_dist
            noise = torch.randn(latents.mean.shape, generator=rng).to(DEVICE)
            rebuilt = vae.decode(latents.mean.float() + latents.std.float() * noise).sample.float()
        error = F.l1_loss(rebuilt, pixels) + F.mse_loss(rebuilt, pixels)
        return error + KL_WEIGHT * (latents.kl().mean() / latents.mean[0].numel())

    vae = train("vae", vae, loss_of, plan, work)
    whiten(vae, scaled(data[PICTURE_SIZES[0]][:512]).to(DEVICE))
    return vae.requires_grad_(False)


def sharpen(work: Path, vae: AutoencoderKL, plan: Plan = SHARPEN, count: int = COUNT) -> AutoencoderKL:
    """Train the decoder alone for longer, on slightly noisy latents; the latents stay what they are."""
    torch.manual_seed(plan.seed)
    data = drawings(count).pictures
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
    """Fold a change of the latents' basis into the 1x1 convolutions at both ends; what the decoder sees is the same.

    Of all changes that do, the symmetric one, which does not depend on the signs that an eigensolver picks.
    """
    vae.register_to_config(scaling_factor=1.0)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(64)]).transpose(0, 1).flatten(1)
    mean = latents.mean(1)
    variances, basis = torch.linalg.eigh(torch.cov(latents))
    forward, back = basis / variances.sqrt() @ basis.T, basis * variances.sqrt() @ basis.T

    inward, outward, channels = vae.quant_conv, vae.post_quant_conv, len(mean)
    inward.weight[:channels] = torch.einsum("oc,cihw->oihw", forward, inward.weight[:channels])
    inward.bias[:channels] = forward @ (inward.bias[:channels] - mean)
    inward.weight[channels:], inward.bias[channels:] = 0, -8.0  # the encoder's own spread says little: nearly none
    outward.bias += outward.weight[:, :, 0, 0] @ mean
    outward.weight.copy_(torch.einsum("oihw,ic->ochw", outward.weight, back))

# SPDX-License-Identifier: Apache-2.0
"""The denoiser: SDXL's kind of UNet at one resolution, trained on latents of the drawings."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import track
from torch.nn import functional as F

from studies.training.data import COUNT, Size, drawings, in_turn, scaled
from studies.training.loop import DEVICE, Plan, half_precision, train
from studies.training.text import WIDTHS, Texts

PLAN = Plan(steps=10_000, rate=8e-4, warmup=200, average=0.999, seed=3, muon=2e-3)
BATCH = 16
NO_CAPTION = 0.18  # of the samples: the empty prompt, or
ALL_ZEROS = 0.05  # of the samples: the zeros that SDXL's classifier-free guidance has for a negative prompt
UNIFORM_TIMES = 0.4  # of the samples; the times of the others are logit-normal, more of them in the middle


def build() -> UNet2DConditionModel:
    """One resolution: 16x16 latents for square pictures, and self-attention over all of them in every block."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(128,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        transformer_layers_per_block=1,
        attention_head_dim=2,  # the number of heads, as in SDXL's own configuration
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=16,
        projection_class_embeddings_input_dim=6 * 16 + WIDTHS[1],
    )


def scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """Means of the scaled latents, float16 ``[count, 4, height / 4, width / 4]``."""
    parts = []
    for part in track(pictures.split(64), f"encoding {pictures.shape[3]}x{pictures.shape[2]}"):
        pixels = scaled(part).to(DEVICE).contiguous(memory_format=torch.channels_last)
        with half_precision():
            mean = vae.encode(pixels).latent_dist.mean
        parts.append((mean.float() * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts)


@torch.no_grad()
def embed(texts: Texts, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Captions as the denoiser takes them, float16: all tokens' states, and one vector for the whole."""
    parts = [texts(captions[first : first + 256]) for first in range(0, len(captions), 256)]
    states, whole = zip(*parts, strict=True)
    return torch.cat(states).half().cpu(), torch.cat(whole).half().cpu()


def micro_conditions(size: Size, batch: int) -> torch.Tensor:
    """SDXL's time_ids: original size, crop from the top left, target size; heights first."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(batch, -1)


def times(count: int, rng: torch.Generator) -> torch.Tensor:
    """Time steps to train at, int64 ``[count]``."""
    middle = torch.sigmoid(0.3 + torch.randn(count, generator=rng))
    uniform = torch.rand(count, generator=rng)
    chosen = torch.where(torch.rand(count, generator=rng) < UNIFORM_TIMES, uniform, middle)
    return (chosen * 1000).long().clamp_(0, 999)


def fit(work: Path, vae: AutoencoderKL, texts: Texts, plan: Plan = PLAN, count: int = COUNT) -> UNet2DConditionModel:
    """Train on all latents; every caption is encoded once."""
    torch.manual_seed(plan.seed)
    unet = build().to(DEVICE, memory_format=torch.channels_last)
    if DEVICE.type == "cpu":
        unet.set_attn_processor(AttnProcessor())  # training on a CPU is a quarter faster than with fused attention
    latents = {size: encode(vae, pictures) for size, pictures in drawings(count).pictures.items()}
    scenes = drawings(count).scenes
    captions = {size: embed(texts, [scene.caption for scene in group]) for size, group in scenes.items()}
    empty_prompt = embed(texts, [""])
    order = in_turn()
    alphas = scheduler().alphas_cumprod.to(DEVICE)

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        size = order[step % len(order)]
        chosen = torch.randint(len(latents[size]), (BATCH,), generator=rng)
        clean = latents[size][chosen].to(DEVICE).float().contiguous(memory_format=torch.channels_last)
        dropped = torch.rand(BATCH, generator=rng)
        silent, zero = dropped < NO_CAPTION, dropped < ALL_ZEROS
        states, whole = (part[chosen].float() for part in captions[size])
        states[silent], whole[silent] = (part.float() for part in empty_prompt)
        states[zero], whole[zero] = 0, 0
        time = times(BATCH, rng).to(DEVICE)
        noise = torch.randn(clean.shape, generator=rng).to(DEVICE)
        signal, share = alphas[time].sqrt()[:, None, None, None], (1 - alphas[time]).sqrt()[:, None, None, None]
        conditions = {"text_embeds": whole.to(DEVICE), "time_ids": micro_conditions(size, BATCH).to(DEVICE)}
        noisy = (signal * clean + share * noise).contiguous(memory_format=torch.channels_last)
        with half_precision():
            prediction = unet(noisy, time, states.to(DEVICE), added_cond_kwargs=conditions).sample
        return F.mse_loss(prediction.float(), signal * noise - share * clean)

    return train("denoiser", unet, loss_of, plan, work)

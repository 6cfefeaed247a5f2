# SPDX-License-Identifier: Apache-2.0
"""The denoiser, an SDXL UNet with a single resolution, trained together with the text encoders."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from rich.progress import track
from torch import nn
from torch.nn import functional as F

from studies.drawings.scenes import PICTURE_SIZES
from studies.training.data import COUNT, Size, compositions, scaled, size_of_step
from studies.training.loop import DEVICE, Plan, half_precision, train
from studies.training.text import WIDTHS, Texts

PLAN = Plan(steps=5500, rate=8e-4, warmup=200, constant=0.55, average=0.999, seed=3, muon=2e-3)
SQUARE_BATCH, BATCH = 48, 32
NO_CAPTION = 0.3  # share of the samples without their caption: ALL_ZEROS, and the empty prompt for the rest
ALL_ZEROS = 0.05  # share of the samples with zeros, which SDXL's classifier-free guidance uses as negative prompt
UNIFORM_TIMES = 0.4  # share of the samples with uniform times; other times are logit-normal, mostly in the middle
COMPILED_STEPS = 500  # compiling takes a minute or two, which shorter trainings do not recover


def build() -> UNet2DConditionModel:
    """Return an untrained UNet with one resolution, 16x16 latents for square images, and attention in every block."""
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
    """Return the scheduler of the checkpoint, whose noise levels are also those of the training."""
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
    """Return the means of the scaled latents, float16 ``[count, 4, height / 4, width / 4]``."""
    parts = []
    for part in track(pictures.split(64), f"encoding {pictures.shape[3]}x{pictures.shape[2]}"):
        pixels = scaled(part).to(DEVICE).contiguous(memory_format=torch.channels_last)
        with half_precision():
            mean = vae.encode(pixels).latent_dist.mean
        parts.append((mean.float() * vae.config.scaling_factor).half().cpu())
    return torch.cat(parts)


def micro_conditions(size: Size, batch: int) -> torch.Tensor:
    """Return SDXL's ``time_ids``: original size, crop from the top left, target size, each with the height first."""
    width, height = size
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32).expand(batch, -1)


def times(count: int, rng: torch.Generator) -> torch.Tensor:
    """Return random time steps to train at, int64 ``[count]``."""
    middle = torch.sigmoid(0.3 + torch.randn(count, generator=rng))
    uniform = torch.rand(count, generator=rng)
    chosen = torch.where(torch.rand(count, generator=rng) < UNIFORM_TIMES, uniform, middle)
    return (chosen * 1000).long().clamp_(0, 999)


class TextToLatents(nn.Module):
    """The denoiser and its text encoders.

    Args:
        tokenizers: Folder of the tokenizers, see ``words.write``.
    """

    def __init__(self, tokenizers: Path) -> None:
        super().__init__()
        self.unet = build().to(memory_format=torch.channels_last)
        self.texts = Texts(tokenizers)
        if DEVICE.type == "cpu":
            self.unet.set_attn_processor(AttnProcessor())  # training on a CPU is 25% faster than with fused attention


def fit(
    work: Path, vae: AutoencoderKL, tokenizers: Path, plan: Plan = PLAN, count: int = COUNT
) -> tuple[UNet2DConditionModel, Texts]:
    """Train the denoiser and the text encoders on the latents and captions of the compositions."""
    torch.manual_seed(plan.seed)
    model = TextToLatents(tokenizers).to(DEVICE)
    # Compiled separately for each image size.
    denoise = torch.compile(model.unet, dynamic=False) if plan.steps >= COMPILED_STEPS else model.unet
    data = compositions(count)
    latents = {size: encode(vae, pictures) for size, pictures in data.pictures.items()}
    captions = {size: model.texts.tokens([scene.caption for scene in scenes]) for size, scenes in data.scenes.items()}
    empty_prompt = model.texts.tokens([""])
    alphas = scheduler().alphas_cumprod.to(DEVICE)

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        size = size_of_step(step)
        batch = SQUARE_BATCH if size == PICTURE_SIZES[0] else BATCH
        chosen = torch.randint(len(latents[size]), (batch,), generator=rng)
        clean = latents[size][chosen].to(DEVICE).float().contiguous(memory_format=torch.channels_last)
        dropped = torch.rand(batch, generator=rng)
        tokens = captions[size][chosen]
        tokens[dropped < NO_CAPTION] = empty_prompt
        with half_precision():
            states, whole = model.texts(tokens.to(DEVICE))
        kept = (dropped >= ALL_ZEROS).float()[:, None].to(DEVICE)
        states, whole = states.float() * kept[:, None], whole.float() * kept
        time = times(batch, rng).to(DEVICE)
        noise = torch.randn(clean.shape, generator=rng).to(DEVICE)
        signal, share = alphas[time].sqrt()[:, None, None, None], (1 - alphas[time]).sqrt()[:, None, None, None]
        conditions = {"text_embeds": whole, "time_ids": micro_conditions(size, batch).to(DEVICE)}
        noisy = (signal * clean + share * noise).contiguous(memory_format=torch.channels_last)
        with half_precision():
            prediction = denoise(noisy, time, states, added_cond_kwargs=conditions).sample
        return F.mse_loss(prediction.float(), signal * noise - share * clean)

    model = train("denoiser", model, loss_of, plan, work).requires_grad_(False)
    return model.unet, model.texts

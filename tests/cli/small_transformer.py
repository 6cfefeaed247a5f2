# SPDX-License-Identifier: Apache-2.0
"""A small random checkpoint of Stable Diffusion 3 with text encoders and VAE."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

from tests.diffusers.small_pipelines import GOLDEN

_TEXT = 32  # channels of each text encoder


def save_small_sd3(folder: Path) -> None:
    """Save the checkpoint; its image size is 64 x 64."""
    small_sd3().save_pretrained(folder)


def small_sd3() -> StableDiffusion3Pipeline:
    """Return the pipeline."""
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(GOLDEN / "tiny-sdxl" / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=_TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(tokenizer), d_model=2 * _TEXT, d_kv=8, d_ff=37, num_layers=1, num_heads=2, pad_token_id=0
    )
    transformer = SD3Transformer2DModel(
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=2 * _TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=2 * _TEXT,
        pos_embed_max_size=32,
    )
    for parameter in transformer.parameters():
        if parameter.std() == 0:  # layers that start as identity or zero would hide the guidance
            torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=tokenizer,
    )
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe

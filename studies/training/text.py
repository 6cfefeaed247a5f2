# SPDX-License-Identifier: Apache-2.0
"""The two text encoders, which are trained together with the denoiser."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from studies.training.words import NAMES, TOKENS

WIDTHS = (48, 80)  # different, because diffusers identifies the encoders of a single file by their widths


def text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
    """Return the configuration of one text encoder."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=4 * width,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


class Texts(nn.Module):
    """Both encoders with their tokenizers, used as ``StableDiffusionXLPipeline`` uses them.

    Args:
        folder: Folder of the tokenizers, see ``words.write``.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in NAMES]
        self.first = CLIPTextModel(text_config(self.tokenizers[0], WIDTHS[0], "quick_gelu"))
        self.second = CLIPTextModelWithProjection(text_config(self.tokenizers[1], WIDTHS[1], "gelu"))

    def tokens(self, captions: list[str]) -> torch.Tensor:
        """Return the token ids of both tokenizers, int64 ``[batch, 2, TOKENS]``."""
        settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        return torch.stack([tokenizer(captions, **settings).input_ids for tokenizer in self.tokenizers], dim=1)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states of all tokens and of the whole caption.

        Args:
            tokens: Token ids from ``tokens``.

        Returns:
            Tensors ``[batch, TOKENS, sum(WIDTHS)]`` and ``[batch, WIDTHS[1]]``.
        """
        first = self.first(tokens[:, 0], output_hidden_states=True)
        second = self.second(tokens[:, 1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return states, second.text_embeds

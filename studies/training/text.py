# SPDX-License-Identifier: Apache-2.0
"""The two text encoders, which learn to answer questions about a caption and then stay fixed."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from segkern.generation.loading import DEMO
from studies.evaluation.shapes import ATTRIBUTES, random_scene
from studies.training.loop import DEVICE, Plan, train

PLAN = Plan(steps=900, rate=2e-3, seed=2)
BATCH = 128
# Their words are those of the captions; they are not trained.
TOKENIZERS = tuple(DEMO / name for name in ("tokenizer", "tokenizer_2"))
WIDTHS = (48, 80)  # two, since diffusers tells the encoders of a single file apart by their widths
TOKENS = 32


def text_config(tokenizer: CLIPTokenizer, width: int, activation: str) -> CLIPTextConfig:
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
    """Both encoders with their tokenizers, used as ``StableDiffusionXLPipeline`` uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizers = [CLIPTokenizer.from_pretrained(folder) for folder in TOKENIZERS]
        self.first = CLIPTextModel(text_config(self.tokenizers[0], WIDTHS[0], "quick_gelu"))
        self.second = CLIPTextModelWithProjection(text_config(self.tokenizers[1], WIDTHS[1], "gelu"))

    def tokens(self, captions: list[str]) -> list[torch.Tensor]:
        settings = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        device = self.first.device
        return [tokenizer(captions, **settings).input_ids.to(device) for tokenizer in self.tokenizers]

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """States of all tokens ``[batch, TOKENS, sum(WIDTHS)]`` and of the whole caption ``[batch, WIDTHS[1]]``."""
        ids = self.tokens(captions)
        first = self.first(ids[0], output_hidden_states=True)
        second = self.second(ids[1], output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        return states, second.text_embeds


class Quiz(nn.Module):
    """Texts with a head for each question about a caption, on the whole caption and on its last token's states."""

    def __init__(self, texts: Texts) -> None:
        super().__init__()
        self.texts = texts
        answers = sum(len(known) + 1 for known in ATTRIBUTES.values())  # one more for what the caption does not say
        self.whole = nn.Linear(WIDTHS[1], answers)
        self.end = nn.Linear(sum(WIDTHS), answers)

    def forward(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, whole = self.texts(captions)
        end = (self.texts.tokens(captions)[1] == self.texts.tokenizers[1].eos_token_id).int().argmax(-1)
        return self.whole(whole), self.end(states[torch.arange(len(end)), end])


def fit(work: Path, plan: Plan = PLAN) -> Texts:
    """Both encoders, trained until they can tell everything that a caption says."""
    torch.manual_seed(plan.seed)
    texts = Texts()
    quiz = Quiz(texts).to(DEVICE)
    widths = [len(known) + 1 for known in ATTRIBUTES.values()]

    def loss_of(step: int, _: torch.Generator) -> torch.Tensor:
        rng = random.Random(f"captions/{plan.seed}/{step}")
        scenes = [random_scene(rng) for _ in range(BATCH)]
        labels = torch.tensor([scene.labels() for scene in scenes])
        unsaid = torch.tensor([not scene.names_background for scene in scenes])
        labels[:, -1].masked_fill_(unsaid, widths[-1] - 1)
        labels = labels.to(DEVICE)
        loss = torch.zeros((), device=DEVICE)
        for answers in quiz([scene.caption for scene in scenes]):
            for logits, label in zip(answers.split(widths, dim=-1), labels.unbind(1), strict=True):
                loss = loss + F.cross_entropy(logits, label) / 2
        return loss

    train("text", quiz, loss_of, plan, work)
    return texts.requires_grad_(False).eval()

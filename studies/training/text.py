# SPDX-License-Identifier: Apache-2.0
"""The tokenizers and the two text encoders, which learn to answer questions about a caption and then stay fixed."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from studies.evaluation.shapes import ATTRIBUTES, random_scene
from studies.training.loop import DEVICE, Plan, train

PLAN = Plan(steps=900, rate=2e-3, seed=2)
BATCH = 128
WIDTHS = (48, 80)  # two, since diffusers tells the encoders of a single file apart by their widths
TOKENS = 32
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = (
    "a an the of in on at and with or above below behind front left right over under next to between around "
    "red orange yellow green blue purple small large row column three six "
    "circle circles ring rings square squares triangle triangles star stars cross crosses dark light background"
)


def byte_symbols() -> list[str]:
    """The printable character of each byte in the byte-level alphabet of GPT-2 and CLIP, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]


def merges_of(words: str) -> list[tuple[str, str]]:
    """Merges that make each word one token: those of the words before it, then its own for what these leave apart."""
    merges: list[tuple[str, str]] = []
    for word in words.split():
        symbols = [*word[:-1], word[-1] + "</w>"]
        for left, right in merges:
            symbols = _merged(symbols, left, right)
        while len(symbols) > 1:
            merges.append((symbols[0], symbols[1]))
            symbols = _merged(symbols, *merges[-1])
    return merges


def _merged(symbols: list[str], left: str, right: str) -> list[str]:
    """The symbols with every ``left, right`` made one."""
    found: list[str] = []
    for symbol in symbols:
        if found and found[-1] == left and symbol == right:
            found[-1] = left + right
        else:
            found.append(symbol)
    return found


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.tokenizers = [
            write_tokenizer(folder / "tokenizer", END),
            write_tokenizer(folder / "tokenizer_2", "!"),
        ]
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
    texts = Texts(work / "texts")
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

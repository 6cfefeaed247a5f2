# SPDX-License-Identifier: Apache-2.0
"""The judge, trained on compositions of all drawings with noise. No composition is used twice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from studies.drawings.scenes import PICTURE_SIZES, numbered
from studies.drawings.sheet import drawings
from studies.evaluation.judge import Judge
from studies.training.data import scaled
from studies.training.loop import DEVICE, Plan, half_precision, train

PLAN = Plan(steps=3000, rate=2e-3, average=0.998, seed=4)
BATCH = 64
SERIES = "judge"  # seed of the compositions
_TURNS = (0, 1, 0, 2)  # indices into PICTURE_SIZES; pairs, which need more training, are more frequent than in TURNS


def fit(work: Path, plan: Plan = PLAN) -> Judge:
    """Train the judge. Noise and changes of contrast keep it from depending on exact levels."""
    torch.manual_seed(plan.seed)
    judge = Judge().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = tuple(drawings())

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        size = PICTURE_SIZES[_TURNS[step % len(_TURNS)]]
        indices = range(step * BATCH, (step + 1) * BATCH)
        drawn = [numbered(SERIES, index, size, names) for index in indices]
        labels = torch.tensor([scene.labels() for scene, _ in drawn])
        pixels = scaled(torch.stack([picture for _, picture in drawn]))
        contrast = 1 + 0.1 * torch.randn(BATCH, 1, 1, 1, generator=rng)
        noise = torch.rand(BATCH, 1, 1, 1, generator=rng) * 0.1 * torch.randn(pixels.shape, generator=rng)
        pixels = (pixels * contrast + noise).to(DEVICE).contiguous(memory_format=torch.channels_last)
        with half_precision():
            answers = judge(pixels)
        pairs = zip(answers, labels.to(DEVICE).unbind(1), strict=True)
        losses = [F.cross_entropy(logits.float(), label) for logits, label in pairs]
        return torch.stack(losses).sum()

    return train("judge", judge, loss_of, plan, work)

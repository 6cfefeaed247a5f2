# SPDX-License-Identifier: Apache-2.0
"""The classifier that measures samples, trained on drawings like the model's, with noise; none of them comes twice."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from studies.evaluation.judge import Judge
from studies.evaluation.shapes import numbered
from studies.training.data import SEED, in_turn, scaled
from studies.training.loop import DEVICE, Plan, half_precision, train

PLAN = Plan(steps=6000, rate=2e-3, average=0.998, seed=4)
BATCH = 64


def fit(work: Path, plan: Plan = PLAN) -> Judge:
    """Train on ever new drawings; noise and changes of contrast keep it from counting on exact levels."""
    torch.manual_seed(plan.seed)
    judge = Judge().to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = in_turn()

    def loss_of(step: int, rng: torch.Generator) -> torch.Tensor:
        size = order[step % len(order)]
        drawn = [numbered(SEED + plan.seed, index, size) for index in range(step * BATCH, (step + 1) * BATCH)]
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

# SPDX-License-Identifier: Apache-2.0
"""A small classifier of the drawings: its features and its answers are what samples are measured with."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from studies.evaluation.shapes import ATTRIBUTES

WEIGHTS = Path(__file__).parents[2] / "segkern" / "checkpoints" / "judge" / "model.safetensors"
FEATURES = 64


class Judge(nn.Module):
    """Answers ``ATTRIBUTES`` for pictures of any size of 64x64 pixels or more.

    Four convolutions halve each side, each followed by a residual block; coordinates are two more input channels,
    since a layout is a matter of place. The mean over the last map, normalised and projected, is the feature vector.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (5, 24, 48, 64, 96)
        self.halving = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.normal = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.residual = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in widths[1:])
        self.project = nn.Linear(2 * widths[-1], FEATURES)
        self.answer = nn.Linear(FEATURES, sum(map(len, ATTRIBUTES.values())))

    def maps(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Feature maps at 1/2, 1/4, 1/8 and 1/16 of the size, float ``[batch, channels, height, width]``.

        Args:
            pictures: float ``[batch, 3, height, width]`` between -1 and 1.
        """
        batch, _, height, width = pictures.shape
        y = torch.linspace(-1, 1, height, device=pictures.device)[:, None].expand(height, width)
        x = torch.linspace(-1, 1, width, device=pictures.device)[None, :].expand(height, width)
        state = torch.cat([pictures, torch.stack([y, x]).expand(batch, 2, height, width)], dim=1)
        maps = []
        for halving, normal, residual in zip(self.halving, self.normal, self.residual, strict=True):
            state = F.silu(halving(state))
            state = state + F.silu(residual(normal(state)))
            maps.append(state)
        return maps

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """float ``[batch, FEATURES]``, from pictures as in ``maps``."""
        return self._pool(self.maps(pictures)[-1])

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Logits of each attribute, in their order, from pictures as in ``maps``."""
        return list(self.answers(self.features(pictures)))

    def answers(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of each attribute from feature vectors."""
        return self.answer(F.silu(features)).split([len(known) for known in ATTRIBUTES.values()], dim=-1)

    def _pool(self, last: torch.Tensor) -> torch.Tensor:
        return self.project(torch.cat([last.mean((2, 3)), last.amax((2, 3))], dim=1))


def load_judge(path: Path = WEIGHTS) -> Judge:
    """The classifier that comes with the package, in evaluation mode.

    Raises:
        OSError: when its weights are not there.
    """
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return judge.requires_grad_(False).eval()

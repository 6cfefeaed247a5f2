# SPDX-License-Identifier: Apache-2.0
"""A small classifier of compositions. Its features and its answers are used to measure samples."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from studies.drawings.scenes import attributes

WEIGHTS = Path(__file__).parents[2] / "segkern" / "checkpoints" / "judge" / "model.safetensors"
FEATURES = 128
WIDTHS = (32, 64, 128, 192)
_PLACES = 2  # of the pooled map along each side, to tell the drawings of a pair apart


class Judge(nn.Module):
    """Classifier that answers the questions of ``attributes`` for images of at least 64x64 pixels.

    Four convolutions with stride 2, each followed by a residual block. The last map, averaged over its quarters, and
    its maximum, both normalized and projected, are the feature vector.
    """

    def __init__(self) -> None:
        super().__init__()
        before = (3, *WIDTHS[:-1])
        self.halving = nn.ModuleList(
            nn.Conv2d(narrow, wide, 3, stride=2, padding=1) for narrow, wide in zip(before, WIDTHS, strict=True)
        )
        self.normal = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.residual = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in WIDTHS)
        pooled = (_PLACES**2 + 1) * WIDTHS[-1]
        self.project = nn.Sequential(nn.LayerNorm(pooled), nn.Linear(pooled, FEATURES))
        self.answer = nn.Linear(FEATURES, sum(map(len, attributes().values())))

    def maps(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Return feature maps at 1/2, 1/4, 1/8 and 1/16 of the size, float ``[batch, channels, height, width]``.

        Args:
            pictures: Float tensor ``[batch, 3, height, width]`` between -1 and 1.
        """
        state = pictures
        maps = []
        for halving, normal, residual in zip(self.halving, self.normal, self.residual, strict=True):
            state = F.silu(halving(state))
            state = state + F.silu(residual(normal(state)))
            maps.append(state)
        return maps

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Return float ``[batch, FEATURES]``; see ``maps`` for ``pictures``."""
        return self._pool(self.maps(pictures)[-1])

    def forward(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        """Return the logits of each question; see ``maps`` for ``pictures``."""
        return list(self.answers(self.features(pictures)))

    def answers(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the logits of each question from feature vectors."""
        return self.answer(F.silu(features)).split([len(known) for known in attributes().values()], dim=-1)

    def _pool(self, last: torch.Tensor) -> torch.Tensor:
        places = F.adaptive_avg_pool2d(last, _PLACES).flatten(1)
        return self.project(torch.cat([places, last.amax((2, 3))], dim=1))


def load_judge(path: Path = WEIGHTS) -> Judge:
    """Return the bundled classifier in evaluation mode.

    Raises:
        OSError: If its weights do not exist.
    """
    judge = Judge()
    judge.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    return judge.requires_grad_(False).eval()

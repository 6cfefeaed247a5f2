# SPDX-License-Identifier: Apache-2.0
"""Fidelity, diversity and faithfulness of samples, in the features of the judge.

Frechet and kernel distance are torchmetrics' own, given the judge's features instead of Inception's; their values
compare with each other only, never with distances in other features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from studies.evaluation.judge import FEATURES, Judge
from studies.evaluation.shapes import ATTRIBUTES, Scene

NEIGHBOURS = 3
KERNEL_SUBSETS = 20


@dataclass(frozen=True)
class Judged:
    """The judge's view of a set of pictures.

    Attributes:
        features: float32 ``[count, FEATURES]``.
        answers: int64 ``[count, len(ATTRIBUTES)]``: the most likely answer to each question.
    """

    features: torch.Tensor
    answers: torch.Tensor


@torch.no_grad()
def judged(judge: Judge, pictures: torch.Tensor, batch: int = 128) -> Judged:
    """Show pictures to the judge.

    Args:
        judge: the classifier.
        pictures: uint8 ``[count, 3, height, width]``.
        batch: pictures at once.
    """
    features = torch.cat([judge.features(_levels(judge, part)) for part in pictures.split(batch)])
    answers = torch.stack([logits.argmax(-1) for logits in judge.answers(features)], dim=1)
    return Judged(features.cpu(), answers.cpu())


def unit(real: torch.Tensor) -> float:
    """The length by which features are divided before they are measured, so that numbers stay near 1.

    The root of the mean variance of a channel over real drawings: Frechet distance is then in units of that variance,
    and the kernel distance's cubic kernel sees features of the size that it was made for.

    Args:
        real: features ``[count, FEATURES]``.

    Example:
        >>> features = 100 * torch.randn(64, FEATURES)
        >>> round(unit(features / unit(features)), 4)
        1.0
    """
    return float(real.double().var(dim=0).mean().sqrt())


class _AsTheyAre(nn.Module):
    """Stands where torchmetrics expects a network and hands features on."""

    num_features = FEATURES

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Frechet distance of the Gaussians with the features' means and covariances; biased upwards in small sets.

    Args:
        real: features ``[count, FEATURES]``.
        fake: features ``[count, FEATURES]``.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre()).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """KID: the unbiased squared maximum mean discrepancy under a cubic kernel, against random subsets of ``real``.

    Args:
        real: features ``[count, FEATURES]``, as many as ``fake`` or more.
        fake: features ``[count, FEATURES]``.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    with torch.random.fork_rng():
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
            metric = KernelInceptionDistance(feature=_AsTheyAre(), subsets=KERNEL_SUBSETS, subset_size=len(fake))
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        return float(metric.compute()[0])


def precision_recall(real: torch.Tensor, fake: torch.Tensor) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al., NeurIPS 2019).

    Precision is the share of samples that lie within the distance of a real picture to its k-th nearest real
    neighbour, recall the share of real pictures that lie so near to a sample.

    Args:
        real: features ``[count, FEATURES]``.
        fake: features ``[count, FEATURES]``, best as many as ``real``.

    Example:
        >>> points = torch.randn(32, FEATURES)
        >>> precision_recall(points, points)
        (1.0, 1.0)
    """
    apart = torch.cdist(real.double(), fake.double())

    def reach(points: torch.Tensor) -> torch.Tensor:
        among = torch.cdist(points.double(), points.double())
        return among.kthvalue(NEIGHBOURS + 1, dim=1).values  # the nearest is the point itself

    precision = (apart <= reach(real)[:, None]).any(0)
    recall = (apart <= reach(fake)[None, :]).any(1)
    return float(precision.double().mean()), float(recall.double().mean())


def caption_accuracy(answers: torch.Tensor, scenes: Sequence[Scene]) -> float:
    """The share of the captions' statements that pictures fulfil.

    Args:
        answers: int64 ``[count, len(ATTRIBUTES)]``, the judge's.
        scenes: what each picture was to show.
    """
    labels = torch.tensor([scene.labels() for scene in scenes])
    stated = torch.tensor([_stated(scene) for scene in scenes])
    return float((answers == labels)[stated].double().mean())


def _stated(scene: Scene) -> list[bool]:
    answers = scene.answers()
    return [scene.names_background if name == "background" else answers[name] != "none" for name in ATTRIBUTES]


@torch.no_grad()
def picture_distance(judge: Judge, first: torch.Tensor, second: torch.Tensor, batch: int = 128) -> float:
    """Mean distance of pairs of pictures in the judge's feature maps.

    The form of LPIPS (Zhang et al., CVPR 2018) without its learned weights: at each depth, the squared difference of
    maps normalised over their channels, summed over channels, averaged over places, summed over depths.

    Args:
        judge: the classifier.
        first: uint8 ``[count, 3, height, width]``.
        second: like ``first``.
        batch: pairs at once.
    """
    total = 0.0
    for parts in zip(first.split(batch), second.split(batch), strict=True):
        for left, right in zip(*(judge.maps(_levels(judge, part)) for part in parts), strict=True):
            difference = nn.functional.normalize(left, dim=1) - nn.functional.normalize(right, dim=1)
            total += float(difference.square().sum(1).mean((1, 2)).sum())
    return total / len(first)


def _levels(judge: Judge, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 pictures as the judge takes them, on its device."""
    return pictures.to(next(judge.parameters()).device).float() / 127.5 - 1

# SPDX-License-Identifier: Apache-2.0
"""Fidelity, diversity, faithfulness and novelty of samples, mostly in the features of the judge.

torchmetrics computes Frechet and kernel distance from the judge's features instead of Inception's. The values can only
be compared with each other, not with distances in other features.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from studies.drawings.scenes import Scene, attributes
from studies.evaluation.judge import FEATURES, Judge

NEIGHBOURS = 3
KERNEL_SUBSETS = 20


@dataclass(frozen=True)
class Judged:
    """Features and answers of the judge for a set of images.

    Attributes:
        features: float32 ``[count, FEATURES]``.
        answers: int64 ``[count, questions]``: index of the most likely answer to each question of ``attributes``.
    """

    features: torch.Tensor
    answers: torch.Tensor


@torch.no_grad()
def judged(judge: Judge, pictures: torch.Tensor, batch: int = 128) -> Judged:
    """Run the judge on images.

    Args:
        judge: Classifier.
        pictures: uint8 ``[count, 3, height, width]``.
        batch: Number of images per batch.
    """
    features = torch.cat([judge.features(_levels(judge, part)) for part in pictures.split(batch)])
    answers = torch.stack([logits.argmax(-1) for logits in judge.answers(features)], dim=1)
    return Judged(features.cpu(), answers.cpu())


def unit(real: torch.Tensor) -> float:
    """Return the scale by which features are divided before they are measured.

    It is the root of the mean variance of a feature over real compositions. Frechet distance is then in units of this
    variance, and the cubic kernel of the kernel distance gets features of the size it is made for.

    Args:
        real: Features ``[count, FEATURES]``.

    Example:
        >>> features = 100 * torch.randn(64, FEATURES)
        >>> round(unit(features / unit(features)), 4)
        1.0
    """
    return float(real.double().var(dim=0).mean().sqrt())


class _AsTheyAre(nn.Module):
    """Identity in place of the network that torchmetrics expects."""

    num_features = FEATURES

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return the Frechet distance of Gaussians with the features' means and covariances. Small sets bias it upwards.

    Args:
        real: Features ``[count, FEATURES]``.
        fake: Features ``[count, FEATURES]``.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_AsTheyAre()).set_dtype(torch.float64)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kernel_distance(real: torch.Tensor, fake: torch.Tensor) -> float:
    """Return KID: the unbiased squared maximum mean discrepancy with a cubic kernel, over random subsets of ``real``.

    Args:
        real: Features ``[count, FEATURES]``, at least as many as in ``fake``.
        fake: Features ``[count, FEATURES]``.
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
    """Return improved precision and recall (Kynkaanniemi et al., NeurIPS 2019).

    Precision is the share of samples that are at least as close to a real image as its k-th nearest real neighbour.
    Recall is the share of real images that are at least as close to a sample as its k-th nearest sample.

    Args:
        real: Features ``[count, FEATURES]``.
        fake: Features ``[count, FEATURES]``, preferably as many as in ``real``.

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
    """Return the share of the captions' statements that are true for the images.

    Args:
        answers: Answers of the judge, int64 ``[count, questions]``.
        scenes: Scene that each image should show.
    """
    labels = torch.tensor([scene.labels() for scene in scenes])
    stated = torch.tensor([_stated(scene) for scene in scenes])
    return float((answers == labels)[stated].double().mean())


def _stated(scene: Scene) -> list[bool]:
    pair = scene.layout != "single"
    stated = {"layout": pair, "drawing": True, "second drawing": pair, "background": scene.names_background}
    return [stated[question] for question in attributes()]


def training_distances(pictures: torch.Tensor, training: torch.Tensor, batch: int = 2048) -> torch.Tensor:
    """Return the distance of each image to the nearest training image.

    The distance is the root mean square difference of levels from 0 to 1, at half the resolution. An exact copy has
    distance 0.

    Args:
        pictures: uint8 ``[count, 3, height, width]``.
        training: uint8 tensor of the same height and width.
        batch: Number of training images per batch.

    Returns:
        float32 ``[count]``.

    Example:
        >>> pictures = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
        >>> training_distances(pictures, pictures.flip(0)).tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    points = _small(pictures)
    nearest = [torch.cdist(points, _small(part)).amin(1) for part in training.split(batch)]
    return torch.stack(nearest).amin(0) / points.shape[1] ** 0.5


def _small(pictures: torch.Tensor) -> torch.Tensor:
    return nn.functional.avg_pool2d(pictures.float() / 255, 2).flatten(1)


@torch.no_grad()
def picture_distance(judge: Judge, first: torch.Tensor, second: torch.Tensor, batch: int = 128) -> float:
    """Return the mean distance of pairs of images in the judge's feature maps.

    This is LPIPS (Zhang et al., CVPR 2018) without its learned weights: the squared difference of maps that are
    normalized over their channels, summed over channels, averaged over positions and summed over depths.

    Args:
        judge: Classifier.
        first: uint8 ``[count, 3, height, width]``.
        second: Tensor of the same shape and dtype as ``first``.
        batch: Number of pairs per batch.
    """
    total = 0.0
    for parts in zip(first.split(batch), second.split(batch), strict=True):
        for left, right in zip(*(judge.maps(_levels(judge, part)) for part in parts), strict=True):
            difference = nn.functional.normalize(left, dim=1) - nn.functional.normalize(right, dim=1)
            total += float(difference.square().sum(1).mean((1, 2)).sum())
    return total / len(first)


def _levels(judge: Judge, pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 images in the value range of the judge, on its device."""
    return pictures.to(next(judge.parameters()).device).float() / 127.5 - 1

# SPDX-License-Identifier: Apache-2.0
"""Measures agree with their definitions, and the judge recognizes new compositions."""

from __future__ import annotations

import pytest
import torch

from studies.drawings.scenes import PICTURE_SIZES, Scene, attributes, numbered
from studies.drawings.sheet import drawings
from studies.evaluation.judge import FEATURES, Judge, load_judge
from studies.evaluation.metrics import (
    caption_accuracy,
    frechet_distance,
    judged,
    kernel_distance,
    picture_distance,
    precision_recall,
    training_distances,
    unit,
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


def test_frechet_distance_is_the_formula() -> None:
    real, fake = torch.randn(300, FEATURES).double(), 1.5 * torch.randn(200, FEATURES).double() + 0.3
    first, second = torch.cov(real.T), torch.cov(fake.T)
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + first.trace() + second.trace() - 2 * cross
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-6)
    assert abs(frechet_distance(real, real)) < 1e-6


def test_kernel_distance_is_the_formula() -> None:
    real, fake = torch.randn(60, FEATURES), torch.randn(60, FEATURES) + 0.2

    def kernel(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return (one.double() @ other.double().T / FEATURES + 1) ** 3

    apart = ~torch.eye(60, dtype=torch.bool)
    expected = kernel(real, real)[apart].mean() + kernel(fake, fake)[apart].mean() - 2 * kernel(real, fake).mean()
    state = torch.get_rng_state()
    assert kernel_distance(real, fake) == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    assert torch.equal(torch.get_rng_state(), state)


def test_unit_is_the_spread_of_a_channel() -> None:
    real = torch.randn(500, FEATURES) * torch.linspace(1, 3, FEATURES) + 5
    variances = (real - real.mean(0)).square().sum(0) / 499
    assert unit(real) == pytest.approx(float(variances.mean().sqrt()), rel=1e-5)
    assert frechet_distance(2 * real[:250], 2 * real[250:]) / unit(2 * real) ** 2 == pytest.approx(
        frechet_distance(real[:250], real[250:]) / unit(real) ** 2, rel=1e-5
    )


def test_precision_and_recall_count_neighbours() -> None:
    real, fake = torch.randn(40, FEATURES), torch.randn(40, FEATURES) * 1.3

    def covered(points: torch.Tensor, by: torch.Tensor) -> float:
        inside = 0
        for point in points:
            for ball in by:
                reach = sorted(float(torch.dist(ball, other)) for other in by)[3]
                if float(torch.dist(point, ball)) <= reach:
                    inside += 1
                    break
        return inside / len(points)

    precision, recall = precision_recall(real, fake)
    assert precision == pytest.approx(covered(fake, real))
    assert recall == pytest.approx(covered(real, fake))


def test_precision_without_diversity() -> None:
    real = torch.randn(64, FEATURES)
    copies = real[:1].expand(64, -1) + 1e-6 * torch.randn(64, FEATURES)
    precision, recall = precision_recall(real, copies)
    assert precision == 1.0
    assert recall <= 1 / 64
    assert precision_recall(real, real + 1000) == (0.0, 0.0)


def test_only_what_a_caption_says_is_asked() -> None:
    first = Scene("single", ("fox",), "pink", "fox")
    second = Scene("beside", ("owl", "pizza"), "blue", "owl and pizza on a blue background")
    right = torch.tensor([first.labels(), second.labels()])
    assert caption_accuracy(right, [first, second]) == 1.0
    wrong = right.clone()
    names = list(attributes())
    wrong[0, names.index("background")] = 1  # not in the caption
    wrong[0, names.index("second drawing")] = 2  # not in the caption
    wrong[0, names.index("layout")] = 2  # not in the caption
    assert caption_accuracy(wrong, [first, second]) == 1.0
    wrong[1, names.index("background")] = 0  # in the caption
    wrong[1, names.index("drawing")] = 0  # in the caption
    # drawing; layout, drawing, second drawing, background
    assert caption_accuracy(wrong, [first, second]) == pytest.approx(3 / 5)


def test_distance_to_training_images_finds_copies() -> None:
    training = torch.stack([numbered(1, index, (64, 64))[1] for index in range(12)])
    new = torch.stack([numbered(2, index, (64, 64))[1] for index in range(3)])
    distances = training_distances(torch.cat([training[[7, 2]], new]), training, batch=5)
    assert distances[:2].max() < 1e-3
    assert distances[2:].min() > 0.05
    halved = [torch.nn.functional.avg_pool2d(images.float() / 255, 2) for images in (new, training)]
    expected = (halved[0][:, None] - halved[1]).square().mean((2, 3, 4)).sqrt().amin(1)
    torch.testing.assert_close(distances[2:], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("size", PICTURE_SIZES, ids=str)
def test_judge_recognizes_new_compositions(judge: Judge, size: tuple[int, int]) -> None:
    names = tuple(drawings())
    scenes, pictures = zip(*(numbered(987_654, index, size, names) for index in range(512)), strict=True)
    answers = judged(judge, torch.stack(pictures)).answers
    right = (answers == torch.tensor([scene.labels() for scene in scenes])).double().mean(0)
    assert right.min() > 0.95, dict(zip(attributes(), right.tolist(), strict=True))


def test_picture_distance(judge: Judge) -> None:
    pictures = torch.stack([numbered(seed, 0)[1] for seed in range(4)])
    assert picture_distance(judge, pictures, pictures) == 0
    others = pictures.roll(1, 0)
    there, back = picture_distance(judge, pictures, others), picture_distance(judge, others, pictures)
    assert there == pytest.approx(back, rel=1e-5)
    nearly = (pictures.float() + 4 * torch.randn(pictures.shape)).clamp(0, 255).to(torch.uint8)
    assert 0 < picture_distance(judge, pictures, nearly) < there
    in_parts = picture_distance(judge, pictures, others, batch=3)
    assert in_parts == pytest.approx(there, rel=1e-5)

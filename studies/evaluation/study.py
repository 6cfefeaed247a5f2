# SPDX-License-Identifier: Apache-2.0
"""Samples of the bundled model, their measures, and a file of the measurements to resume an interrupted study from."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from segkern.core.environment import fingerprint
from studies.drawings.scenes import PICTURE_SIZES, Scene, draw, numbered, random_scene
from studies.drawings.sheet import held_out
from studies.evaluation import metrics
from studies.evaluation.judge import Judge
from studies.evaluation.report import describe
from studies.evaluation.settings import Setting
from studies.training import data

SIZE = PICTURE_SIZES[0]  # all samples are square
REFERENCE_SEED = 777  # of the new compositions; the training series has another seed
REFERENCE_COUNT = 4096
COPIES_PERCENTILE = 0.01  # of the new compositions' distances to training images; samples below it count as copies


def prompts(seed: int, count: int, names: Sequence[str] | None = None) -> list[Scene]:
    """Return the scenes whose captions are the prompts of a seed; see ``random_scene`` for ``names``."""
    return [random_scene(random.Random(f"prompts/{seed}/{index}"), *SIZE, names) for index in range(count)]


def reference(count: int = REFERENCE_COUNT) -> torch.Tensor:
    """Return new compositions of the drawings that the model was trained on, uint8 ``[count, 3, height, width]``."""
    return torch.stack([numbered(REFERENCE_SEED, index, SIZE)[1] for index in range(count)])


def training(count: int = data.COUNT) -> torch.Tensor:
    """Return the square images among the first ``count`` that the model was trained on."""
    return data.compositions(count).pictures[SIZE]


def sample(pipe: Any, setting: Setting, seed: int, count: int, steps: int, batch: int = 64) -> Iterator[torch.Tensor]:
    """Yield samples in batches, uint8 ``[batch, 3, height, width]``.

    Initial noise and prompt of sample ``i`` of a seed are the same for all settings and batch sizes.
    """
    from segkern.integrations.diffusers import guide

    captions = [scene.caption for scene in prompts(seed, count)] if setting.mode == "prompts" else [""] * count
    specs = setting.specs()
    guidance = guide(pipe, *specs) if specs else None
    try:
        for first in range(0, count, batch):
            indices = range(first, min(first + batch, count))
            pictures = pipe(
                captions[first : first + batch],
                guidance_scale=setting.cfg,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed * 1_000_003 + index) for index in indices],
                output_type="pt",
            ).images
            yield (pictures.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    finally:
        if guidance:
            guidance.remove()


class Study:
    """Measures settings and appends each measurement to a file.

    Args:
        pipe: Pipeline of the bundled model, without a progress bar.
        judge: Classifier.
        path: JSON-lines file of measurements. Measurements in it are not repeated.
        images: Number of images per setting and seed.
        steps: Number of inference steps.
        batch: Number of images per batch.

    Attributes:
        kind: Fingerprint of the weights, and the dtype.
        cells: Measurements, one for each setting and seed.

    Raises:
        ValueError: If the file has measurements of another model, or ``images`` exceeds the number of new compositions.
    """

    def __init__(self, pipe: Any, judge: Judge, path: Path, images: int, steps: int, batch: int = 64) -> None:
        if images > REFERENCE_COUNT:
            raise ValueError(
                f"there are {REFERENCE_COUNT} new compositions to compare with, fewer than {images} images"
            )
        self.pipe, self.judge, self.path = pipe, judge, path
        self.images, self.steps, self.batch = images, steps, batch
        weights = fingerprint(pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, judge)
        self.kind = {"weights": weights, "dtype": str(pipe.unet.dtype).removeprefix("torch.")}
        self.cells = self._read_cells()
        compositions = reference()
        self._training = training()
        distances = metrics.training_distances(compositions[:1024], self._training)
        self._copy = float(distances.quantile(COPIES_PERCENTILE))
        real = metrics.judged(judge, compositions).features
        self._unit = metrics.unit(real)
        self._real = real / self._unit
        self._unguided: dict[tuple[str, int], torch.Tensor] = {}

    def _read_cells(self) -> list[dict[str, Any]]:
        """Return the measurements of an earlier run, and remove an incomplete last line from the file."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        complete = text[: text.rfind("\n") + 1] or json.dumps(self.kind) + "\n"
        kind, *cells = [json.loads(line) for line in complete.splitlines()]
        if kind != self.kind:
            raise ValueError(
                f"{str(self.path)!r} holds measurements of {kind}, not of {self.kind}; choose another --out"
            )
        if complete != text:
            self.path.write_text(complete, encoding="utf-8")
        return cells

    def _key(self, setting: Setting, seed: int, steps: int | None) -> dict[str, Any]:
        return {"setting": setting.to_dict(), "seed": seed, "images": self.images, "steps": steps or self.steps}

    def find(self, setting: Setting, seed: int, steps: int | None = None) -> dict[str, Any] | None:
        """Return the measurement of a setting and seed with this number of images and steps, or None."""
        key = self._key(setting, seed, steps)
        return next((cell for cell in self.cells if key.items() <= cell.items()), None)

    def measure(
        self, setting: Setting, seed: int, advance: Callable[[str, int], None], steps: int | None = None
    ) -> dict[str, Any]:
        """Sample and measure one setting with one seed, and append the measurement to the file.

        Args:
            setting: Setting to sample with.
            seed: Seed of the initial noise and the prompts.
            advance: Called with the name of the measurement and the size of every batch.
            steps: Number of inference steps; None uses the study's. Unguided images, to which the distance is measured,
                always have the study's number of steps.
        """
        name = f"{setting.mode}, {describe(setting)}, seed {seed}"
        known = self.find(setting, seed, steps)
        if known is not None:
            advance(name, self.images)
            return known
        began = time.perf_counter()
        batches = []
        for batch in sample(self.pipe, setting, seed, self.images, steps or self.steps, self.batch):
            batches.append(batch)
            advance(name, len(batch))
        seconds = (time.perf_counter() - began) / self.images
        measures = self._measures(setting, seed, torch.cat(batches))
        cell = self._key(setting, seed, steps) | {"measures": measures, "seconds_per_image": seconds}
        self.cells.append(cell)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        return cell

    def drawn(self, seed: int) -> dict[str, float]:
        """Return the measures of new compositions of the seed's prompts, which a perfect model could reach."""
        return self._drawn(prompts(seed, self.images), seed)

    def unseen(self, seed: int) -> dict[str, float]:
        """Return the measures of compositions of the drawings that the model was not trained on."""
        return self._drawn(prompts(seed, self.images, held_out()), seed)

    def _drawn(self, scenes: list[Scene], seed: int) -> dict[str, float]:
        numbers = enumerate(scenes)
        pictures = [draw(scene, *SIZE, random.Random(f"drawn/{seed}/{index}")) for index, scene in numbers]
        return self._judged(torch.stack(pictures), scenes)

    def _judged(self, pictures: torch.Tensor, scenes: list[Scene] | None) -> dict[str, float]:
        judged = metrics.judged(self.judge, pictures)
        features = judged.features / self._unit
        precision, recall = metrics.precision_recall(self._real[: len(pictures)], features)
        distances = metrics.training_distances(pictures, self._training)
        measures = {
            "frechet_distance": metrics.frechet_distance(self._real, features),
            "kernel_distance": metrics.kernel_distance(self._real, features),
            "precision": precision,
            "recall": recall,
            "training_distance": float(distances.mean()),
            "copies": float((distances < self._copy).float().mean()),
        }
        if scenes is not None:
            measures["caption_accuracy"] = metrics.caption_accuracy(judged.answers, scenes)
        return measures

    def _measures(self, setting: Setting, seed: int, pictures: torch.Tensor) -> dict[str, float]:
        plain, key = Setting(setting.mode), (setting.mode, seed)
        if setting == plain:
            self._unguided[key] = pictures
        elif key not in self._unguided:
            batches = sample(self.pipe, plain, seed, self.images, self.steps, self.batch)
            self._unguided[key] = torch.cat(list(batches))
        distance = metrics.picture_distance(self.judge, self._unguided[key], pictures)
        scenes = prompts(seed, len(pictures)) if setting.mode == "prompts" else None
        return self._judged(pictures, scenes) | {"distance_to_unguided": distance}

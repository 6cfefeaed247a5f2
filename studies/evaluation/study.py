# SPDX-License-Identifier: Apache-2.0
"""Samples of a model of the drawings, their measures, and a file of these so that a study that was cut off goes on."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from segkern.core.environment import fingerprint
from studies.evaluation import metrics
from studies.evaluation.judge import Judge
from studies.evaluation.report import describe
from studies.evaluation.settings import Setting
from studies.evaluation.shapes import PICTURE_SIZES, Scene, draw, numbered, random_scene

REFERENCE_SEED = 777  # of the series of real drawings; the training series has another
REFERENCE_COUNT = 4096


def prompts(seed: int, count: int) -> list[Scene]:
    """Scenes whose captions are the prompts of a seed."""
    return [random_scene(random.Random(f"prompts/{seed}/{index}")) for index in range(count)]


def reference(count: int = REFERENCE_COUNT, size: tuple[int, int] = PICTURE_SIZES[0]) -> torch.Tensor:
    """Real drawings that the model was not trained on, uint8 ``[count, 3, height, width]``."""
    return torch.stack([numbered(REFERENCE_SEED, index, size)[1] for index in range(count)])


def sample(pipe: Any, setting: Setting, seed: int, count: int, steps: int, batch: int = 64) -> Iterator[torch.Tensor]:
    """Samples in batches, uint8 ``[batch, 3, height, width]``.

    Sample ``i`` of a seed begins from the same noise, and has the same prompt, whatever the setting and the batch.
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
        pipe: a pipeline that draws these drawings, without progress bar.
        judge: the classifier.
        path: JSON-lines file of measurements; those in it are not made again.
        images: per setting and seed.
        steps: of the scheduler.
        batch: pictures at once.

    Attributes:
        kind: fingerprint of the weights, and the dtype.
        cells: the measurements, one for each setting and seed.

    Raises:
        ValueError: for a file with measurements of another model, and for more images than there are real drawings.
    """

    def __init__(self, pipe: Any, judge: Judge, path: Path, images: int, steps: int, batch: int = 64) -> None:
        if images > REFERENCE_COUNT:
            raise ValueError(f"there are {REFERENCE_COUNT} real drawings to compare with, fewer than {images} images")
        self.pipe, self.judge, self.path = pipe, judge, path
        self.images, self.steps, self.batch = images, steps, batch
        weights = fingerprint(pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, judge)
        self.kind = {"weights": weights, "dtype": str(pipe.unet.dtype).removeprefix("torch.")}
        self.cells = self._read_cells()
        real = metrics.judged(judge, reference()).features
        self._unit = metrics.unit(real)
        self._real = real / self._unit
        self._unguided: dict[tuple[str, int], torch.Tensor] = {}

    def _read_cells(self) -> list[dict[str, Any]]:
        """Measurements of an earlier run; a line that it was cut off in is taken away."""
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

    def _key(self, setting: Setting, seed: int) -> dict[str, Any]:
        return {"setting": setting.to_dict(), "seed": seed, "images": self.images, "steps": self.steps}

    def find(self, setting: Setting, seed: int) -> dict[str, Any] | None:
        """The measurement of a setting and seed with as many images and steps, if it was made."""
        key = self._key(setting, seed)
        return next((cell for cell in self.cells if key.items() <= cell.items()), None)

    def measure(self, setting: Setting, seed: int, advance: Callable[[str, int], None]) -> dict[str, Any]:
        """Sample, measure and write down one setting with one seed.

        Args:
            setting: to sample with.
            seed: of the noise and the prompts.
            advance: is called with the name of what is measured and the size of every batch.
        """
        name = f"{setting.mode}, {describe(setting)}, seed {seed}"
        known = self.find(setting, seed)
        if known is not None:
            advance(name, self.images)
            return known
        began = time.perf_counter()
        batches = []
        for batch in sample(self.pipe, setting, seed, self.images, self.steps, self.batch):
            batches.append(batch)
            advance(name, len(batch))
        seconds = (time.perf_counter() - began) / self.images
        measures = self._measures(setting, seed, torch.cat(batches))
        cell = self._key(setting, seed) | {"measures": measures, "seconds_per_image": seconds}
        self.cells.append(cell)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        return cell

    def drawn(self, seed: int) -> dict[str, float]:
        """Measures of as many real drawings, of the seed's prompts: what a perfect model could reach."""
        scenes = enumerate(prompts(seed, self.images))
        pictures = [draw(scene, *PICTURE_SIZES[0], random.Random(f"drawn/{seed}/{index}")) for index, scene in scenes]
        return self._judged("prompts", seed, torch.stack(pictures))

    def _judged(self, mode: str, seed: int, pictures: torch.Tensor) -> dict[str, float]:
        judged = metrics.judged(self.judge, pictures)
        features = judged.features / self._unit
        precision, recall = metrics.precision_recall(self._real[: len(pictures)], features)
        measures = {
            "frechet_distance": metrics.frechet_distance(self._real, features),
            "kernel_distance": metrics.kernel_distance(self._real, features),
            "precision": precision,
            "recall": recall,
        }
        if mode == "prompts":
            measures["caption_accuracy"] = metrics.caption_accuracy(judged.answers, prompts(seed, len(pictures)))
        return measures

    def _measures(self, setting: Setting, seed: int, pictures: torch.Tensor) -> dict[str, float]:
        plain, key = Setting(setting.mode), (setting.mode, seed)
        if setting == plain:
            self._unguided[key] = pictures
        elif key not in self._unguided:
            batches = sample(self.pipe, plain, seed, self.images, self.steps, self.batch)
            self._unguided[key] = torch.cat(list(batches))
        distance = metrics.picture_distance(self.judge, self._unguided[key], pictures)
        return self._judged(setting.mode, seed, pictures) | {"distance_to_unguided": distance}

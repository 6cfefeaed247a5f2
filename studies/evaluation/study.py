# SPDX-License-Identifier: Apache-2.0
"""A study of guidance on a model of the drawings: which settings, how samples are made and measured, what is kept."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segkern.core.environment import fingerprint
from studies.evaluation import metrics
from studies.evaluation.judge import Judge
from studies.evaluation.shapes import PICTURE_SIZES, Scene, draw, numbered, random_scene

if TYPE_CHECKING:
    from segkern.integrations.diffusers.specs.base import Spec

MODES = ("unconditional", "prompts")
REFERENCE_SEED = 777  # of the series of real drawings; the training series has another
REFERENCE_COUNT = 4096

# Fields that were not there when the committed evaluation was made, and what they were then.
_LATER = {"reuse": 1, "pag": 0.0, "sag": 0.0}


@dataclass(frozen=True)
class Setting:
    """One way to sample.

    Attributes:
        mode: ``"unconditional"`` (the empty prompt) or ``"prompts"``.
        cfg: ``guidance_scale`` of classifier-free guidance; 1 is none.
        seg: scale of smoothed energy guidance; 0 is none.
        sigma: blur in tokens of the model's own grid; ``math.inf`` is the mean query. 0 without SEG.
        layers: guided layers, as ``SEG`` takes them; empty without SEG.
        start: fraction of the run at which SEG begins.
        stop: fraction of the run at which it ends.
        reuse: steps for which a perturbed branch serves.
        pag: scale of perturbed-attention guidance in the mid block; 0 is none.
        sag: scale of self-attention guidance; 0 is none.
    """

    mode: str
    cfg: float = 1.0
    seg: float = 0.0
    sigma: float = 0.0
    layers: str = ""
    start: float = 0.0
    stop: float = 1.0
    reuse: int = 1
    pag: float = 0.0
    sag: float = 0.0

    @property
    def method(self) -> str:
        """``none``, or which of ``CFG``, ``SEG``, ``PAG`` and ``SAG`` are in it, such as ``CFG + SEG``."""
        scales = {"CFG": self.cfg - 1, "SEG": self.seg, "PAG": self.pag, "SAG": self.sag}
        return " + ".join(name for name, scale in scales.items() if scale > 0) or "none"

    def specs(self) -> tuple[Spec, ...]:
        """The guidances to hand to ``guide``; classifier-free guidance is the pipeline's own."""
        from segkern.integrations.diffusers import PAG, SAG, SEG

        found: list[Spec] = []
        if self.seg:
            layers = self.layers.split(",")
            found.append(SEG(self.seg, self.sigma, layers, self.start, self.stop, reuse=self.reuse))
        if self.pag:
            found.append(PAG(self.pag))
        if self.sag:
            found.append(SAG(self.sag))
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The setting in JSON's types, infinity as a word; without what came later and is at its default."""
        found = asdict(self) | {"sigma": "inf" if math.isinf(self.sigma) else self.sigma}
        return {name: value for name, value in found.items() if name not in _LATER or value != _LATER[name]}

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Setting:
        """The setting that ``to_dict`` wrote."""
        return cls(**(kept | {"sigma": float(kept["sigma"])}))


def grid(
    mode: str,
    scales: Sequence[float],
    sigmas: Sequence[float],
    cfg_scales: Sequence[float],
    layers: str = "mid",
) -> list[Setting]:
    """No guidance, CFG where there are prompts, and SEG at every scale and sigma; with prompts also both together.

    Example:
        >>> [setting.method for setting in grid("prompts", [3.0], [math.inf], [2.0])]
        ['none', 'CFG', 'SEG', 'CFG + SEG']
    """
    found = [Setting(mode)]
    if mode == "prompts":
        found += [Setting(mode, cfg=cfg) for cfg in cfg_scales]
    found += [Setting(mode, 1.0, scale, sigma, layers) for sigma in sigmas for scale in scales]
    if mode == "prompts" and cfg_scales:
        middle = cfg_scales[len(cfg_scales) // 2]
        found += [Setting(mode, middle, scale, sigmas[-1], layers) for scale in scales]
    return found


def variants(mode: str, scales: Sequence[float], sigma: float) -> list[Setting]:
    """SEG in other layers, and in halves of the run: where else one may look for a setting that helps."""
    places = [("down", 0.0, 1.0), ("up", 0.0, 1.0), ("mid,up", 0.0, 1.0), ("mid", 0.0, 0.5), ("mid", 0.5, 1.0)]
    return [Setting(mode, 1.0, scale, sigma, *place) for place in places for scale in scales]


def family(mode: str, sigma: float = math.inf) -> list[Setting]:
    """Every guidance by itself, by scale, and together: SEG with PAG, and each with CFG where there are prompts.

    Example:
        >>> [setting.method for setting in family("unconditional")][:3]
        ['none', 'SEG', 'SEG']
    """
    plain = Setting(mode)
    blurred = replace(plain, sigma=sigma, layers="mid")
    found = [plain]
    found += [replace(blurred, seg=scale) for scale in (2.0, 3.0)]
    found += [replace(plain, pag=scale) for scale in (1.0, 2.0, 3.0)]
    found += [replace(plain, sag=scale) for scale in (0.5, 0.75, 1.5)]
    found.append(replace(blurred, seg=1.5, pag=1.5))
    if mode == "prompts":
        cfg = replace(plain, cfg=2.0)
        found += [cfg, replace(blurred, cfg=2.0, seg=1.0), replace(cfg, pag=1.0), replace(cfg, sag=0.75)]
        found.append(replace(blurred, cfg=2.0, seg=0.5, pag=0.5))
    return found


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
            chosen = range(first, min(first + batch, count))
            generators = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in chosen]
            pictures = pipe(
                [captions[index] for index in chosen],
                guidance_scale=setting.cfg,
                num_inference_steps=steps,
                generator=generators,
                output_type="pt",
            ).images
            yield (pictures.float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    finally:
        if guidance:
            guidance.remove()


def check_images(images: int) -> None:
    """Refuse more images per setting and seed than there are real drawings.

    Raises:
        ValueError: for too many.
    """
    if images > REFERENCE_COUNT:
        raise ValueError(f"there are {REFERENCE_COUNT} real drawings to compare with, fewer than {images} images")


class Study:
    """Runs settings and keeps what it measured in a file, so that a study that was cut off goes on.

    Args:
        pipe: a pipeline that draws these drawings, without progress bar.
        judge: the classifier.
        path: JSON-lines file of measurements; those in it are not made again.
        images: per setting and seed.
        steps: of the scheduler.
        batch: pictures at once.

    Raises:
        ValueError: for a file with measurements of another model, and for more images than there are real drawings.
    """

    def __init__(self, pipe: Any, judge: Judge, path: Path, images: int, steps: int, batch: int = 64) -> None:
        check_images(images)
        self.pipe, self.judge, self.path = pipe, judge, path
        self.images, self.steps, self.batch = images, steps, batch
        weights = fingerprint(pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, judge)
        self.kind = {"weights": weights, "dtype": str(pipe.unet.dtype).removeprefix("torch.")}
        self.cells = self._take_up()
        real = metrics.judged(judge, reference()).features
        self._unit = metrics.unit(real)
        self._real = real / self._unit
        self._unguided: dict[tuple[str, int], torch.Tensor] = {}

    def _take_up(self) -> list[dict[str, Any]]:
        """What an earlier run measured; a line that it was cut off in is taken away."""
        kept = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        whole = kept[: kept.rfind("\n") + 1]
        if not whole:
            whole = json.dumps(self.kind) + "\n"
        header, *cells = [json.loads(line) for line in whole.splitlines()]
        if header != self.kind:
            raise ValueError(
                f"{str(self.path)!r} holds measurements of {header}, not of {self.kind}; choose another --out"
            )
        if whole != kept:
            self.path.write_text(whole, encoding="utf-8")
        return cells

    def find(self, setting: Setting, seed: int) -> dict[str, Any] | None:
        """The measurement of a setting and seed with as many images and steps, if it was made."""
        key = {"setting": setting.to_dict(), "seed": seed, "images": self.images, "steps": self.steps}
        return next((cell for cell in self.cells if key.items() <= cell.items()), None)

    def measure(self, setting: Setting, seed: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """Sample, measure and write down one setting with one seed; ``advance`` hears of every batch."""
        kept = self.find(setting, seed)
        if kept is not None:
            advance(self.images)
            return kept
        began = time.perf_counter()
        parts = []
        for part in sample(self.pipe, setting, seed, self.images, self.steps, self.batch):
            parts.append(part)
            advance(len(part))
        pictures = torch.cat(parts)
        seconds = time.perf_counter() - began
        cell = {"setting": setting.to_dict(), "seed": seed, "images": self.images, "steps": self.steps}
        cell |= {"measures": self._measures(setting, seed, pictures), "seconds_per_image": seconds / self.images}
        self.cells.append(cell)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
        return cell

    def drawn(self, seed: int) -> dict[str, float]:
        """Measures of as many real drawings, of the seed's prompts: what a perfect model could reach."""
        width, height = PICTURE_SIZES[0]
        pictures = [
            draw(scene, width, height, random.Random(f"drawn/{seed}/{index}"))
            for index, scene in enumerate(prompts(seed, self.images))
        ]
        return self._judged("prompts", seed, torch.stack(pictures))

    def _judged(self, mode: str, seed: int, pictures: torch.Tensor) -> dict[str, float]:
        found = metrics.judged(self.judge, pictures)
        features = found.features / self._unit
        precision, recall = metrics.precision_recall(self._real[: len(pictures)], features)
        measures = {
            "frechet_distance": metrics.frechet_distance(self._real, features),
            "kernel_distance": metrics.kernel_distance(self._real, features),
            "precision": precision,
            "recall": recall,
            "confidence": float(found.confidence.mean()),
        }
        if mode == "prompts":
            scenes = prompts(seed, len(pictures))
            measures["caption_accuracy"], measures["captions_fulfilled"] = metrics.caption_accuracy(
                found.answers, scenes
            )
        return measures

    def _measures(self, setting: Setting, seed: int, pictures: torch.Tensor) -> dict[str, float]:
        measures = self._judged(setting.mode, seed, pictures)
        plain = Setting(setting.mode)
        if setting == plain:
            self._unguided[setting.mode, seed] = pictures
        elif (setting.mode, seed) not in self._unguided:
            again = sample(self.pipe, plain, seed, self.images, self.steps, self.batch)
            self._unguided[setting.mode, seed] = torch.cat(list(again))
        unguided = self._unguided[setting.mode, seed]
        return measures | {"distance_to_unguided": metrics.picture_distance(self.judge, unguided, pictures)}

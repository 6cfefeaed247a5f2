# SPDX-License-Identifier: Apache-2.0
"""Write the trained parts as the checkpoints of the package, in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from segkern.core.environment import environment
from studies.drawings.scenes import BACKGROUNDS
from studies.drawings.sheet import LICENSES, trained
from studies.evaluation.judge import Judge
from studies.training.denoiser import scheduler
from studies.training.loop import DEVICE
from studies.training.text import Texts
from studies.training.words import NAMES

CHECKPOINTS = Path(__file__).resolve().parents[2] / "segkern" / "checkpoints"


def pipeline(folder: Path, vae: AutoencoderKL, texts: Texts, unet: UNet2DConditionModel, tokenizers: Path) -> None:
    """Write a checkpoint that ``StableDiffusionXLPipeline.from_pretrained`` loads."""
    whole = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=texts.first,
        text_encoder_2=texts.second,
        tokenizer=texts.tokenizers[0],
        tokenizer_2=texts.tokenizers[1],
        unet=unet,
        scheduler=scheduler(),
        add_watermarker=False,
    )
    whole.to(dtype=torch.float16)
    whole.save_pretrained(folder)
    whole.to(dtype=torch.float32)
    for name in NAMES:  # the pipeline saves them in a format that older releases cannot read
        shutil.rmtree(folder / name)
        shutil.copytree(tokenizers / name, folder / name)


def names(folder: Path) -> None:
    """Write names.json, with the names and background colours in the captions, and the licences of the drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"drawings": trained(), "backgrounds": list(BACKGROUNDS)}
    shutil.copy(LICENSES, folder)
    (folder / "names.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def record(folder: Path, work: Path) -> None:
    """Write training.json: the duration and the losses of each part, and the machine and versions."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {}
    for log in sorted(work.glob("*.jsonl")):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if not lines:
            continue  # a rehearsal can be too short for an entry
        every = max(1, len(lines) // 20)
        losses = {line["step"]: round(line["loss"], 5) for line in [*lines[every - 1 :: every], lines[-1]]}
        parts[log.stem] = {"steps": lines[-1]["step"], "seconds": round(lines[-1]["seconds"]), "loss": losses}
    training = environment(DEVICE, "diffusers", "transformers") | {"parts": parts}
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")


def judge(folder: Path, trained: Judge) -> None:
    """Write the weights of the judge."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in trained.state_dict().items()}
    save_file(weights, folder / "model.safetensors")

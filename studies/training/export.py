# SPDX-License-Identifier: Apache-2.0
"""From trained parts to the checkpoints that the package carries, in half precision."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import save_file

from segkern.core.environment import environment
from studies.evaluation.judge import Judge
from studies.training.denoiser import scheduler
from studies.training.loop import DEVICE
from studies.training.text import TOKENIZERS, Texts

CHECKPOINTS = Path(__file__).resolve().parents[2] / "segkern" / "checkpoints"


def pipeline(folder: Path, vae: AutoencoderKL, texts: Texts, unet: UNet2DConditionModel) -> None:
    """Write a checkpoint that ``StableDiffusionXLPipeline.from_pretrained`` loads."""
    tokenizers = {path.name: {file.name: file.read_bytes() for file in path.iterdir()} for path in TOKENIZERS}
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
    for name, files in tokenizers.items():  # saved in a form that older releases cannot read
        shutil.rmtree(folder / name)
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content)


def record(folder: Path, work: Path) -> None:
    """Write training.json: how long each part took, on what, and its losses."""
    parts = {}
    for log in sorted(work.glob("*.jsonl")):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        if not lines:
            continue  # a rehearsal too short for a mean
        every = max(1, len(lines) // 20)
        losses = {line["step"]: round(line["loss"], 5) for line in [*lines[every - 1 :: every], lines[-1]]}
        parts[log.stem] = {"steps": lines[-1]["step"], "seconds": round(lines[-1]["seconds"]), "loss": losses}
    training = environment(DEVICE, "diffusers", "transformers") | {"parts": parts}
    (folder / "training.json").write_text(json.dumps(training, indent=1) + "\n", encoding="utf-8")


def judge(folder: Path, trained: Judge) -> None:
    """Write the classifier's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.half().contiguous() for name, weight in trained.state_dict().items()}
    save_file(weights, folder / "model.safetensors")

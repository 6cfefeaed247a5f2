# SPDX-License-Identifier: Apache-2.0
"""One training loop for everything here: schedule, moving average, losses written down, parts that are done kept."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from studies.training.optimisers import Optimisers

Trained = TypeVar("Trained", bound=torch.nn.Module)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_INTERVAL = 50  # steps over which the loss is averaged


def half_precision() -> torch.autocast:
    """bfloat16 where it is safe."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """Length and rates of a training.

    Attributes:
        steps: of the optimiser.
        rate: of learning at its highest, in a rise over ``warmup`` steps and a cosine to nothing.
        warmup: steps.
        average: decay of the moving average of the weights; None keeps the last weights.
        decay: of the weights, as in AdamW.
        seed: of the whole run.
        muon: rate of Muon at its highest, see ``Optimisers``.
    """

    steps: int
    rate: float
    warmup: int = 100
    average: float | None = None
    decay: float = 0.01
    seed: int = 0
    muon: float | None = None


def train(
    name: str, module: Trained, loss_of: Callable[[int, torch.Generator], torch.Tensor], plan: Plan, work: Path
) -> Trained:
    """Train ``module`` in place and return it, or its moving average, in evaluation mode.

    Trained weights are kept in ``work/name.pt`` and taken from there the next time; losses go to ``work/name.jsonl``.

    Args:
        name: of the part.
        module: to train.
        loss_of: the loss of a step, given its number and a CPU generator that depends on nothing but plan and step.
        plan: how long and how fast.
        work: folder for weights and losses.

    Raises:
        ValueError: when ``work`` holds a part of another plan under this name.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, log = work / f"{name}.pt", work / f"{name}.jsonl"
    averaged = copy.deepcopy(module).requires_grad_(False) if plan.average is not None else module
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        if state["plan"] != asdict(plan):
            raise ValueError(f"{path} belongs to {state['plan']}, not to {plan}; choose another folder with --work")
        averaged.load_state_dict(state["weights"])
        return averaged.eval()

    optimisers = Optimisers(module, plan.rate, plan.decay, plan.muon)
    began, losses, lines = time.perf_counter(), 0.0, []
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=plan.steps, loss="?")
        module.train()
        for step in range(plan.steps):
            rise = min(1.0, (step + 1) / plan.warmup)
            optimisers.zero_grad()
            loss = loss_of(step, torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimisers.step(rise * (0.5 + 0.5 * math.cos(math.pi * step / plan.steps)))
            if plan.average is not None:
                average = get_ema_multi_avg_fn(min(plan.average, (step + 1) / (step + 10)))
                average(list(averaged.parameters()), list(module.parameters()), step)
            losses += float(loss.detach())
            if (step + 1) % _INTERVAL == 0:
                mean, losses = losses / _INTERVAL, 0.0
                lines.append(json.dumps({"step": step + 1, "loss": mean, "seconds": time.perf_counter() - began}))
                progress.update(task, loss=f"{mean:.4f}")
            progress.update(task, completed=step + 1)
    log.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    torch.save({"plan": asdict(plan), "weights": averaged.state_dict()}, path)
    return averaged.eval()

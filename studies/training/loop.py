# SPDX-License-Identifier: Apache-2.0
"""One training loop for everything here: schedule, moving average, checkpoints to go on from, progress."""

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


def save(content: object, path: Path) -> None:
    """Save so that the file is either whole or not there."""
    unfinished = path.with_suffix(".new")
    torch.save(content, unfinished)
    unfinished.replace(path)


def half_precision() -> torch.autocast:
    """bfloat16 where it is safe."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train.

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
    name: str,
    module: Trained,
    loss_of: Callable[[int, torch.Generator], torch.Tensor],
    plan: Plan,
    work: Path,
    save_every: int = 250,
) -> Trained:
    """Train ``module`` in place and return it, or its moving average, in evaluation mode.

    Goes on from ``work/name.pt`` where a run was cut off. The losses are written to ``work/name.jsonl``.

    Args:
        name: of the run.
        module: what to train.
        loss_of: the loss of a step, given its number and a CPU generator that depends on nothing but plan and step.
        plan: how long and how fast.
        work: folder for checkpoints and losses.
        save_every: steps between checkpoints.

    Raises:
        ValueError: when ``work`` holds a run of another plan under this name.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, log = work / f"{name}.pt", work / f"{name}.jsonl"
    averaged = copy.deepcopy(module).requires_grad_(False) if plan.average is not None else module
    optimisers = Optimisers(module, plan.rate, plan.decay, plan.muon)
    first, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        if state["plan"] != asdict(plan):
            raise ValueError(f"{path} belongs to {state['plan']}, not to {plan}; choose another folder with --work")
        module.load_state_dict(state["module"])
        averaged.load_state_dict(state["averaged"])
        optimisers.load_state_dict(state["optimisers"])
        first, spent = state["step"], state["seconds"]
        log.write_text("".join(line for line in _lines(log) if json.loads(line)["step"] <= first), encoding="utf-8")
    else:
        log.unlink(missing_ok=True)

    began, recent, interval = time.perf_counter(), 0.0, 50
    columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(name, total=plan.steps, completed=first, loss="?")
        module.train()
        for step in range(first, plan.steps):
            rise = min(1.0, (step + 1) / plan.warmup)
            optimisers.zero_grad()
            loss = loss_of(step, torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimisers.step(rise * (0.5 + 0.5 * math.cos(math.pi * step / plan.steps)))
            if plan.average is not None:
                decay = min(plan.average, (step + 1) / (step + 10))
                average = get_ema_multi_avg_fn(decay)
                average(list(averaged.parameters()), list(module.parameters()), step)
            recent += float(loss.detach())
            if (step + 1) % interval == 0:
                seconds = spent + time.perf_counter() - began
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step + 1, "loss": recent / interval, "seconds": seconds}) + "\n")
                progress.update(task, loss=f"{recent / interval:.4f}")
                recent = 0.0
            progress.update(task, completed=step + 1)
            if (step + 1) % save_every == 0 or step + 1 == plan.steps:
                state = {
                    "plan": asdict(plan),
                    "module": module.state_dict(),
                    "averaged": averaged.state_dict(),
                    "optimisers": optimisers.state_dict(),
                    "step": step + 1,
                    "seconds": spent + time.perf_counter() - began,
                }
                save(state, path)
    return averaged.eval()


def _lines(log: Path) -> list[str]:
    """The lines of a log that were written in full."""
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines(keepends=True)

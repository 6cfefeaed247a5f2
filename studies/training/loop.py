# SPDX-License-Identifier: Apache-2.0
"""The training loop of all parts: schedule, moving average, a log of losses, and checkpoints to resume from."""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from studies.training.optimisers import Optimisers

Trained = TypeVar("Trained", bound=torch.nn.Module)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOG_INTERVAL = 50  # steps over which the loss is averaged
SAVE_INTERVAL = 250  # steps between checkpoints


def half_precision() -> torch.autocast:
    """Return a context in which operations that tolerate it run in bfloat16."""
    return torch.autocast(DEVICE.type, torch.bfloat16)


@dataclass(frozen=True)
class Plan:
    """Length and learning rates of the training of one part.

    Attributes:
        steps: Number of optimizer steps.
        rate: Highest learning rate of AdamW.
        warmup: Number of steps over which the learning rates rise to their highest values.
        constant: Share of the steps after which the learning rates start to fall linearly. The default is a cosine
            decay over all steps.
        average: Decay of the moving average of the weights; None keeps the last weights.
        decay: Weight decay.
        seed: Seed of the initial weights and of all batches.
        muon: Highest learning rate of Muon, see ``Optimisers``.
    """

    steps: int
    rate: float
    warmup: int = 100
    constant: float | None = None
    average: float | None = None
    decay: float = 0.01
    seed: int = 0
    muon: float | None = None

    def share(self, step: int) -> float:
        """Return the share of the highest learning rates that a step uses."""
        rise, done = min(1.0, (step + 1) / self.warmup), step / self.steps
        if self.constant is None:
            return rise * (0.5 + 0.5 * math.cos(math.pi * done))
        return rise * min(1.0, (1 - done) / (1 - self.constant))


def train(
    name: str, module: Trained, loss_of: Callable[[int, torch.Generator], torch.Tensor], plan: Plan, work: Path
) -> Trained:
    """Train ``module`` in place and return it, or its moving average, in evaluation mode.

    ``work/name.pt`` stores the trained weights; if it exists, the weights are loaded and nothing is trained.
    ``work/name.partial.pt`` stores an interrupted training, which resumes with the same batches. Losses go to
    ``work/name.jsonl``.

    Args:
        name: Name of the part.
        module: Module to train.
        loss_of: Function that returns the loss of a step, given the index of the step and a CPU generator that
            depends only on the plan and the step.
        plan: Length and learning rates.
        work: Folder of the weights and losses.

    Raises:
        ValueError: If ``work`` contains a part of this name that was trained with another plan.
    """
    work.mkdir(parents=True, exist_ok=True)
    path, partial = work / f"{name}.pt", work / f"{name}.partial.pt"
    averaged = copy.deepcopy(module).requires_grad_(False) if plan.average is not None else module
    if path.exists():
        averaged.load_state_dict(_read(path, plan)["weights"])
        return averaged.eval()

    optimisers = Optimisers(module, plan.rate, plan.decay, plan.muon)
    first, before, lines, losses = 0, 0.0, [], 0.0
    if partial.exists():
        state = _read(partial, plan)
        module.load_state_dict(state["module"])
        averaged.load_state_dict(state["weights"])
        optimisers.load_state_dict(state["optimisers"])
        first, before, lines, losses = (state[key] for key in ("step", "seconds", "lines", "losses"))
    began = time.perf_counter()
    progress = _Progress(name, plan.steps, first)
    with progress:
        module.train()
        for step in range(first, plan.steps):
            optimisers.zero_grad()
            loss = loss_of(step, torch.Generator().manual_seed(plan.seed * 1_000_003 + step))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimisers.step(plan.share(step))
            if plan.average is not None:
                average = get_ema_multi_avg_fn(min(plan.average, (step + 1) / (step + 10)))
                average(list(averaged.parameters()), list(module.parameters()), step)
            losses += float(loss.detach())
            done, seconds = step + 1, before + time.perf_counter() - began
            progress.advance(done)
            if done % LOG_INTERVAL == 0:
                lines.append({"step": done, "loss": losses / LOG_INTERVAL, "seconds": seconds})
                progress.report(lines[-1])
                losses = 0.0
            if done % SAVE_INTERVAL == 0 and done < plan.steps:
                state = {"plan": asdict(plan), "module": module.state_dict(), "weights": averaged.state_dict()}
                state |= {"optimisers": optimisers.state_dict(), "step": done, "seconds": seconds}
                _write(partial, state | {"lines": lines, "losses": losses})
    text = "".join(f"{json.dumps(line)}\n" for line in lines)
    (work / f"{name}.jsonl").write_text(text, encoding="utf-8")
    _write(path, {"plan": asdict(plan), "weights": averaged.state_dict()})
    partial.unlink(missing_ok=True)
    return averaged.eval()


class _Progress:
    """A progress bar on a terminal, and a line of text every ``LOG_INTERVAL`` steps elsewhere."""

    def __init__(self, name: str, steps: int, first: int) -> None:
        self._name, self._steps, self._last = name, steps, time.perf_counter()
        self._terminal = Console().is_terminal
        columns = TextColumn(name), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}")
        self._bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not self._terminal)
        self._task = self._bar.add_task(name, total=steps, completed=first, loss="?")
        if first and not self._terminal:
            print(f"{name}: resuming after step {first}", flush=True)

    def __enter__(self) -> None:
        self._bar.start()

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, done: int) -> None:
        self._bar.update(self._task, completed=done)

    def report(self, line: dict[str, Any]) -> None:
        self._bar.update(self._task, loss=f"{line['loss']:.4f}")
        now = time.perf_counter()
        each, self._last = (now - self._last) / LOG_INTERVAL, now
        if not self._terminal:
            text = f"{self._name}: step {line['step']} of {self._steps}, loss {line['loss']:.4f}, {each:.2f} s per step"
            print(text, flush=True)


def _read(path: Path, plan: Plan) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, map_location=DEVICE, weights_only=True)
    if state["plan"] != asdict(plan):
        raise ValueError(f"{path} was trained with {state['plan']}, not with {plan}; choose another folder with --work")
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    """Write a file that is complete even if the process is stopped."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)

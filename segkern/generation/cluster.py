# SPDX-License-Identifier: Apache-2.0
"""Generation of many images on a Ray cluster.

Each GPU has one worker; without GPUs, each node has one worker that uses all of its CPUs. The process of the command
reads the prompts, gives each idle worker a block of lines, and receives an event for each image. Workers write the
images themselves.

Ray Data is not used, because its actor pools retry a block without end if an image ends its worker process (or, with a
limit, end the whole run), and its read tasks would need the prompt file on every node. Here, the block of a lost worker
moves to another node. If that worker is lost too, the images of the block are generated one by one, which needs less
memory and shows which image is the cause. An image with which several workers were lost fails.
"""

from __future__ import annotations

import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from segkern.generation.cluster_worker import Worker, WorkerPlan
from segkern.generation.image_events import Event
from segkern.generation.image_folder import OtherSettingsError
from segkern.generation.prompt_files import Row
from segkern.version import __version__

_NODE_SECONDS = 5.0  # between looks at the nodes of the cluster
_WAIT_SECONDS = 1.0
_PATIENCE_SECONDS = 600.0  # to wait for a node after all nodes were lost
_NODE_LOSSES = 10  # losses of workers, without an image in between, after which a node is not used any more
_LOAD_LOSSES = 3  # the same if the last worker was lost before it had a block
_BATCH_LOSSES = 2  # losses of workers after which the images of a block are generated one by one
_IMAGE_LOSSES = 2  # losses of workers after which an image fails
_BLOCK_LOSSES = 5  # losses of workers between images after which a block fails
_LOCAL_STORE = 100 * 2**20  # bytes of shared memory; only lines and events use it


class ClusterError(RuntimeError):
    """The cluster cannot generate any further images."""


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster. If the address is empty, use that of ``RAY_ADDRESS``, or start a cluster on this machine.

    Raises:
        ValueError: If there is no cluster at the address.
    """
    import ray

    address = address or os.environ.get("RAY_ADDRESS", "local")
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray {address} is an address for Ray Client; run the command on a node, or use ray job submit"
        )
    options: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        options = {"include_dashboard": False, "object_store_memory": _LOCAL_STORE}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # if a node does not start in time, ray raises an Exception of no other class
        raise ValueError(f"cannot connect to the Ray cluster at {address!r}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()


def uses_gpus(device: str) -> bool:
    """Return True if the workers use GPUs.

    Raises:
        ValueError: If the cluster does not have the device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"--device must be auto, cpu or cuda with --ray, got {device!r}")
    has_gpus = any(_workers_of(node, on_gpu=True) for node in _nodes())
    if device == "cuda" and not has_gpus:
        raise ValueError("--device cuda: the Ray cluster has no GPUs")
    return has_gpus and device != "cpu"


def count_workers(on_gpu: bool) -> int:
    """Return the number of workers that the cluster has room for.

    Raises:
        ValueError: If there is no room.
    """
    workers = sum(_workers_of(node, on_gpu) for node in _nodes())
    if not workers:
        raise ValueError("the nodes of the Ray cluster have no CPUs; start a node with ray start --num-cpus N")
    return workers


@dataclass(eq=False)
class Block:
    """Consecutive lines that one worker generates.

    Attributes:
        number: Number of the block, counted from 0.
        rows: The lines.
        events: Events of finished images by name.
        skip: Images that ended several workers, with the reason.
        nodes: Nodes that lost a worker with this block.
        losses: Losses of workers by the name of the image; those between images have an empty name.
        begun: Image that the worker generates, if images are generated one by one.
    """

    number: int
    rows: Sequence[Row]
    events: dict[str, Event] = field(default_factory=dict)
    skip: dict[str, str] = field(default_factory=dict)
    nodes: set[str] = field(default_factory=set)
    losses: Counter[str] = field(default_factory=Counter)
    begun: str = ""


def read_blocks(rows: Iterator[Row], lines: int) -> Iterator[Block]:
    """Yield blocks of lines. Lines are read as needed."""
    for number in count():
        part = list(islice(rows, lines))
        if not part:
            return
        yield Block(number, part)


@dataclass(eq=False)
class _Handle:
    """A worker as the process of the command sees it."""

    actor: Any
    node: str
    waiting: Any  # its next result; None if the worker is idle
    block: Block | None = None


class WorkerPool:
    """The workers of a cluster.

    Args:
        plan: What workers need.
        blocks: Blocks to generate.
        warn: Function that prints a warning.
    """

    def __init__(self, plan: WorkerPlan, blocks: Iterator[Block], warn: Callable[[str], None]) -> None:
        self._plan = plan
        self._blocks: Iterator[Block] | None = blocks  # None after the last block
        self._warn = warn
        self._again: deque[Block] = deque()  # blocks of lost workers
        self._workers: list[_Handle] = []
        self._losses: Counter[str] = Counter()  # by node, since its last image
        self._unused: dict[str, str] = {}  # nodes that are not used any more, with the reason
        self._looked = -_NODE_SECONDS
        self._alone_since: float | None = None

    def run(self) -> Iterator[Event | Block]:
        """Yield an event for each image that is finished, and each block when its images are finished.

        Raises:
            ClusterError: If there is no node left.
            OtherSettingsError: If an image with other settings exists.
            OSError: If files cannot be written.
        """
        import ray

        try:
            while self._is_busy():
                self._start_workers()
                self._assign()
                waiting = [worker.waiting for worker in self._workers if worker.waiting is not None]
                if not waiting:
                    time.sleep(_WAIT_SECONDS if self._is_busy() else 0.0)
                    continue
                for ready in ray.wait(waiting, timeout=_WAIT_SECONDS)[0]:
                    yield from self._receive(next(worker for worker in self._workers if worker.waiting == ready))
        finally:
            for worker in self._workers:
                ray.kill(worker.actor)

    def _is_busy(self) -> bool:
        return self._blocks is not None or bool(self._again) or any(worker.block for worker in self._workers)

    def _start_workers(self) -> None:
        """Start workers on nodes with room. Nodes can join and leave at any time."""
        now = time.monotonic()
        if now - self._looked < _NODE_SECONDS:
            return
        self._looked = now
        running = Counter(worker.node for worker in self._workers)
        for node in _nodes():
            name = node["NodeID"]
            if name not in self._unused:
                for _ in range(_workers_of(node, self._plan.on_gpu) - running[name]):
                    self._start_worker(node)
        if self._workers:
            self._alone_since = None
            return
        if self._unused:
            raise ClusterError(f"no node can be used: {next(reversed(self._unused.values()))}")
        self._alone_since = now if self._alone_since is None else self._alone_since
        if now - self._alone_since > _PATIENCE_SECONDS:
            raise ClusterError("all nodes of the Ray cluster were lost")

    def _start_worker(self, node: dict[str, Any]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        resources = {"num_gpus": 1, "num_cpus": 0} if self._plan.on_gpu else {"num_cpus": node["Resources"]["CPU"]}
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        actor = ray.remote(Worker).options(scheduling_strategy=place, max_restarts=0, **resources).remote(self._plan)
        self._workers.append(_Handle(actor, node["NodeID"], actor.load.remote()))

    def _assign(self) -> None:
        """Give a block to each idle worker."""
        for worker in self._workers:
            if worker.waiting is None and (block := self._next_block(worker.node)) is not None:
                worker.block = block
                worker.waiting = worker.actor.generate.options(num_returns="streaming").remote(
                    block.number, block.rows, block.skip, block.losses.total() >= _BATCH_LOSSES
                )

    def _next_block(self, node: str) -> Block | None:
        nodes = {worker.node for worker in self._workers}
        for block in self._again:
            if node not in block.nodes or nodes <= block.nodes:
                self._again.remove(block)
                return block
        following = next(self._blocks, None) if self._blocks is not None else None
        if following is None:
            self._blocks = None
        return following

    def _receive(self, worker: _Handle) -> Iterator[Event | Block]:
        """Handle the next result of a worker."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        block = worker.block
        try:
            if block is None:
                self._check_version(worker, ray.get(worker.waiting))
                return
            event: Event = ray.get(next(worker.waiting))
        except StopIteration:
            assert block is not None
            worker.block = worker.waiting = None
            self._losses[worker.node] = 0
            yield block
        except RayTaskError as error:
            cause = error.cause
            if block is None and isinstance(cause, (ImportError, OSError, ValueError)):
                self._stop_using(worker.node, str(cause))
            if block is not None and isinstance(cause, (OSError, OtherSettingsError)):
                raise cause from None
            yield from self._lose(worker, f"{type(cause).__name__}: {cause}")
        except RayError as error:  # the process or the node of the worker ended
            yield from self._lose(worker, str(error))
        else:
            block.begun = event.name if event.kind == "begun" else ""
            if event.kind == "written":
                self._losses[worker.node] = 0
            if event.kind != "begun" and event.name not in block.events:
                block.events[event.name] = event
                yield event

    def _check_version(self, worker: _Handle, version: str) -> None:
        worker.waiting = None
        if version != __version__:
            self._stop_using(worker.node, f"it has segkern {version}, and this node has {__version__}")
            self._end(worker)

    def _lose(self, worker: _Handle, reason: str) -> Iterator[Event | Block]:
        """End a worker that failed. Another worker continues its block."""
        self._end(worker)
        reason = " ".join(reason.split())
        block = worker.block
        self._losses[worker.node] += 1
        if self._losses[worker.node] >= (_LOAD_LOSSES if block is None else _NODE_LOSSES):
            self._stop_using(worker.node, f"{self._losses[worker.node]} workers were lost ({reason})")
        if block is None:
            return
        block.nodes.add(worker.node)
        block.losses[block.begun] += 1
        losses, is_image = block.losses[block.begun], block.begun != ""
        if is_image and losses == _IMAGE_LOSSES:
            block.skip[block.begun] = f"{losses} workers were lost with this image ({reason})"
        block.begun = ""
        if self._plan.sharded:
            block.events.clear()  # the shard was not written
        if is_image or losses < _BLOCK_LOSSES:
            self._again.append(block)
            return
        first, last = block.rows[0].number, block.rows[-1].number
        images = len(block.rows) * self._plan.settings.images - len(block.events)
        text = f"{losses} workers were lost with these lines ({reason})"
        name = f"lines {first} to {last}"
        block.events[name] = Event("failed", name, images, text, {"first_line": first, "last_line": last})
        yield block.events[name]
        yield block

    def _end(self, worker: _Handle) -> None:
        import ray

        self._workers.remove(worker)
        ray.kill(worker.actor)

    def _stop_using(self, node: str, reason: str) -> None:
        if node not in self._unused:
            address = next((item["NodeName"] for item in _nodes() if item["NodeID"] == node), node)
            self._warn(f"node {address} is not used any more: {reason}")
            self._unused[node] = reason


def _nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def _workers_of(node: dict[str, Any], on_gpu: bool) -> int:
    """Return the number of workers for a node."""
    resources = node["Resources"]
    return int(resources.get("GPU", 0)) if on_gpu else int(resources.get("CPU", 0) >= 1)

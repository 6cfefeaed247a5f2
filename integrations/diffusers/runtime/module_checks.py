# SPDX-License-Identifier: Apache-2.0
"""Checks of a denoiser's modules: caches, replaced forwards, and processors and blocks of other packages.

Guidance appends samples to the batch in some denoiser calls, starting at some block. A cache returns results of another
batch, and code that depends on a sample's position in the batch mistakes an appended sample for another sample. Neither
can be detected from the outside, so unknown code is refused unless the user declares that it processes samples
independently.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import diffusers.models.attention_processor as diffusers_processors
from diffusers.hooks import group_offloading, layerwise_casting
from torch import nn

from segkern.integrations.diffusers.models.layers import UNETS, execution_order
from segkern.integrations.diffusers.runtime.branches import MODULE_ARGUMENTS, Forward
from segkern.integrations.diffusers.runtime.denoisers import Denoiser
from segkern.integrations.diffusers.runtime.foreign_hooks import HookWatch, foreign_hooks
from segkern.integrations.diffusers.runtime.origins import (
    Trust,
    foreign_link,
    foreign_part,
    is_known,
    is_trusted,
    name_of,
)
from segkern.integrations.diffusers.runtime.per_sample import samples_on
from segkern.integrations.diffusers.runtime.processor import unwrap
from segkern.integrations.diffusers.runtime.signatures import check_signature

# Hooks of diffusers' registry that move or cast weights and do not change results.
_HARMLESS = tuple(
    getattr(package, name)
    for package, names in (
        (
            group_offloading,
            ("GroupOffloadingHook", "LazyPrefetchGroupOffloadingHook", "LayerExecutionTrackerHook"),
        ),
        (layerwise_casting, ("LayerwiseCastingHook", "PeftInputAutocastDisableHook")),
    )
    for name in names
    if hasattr(package, name)
)

# Processors of diffusers that split the batch.
_BY_PLACE = tuple(
    getattr(diffusers_processors, name)
    for name in dir(diffusers_processors)
    if name.startswith("PAG") and isinstance(getattr(diffusers_processors, name), type)
)
# Processors in these modules depend on sample positions, except those that split a batch.
_PIPELINES = "diffusers.pipelines."

# Arguments of blocks that have one entry per sample.
_OF_BLOCKS = MODULE_ARGUMENTS | {"x"}

# The blocks of a UNet and the modules after them.
_UNET_END = ("down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_act", "conv_out")


class ModuleChecks:
    """The checks of one guided denoiser: once per run for all its modules, and again for modules that have changed.

    Args:
        denoiser: The denoiser.
        first: For every spec, the place at which its branch joins.
        share: Whether branches may join inside the denoiser.
        trust: Classes and functions that the user declares to process samples independently.
        remedy: Code with which a user declares this, with ``{}`` in place of the class or function.

    Attributes:
        watches: Watches of users' hooks, to register for guided calls.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        first: Sequence[int],
        share: bool,
        trust: Trust,
        remedy: str = "guide(..., trust=[{}])",
    ) -> None:
        self._denoiser = denoiser
        self._model = denoiser.model
        self._trust = trust
        self._remedy = remedy
        self._place = min(first, default=-1) if share else -1
        self._checked = self._place  # the lowest place from which modules have been checked
        self.watches: list[HookWatch] = []
        self._run: Any = None
        self._watched: list[tuple[nn.Module, Any, Any]] = []  # modules with the forwards and processors set on them

    def before(self, run: Any, forward: Forward | None, batch: int) -> None:
        """Check the denoiser before a call. All modules are checked in a new run and after a module was changed.

        Args:
            run: A value that differs between runs.
            forward: The plan of the call; None if it is not guided.
            batch: Number of samples that the pipeline passes.

        Raises:
            ValueError: If guidance does not support a module. The message names it.
        """
        place = self._place if forward is None or (forward.share and not forward.sag) else -1
        if run != self._run or place < self._checked or self._changed():
            frames = 1 if forward is None else forward.frames
            # A tensor for one sample also fits the branches of one sample.
            self.check(place, frozenset({batch, batch * frames} - {1}))
            self._run = run

    def check(self, place: int | None = None, sizes: frozenset[int] = frozenset()) -> None:
        """Check every module.

        Args:
            place: Place where the first branch joins; -1 if it joins before all places; None for the place that the
                specs need.
            sizes: Batch sizes of the denoiser and its blocks, if a run has begun.

        Raises:
            ValueError: If guidance does not support a module. The message names it.
        """
        self._watched = []
        self._checked = self._place if place is None else place
        modules = list(_walk(self._model, frozenset(self._outside(self._checked))))
        asked = self._asked(name for name, module, _ in modules if _processor_of(module) is not None)
        watched, self.watches = [], []
        for name, module, inside in modules:
            check_registry(self._model, name, module)
            forward, processor = vars(module).get("forward"), _processor_of(module)
            if inside and forward is not None:
                self._check_forward(name, module, forward)
            if inside and name in asked:
                self._check_class(name, module)
            if inside and processor is not None:
                self._check_processor(name, processor)
            if inside and sizes:
                self._check_tensors(name, module, sizes)
            if name in asked:
                watched.append((module, forward, processor))
                if name and inside:
                    self._watch_hooks(name, module)
        self._watched = watched

    def _changed(self) -> bool:
        """Return True if a forward or a processor changed since the last check. Only few modules are checked."""
        return any(
            vars(module).get("forward") is not forward or _processor_of(module) is not processor
            for module, forward, processor in self._watched
        )

    def _asked(self, attentions: Iterable[str]) -> set[str]:
        """Return the names of blocks, resnets and attention modules, and of all modules around them."""
        asked = {""}
        for name in (*self._denoiser.places.names, *attentions):
            while name and name not in asked:
                asked.add(name)
                name = name.rpartition(".")[0]
        return asked

    def _outside(self, place: int) -> Iterator[str]:
        """Yield the names of modules that run on the pipeline's own batch if the first branch joins at a place."""
        if place < 0:
            return
        names = self._denoiser.places.names
        yield from names[:place]
        if not isinstance(self._model, UNETS):
            return
        later = names[place:]
        yield from (
            name
            for name, _ in execution_order(self._model)
            if not any(f"{other}.".startswith(f"{name}.") for other in later)
        )
        yield from (name for name, _ in self._model.named_children() if name not in _UNET_END)

    def _check_forward(self, name: str, module: nn.Module, forward: Any) -> None:
        """Check a forward that is set on an instance and hides that of its class."""
        if isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):  # adapters may replace these
            return
        for link in (forward, vars(module).get("_old_forward")):  # accelerate's hook wraps the second
            foreign = foreign_link(link)
            if foreign is not None and not is_trusted(foreign, self._trust) and not is_trusted(link, self._trust):
                raise ValueError(
                    f"guide does not support {self._at(name)}, whose forward was replaced by {name_of(foreign)}: it "
                    f"may return results of another call or another position in the batch, as a cache (DeepCache) "
                    f"does, but guidance appends samples to the batch. Remove it first. If it processes each sample "
                    f"independently and keeps no state between calls, declare it: "
                    f"{self._remedy.format(self._path(name) + '.forward')}"
                )

    def _check_class(self, name: str, module: nn.Module) -> None:
        """Check the class of a block or an attention module. For the denoiser itself, check only the forward."""
        kind = type(module)
        foreign = foreign_part(kind) if name else foreign_link(kind.forward)
        if foreign is None:
            return
        if name in ("", *self._denoiser.places.names):
            check_signature(module, _OF_BLOCKS if name else self._denoiser.arguments.batched, self._at(name))
        if is_trusted(module, self._trust) or is_trusted(foreign, self._trust):
            return
        replaced = is_known(kind.__module__)
        what = "has a forward replaced by" if replaced else "is a"
        unknown = name_of(foreign if replaced else kind)
        raise ValueError(f"{self._at(name)} {what} {unknown}{self._why(unknown)}")

    def _watch_hooks(self, name: str, module: nn.Module) -> None:
        foreign = foreign_hooks(module, self._trust)
        if foreign:
            unknown = ", ".join(dict.fromkeys(map(name_of, foreign)))
            what = f"{self._at(name)} has a forward hook that changes its inputs or outputs, {unknown}"
            self.watches.append(HookWatch(module, what + self._why(name_of(foreign[0]))))

    def _check_processor(self, name: str, processor: Any) -> None:
        if is_trusted(processor, self._trust):
            return
        named = processor if hasattr(processor, "__qualname__") else type(processor)
        if isinstance(processor, _BY_PLACE):
            raise ValueError(
                f"{self._at(name)} has a {name_of(named)} as its processor, which splits the batch by sample position, "
                f"but guidance appends samples to the batch; set the model's own processor"
            )
        foreign = foreign_part(named) if isinstance(named, type) else foreign_link(processor)
        if foreign is not None or str(named.__module__).startswith(_PIPELINES):
            unknown = name_of(named)
            raise ValueError(f"{self._at(name)} has a {unknown} as its processor{self._why(unknown)}")

    def _check_tensors(self, name: str, module: nn.Module, sizes: frozenset[int]) -> None:
        attribute = samples_on(module, sizes)
        if attribute is not None and not is_trusted(module, self._trust):
            kind = type(module).__qualname__
            raise ValueError(
                f"{self._at(name)}, a {name_of(type(module))}, has a tensor {attribute!r} with as many entries as the "
                f"batch has samples, {max(sizes)}, but guidance appends samples to the batch. If its entries do not "
                f"belong to samples, register it as a buffer or declare it: {self._remedy.format(kind)}; otherwise "
                f"remove it first"
            )

    def _why(self, unknown: str) -> str:
        return (
            f", which segkern does not know. Guidance appends samples to the batch, so this code must process each "
            f"sample independently of its position in the batch. If it does, declare it: "
            f"{self._remedy.format(unknown.rpartition('.')[2])}; otherwise remove it first"
        )

    def _path(self, name: str) -> str:
        """Return the Python path of a module, starting at the pipeline."""
        parts = ["pipe", self._denoiser.name, *name.split(".")]
        return "".join(f"[{part}]" if part.isdecimal() else f".{part}" for part in parts if part).lstrip(".")

    def _at(self, name: str) -> str:
        model = type(self._model).__name__
        return f"{name} of this {model}" if name else f"this {model}"


def check_registry(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise a ValueError for hooks in diffusers' registry that may change a module's output."""
    hooks = getattr(vars(module).get("_diffusers_hook"), "hooks", None)
    if not hooks:
        return
    for hook_name, hook in hooks.items():
        if type(hook) in _HARMLESS:
            continue
        what = "a cache" if getattr(hook, "_is_stateful", False) or "cache" in type(hook).__module__ else "a hook"
        at = f"{name} of this {type(model).__name__}" if name else f"this {type(model).__name__}"
        raise ValueError(
            f"guide does not support a {type(model).__name__} with {what}: {at} has {hook_name!r}, a "
            f"{name_of(type(hook))}. A cache returns results of earlier calls with another batch, and a hook that "
            f"skips or changes a module also affects appended samples. Remove it: call disable_cache() if enable_cache "
            f"was called, otherwise diffusers.hooks.HookRegistry.check_if_exists_or_initialize(model)"
            f".remove_hook({hook_name!r}, recurse=True), for each hook; see SEG(reuse=...)"
        )


def _processor_of(module: nn.Module) -> Any:
    """Return the original processor of an attention module; None for other modules."""
    processor = vars(module).get("processor")
    if processor is None and hasattr(type(module), "set_processor"):  # it may be a module itself
        processor = getattr(module, "processor", None)
    return None if processor is None else unwrap(processor)


def _walk(model: nn.Module, outside: frozenset[str]) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield every module once, with its name and whether it runs with branches."""
    seen = set()
    stack = [("", model, True)]
    while stack:
        name, module, inside = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        inside = inside and name not in outside
        yield name, module, inside
        prefix = f"{name}." if name else ""
        stack += [(prefix + child, part, inside) for child, part in module.named_children()]

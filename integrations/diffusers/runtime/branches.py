# SPDX-License-Identifier: Apache-2.0
"""The batch of a guided denoiser call: where branches join it, and how they are folded into the prediction.

The pipeline's own batch is ``[unconditional, conditional]`` under classifier-free guidance and ``[conditional]``
without it. Branches are appended to it. A perturbed branch equals the conditional branch until its first perturbed
layer, so it joins there. Everything before it runs on the pipeline's own batch. For tensors computed earlier (skip
connections, embeddings), the conditional samples are appended when a later module needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from segkern.integrations.diffusers.runtime.hooks import Hook, Outer, acts_here
from segkern.integrations.diffusers.runtime.signatures import parameter_names

# Arguments of a UNet and of its blocks that have one entry per sample. Others (cross_attention_kwargs, upsample_size)
# are passed on unchanged.
MODULE_ARGUMENTS = frozenset(
    {
        "hidden_states",
        "res_hidden_states_tuple",  # for up blocks that are a single place
        "input_tensor",
        "temb",
        "encoder_hidden_states",
        "attention_mask",
        "encoder_attention_mask",
        "additional_residuals",
    }
)
_SKIPS = "res_hidden_states_tuple"
DENOISER_ARGUMENTS = frozenset(
    {
        "sample",
        "timestep",
        "encoder_hidden_states",
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
    }
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Batch:
    """The pipeline's own batch in one denoiser call.

    Attributes:
        size: Number of samples.
        first: Number of unconditional samples: half the size under classifier-free guidance, otherwise 0.
        branches: Number of branches that have joined at the end of the call.
        conditional_first: Whether the conditional samples come before the unconditional ones.
    """

    size: int
    first: int
    branches: int = 0
    conditional_first: bool = False

    @property
    def samples(self) -> int:
        """Number of conditional samples, which is also the number of samples of a branch."""
        return self.size - self.first

    @property
    def conditional(self) -> slice:
        """The conditional samples."""
        return slice(0, self.samples) if self.conditional_first else slice(self.first, self.size)

    @property
    def unconditional(self) -> slice:
        """The unconditional samples; empty without classifier-free guidance."""
        return slice(self.samples, self.size) if self.conditional_first else slice(0, self.first)

    @property
    def reference(self) -> slice:
        """The unconditional samples under classifier-free guidance, otherwise the conditional samples."""
        return self.unconditional if self.first else self.conditional

    def times(self, count: int) -> Batch:
        """Return the batch with ``count`` consecutive entries per sample, such as frames."""
        return replace(self, size=count * self.size, first=count * self.first)

    def branch(self, index: int) -> slice:
        """Return the samples of the ``index``-th appended branch."""
        return slice(self.with_branches(index), self.with_branches(index + 1))

    def with_branches(self, count: int) -> int:
        """Return the number of samples after ``count`` branches have joined."""
        return self.size + count * self.samples

    def fit(self, value: Any, count: int) -> Any:
        """Return ``value`` with ``count`` branches in every batch-first tensor.

        Missing branches are appended, and extra branches are cut off. Tensors whose first dimension is not the batch,
        and objects other than tensors, lists, tuples and dictionaries, are returned unchanged.
        """
        return map_tensors(value, lambda x: self._fit_tensor(x, count))

    def grow(self, value: Any, count: int) -> Any:
        """Return ``value``, an argument of the denoiser, with ``count`` branches appended to every batch-first tensor.

        A tensor may have several consecutive rows per sample, for example for two images per sample.
        """

        def grown(x: torch.Tensor) -> torch.Tensor:
            rows, rest = divmod(x.shape[0], self.size) if x.ndim else (0, 1)
            return x if rest or not rows or not count else torch.cat([x, *[x[self.times(rows).conditional]] * count])

        return map_tensors(value, grown)

    def grow_list(self, value: Any, count: int) -> Any:
        """Append ``count`` branches to a list with one item per sample. Other lists are shared by all samples."""
        if not isinstance(value, list) or len(value) != self.size:
            return value
        return value + value[self.conditional] * count

    def _fit_tensor(self, x: torch.Tensor, count: int) -> torch.Tensor:
        if x.ndim == 0:
            return x
        for joined in range(max(count, self.branches) + 1):
            if x.shape[0] != self.with_branches(joined):
                continue
            if joined < count:
                return torch.cat([x, *[x[self.conditional]] * (count - joined)])
            return x if joined == count else x[: self.with_branches(count)]
        return x

    def take(self, value: Any, samples: slice) -> Any:
        """Return ``value`` with every tensor of the pipeline's own batch cut to some samples."""
        return map_tensors(value, lambda x: x[samples] if x.ndim and x.shape[0] == self.size else x)


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return ``value`` with ``change`` applied to every tensor in it, including lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: item if _is_of_all(key, item) else map_tensors(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([map_tensors(item, change) for item in value])
    return value


def _is_of_all(name: Any, value: Any) -> bool:
    """Return True for a named tensor that all samples share, whatever its size.

    PyTorch's attention also accepts masks ``[tokens, tokens]`` and ``[heads, tokens, tokens]``. Only masks of 4
    dimensions have one entry per sample, and masks ``[samples, keys]``, which diffusers' native backend accepts.
    """
    if name == "attention_mask" and isinstance(value, torch.Tensor):
        return value.ndim == 3 or (value.ndim == 2 and value.shape[0] == value.shape[1])
    return name == "ip_adapter_masks"


@dataclass(frozen=True)
class Forward:
    """The plan of one call of a guided denoiser.

    Attributes:
        batch: The pipeline's own batch.
        branches: Indices of the specs with a branch, in the order in which the branches join.
        first: For every spec, the place at which its branch joins.
        share: Whether branches join at these places instead of at the denoiser's input.
        strengths: Strengths of all active specs, by index.
        reused: Indices of the specs that reuse their last difference.
        sag: Indices of the SAG specs, each of which needs a second call.
        reference: Samples of the output that SAG degrades.
        pair: Number of the call if a call for the negative prompt may follow, otherwise None.
        rescaled: The guidance scale if the conditional prediction must not change, otherwise None.
        frames: Number of frames per sample in the blocks.
        changed: Index of a spec and number of a place, for each block that a spec skips or shuffles.
        step: Number of the step; 0 if no spec depends on it.
    """

    batch: Batch
    branches: tuple[int, ...]
    first: Sequence[int]
    share: bool
    strengths: dict[int, float]
    reused: tuple[int, ...] = ()
    sag: tuple[int, ...] = ()
    reference: slice = field(default_factory=lambda: slice(0, 0))
    pair: int | None = None
    rescaled: float | None = None
    frames: int = 1
    changed: tuple[tuple[int, int], ...] = ()
    step: int = 0

    @property
    def inside(self) -> Batch:
        """The pipeline's own batch in the layout of the blocks."""
        return self.batch.times(self.frames) if self.frames > 1 else self.batch

    def changes_at(self, place: int) -> list[int]:
        """Return the specs that change the block at a place, by index."""
        return [index for index, changed in self.changed if changed == place]

    def joined(self, place: int) -> int:
        """Return the number of branches that run through a place."""
        return sum(self.first[index] <= place for index in self.branches) if self.share else len(self.branches)


@dataclass(frozen=True)
class JoinPlan:
    """How one module runs in one call.

    Attributes:
        batch: Batch of the call.
        branches: Number of branches of the module. For the skip connections of an up block, one number per resnet.
        skipped: Numbers of the branches that bypass the module.
        shuffled: Numbers of the branches whose tokens are shuffled.
        orders: Order of the tokens of each shuffled branch.
        starts: First shuffled token of each sample of a branch.
    """

    batch: Batch
    branches: tuple[int, ...]
    skipped: tuple[int, ...] = ()
    shuffled: tuple[int, ...] = ()
    orders: tuple[torch.Tensor, ...] = field(default=(), compare=False, repr=False)
    starts: tuple[int, ...] = field(default=(), compare=False, repr=False)


class Join(Hook):
    """Forward pre-hook that adjusts a module's arguments to the number of branches with which the module runs.

    Args:
        module: The module.
        batched: Arguments of the module with one entry per sample.

    Attributes:
        module: The module.
        plan: Plan of the current call; None if no branch joins inside.
        outside: Whether the hook is excluded from compilation.
    """

    def __init__(self, module: nn.Module, batched: frozenset[str] = MODULE_ARGUMENTS) -> None:
        self.module = module
        self._names = parameter_names(module)
        self._batched = batched
        self.plan: JoinPlan | None = None
        self.outside = False

    def hooks(self) -> list[RemovableHandle]:
        """Register the hook on its module."""
        hook = Outer(self) if self.outside else self
        return [self.module.register_forward_pre_hook(hook, with_kwargs=True)]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        plan = self.plan if acts_here() else None
        if plan is None or module is not self.module:  # copies are not guided
            return None
        batch, (count,) = plan.batch, plan.branches
        return self._map(args, kwargs, lambda value: batch.fit(value, count))

    def _map(self, args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]) -> Arguments:
        """Return the module's arguments with ``change`` applied to those with one entry per sample."""
        return _map_arguments(self._names, self._batched, args, kwargs, change)


class JoinSkips(Join):
    """Forward pre-hook of an up block that adjusts each skip connection to the number of branches of its resnet."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        plan = self.plan if acts_here() else None
        if plan is None or module is not self.module:
            return None
        batch = plan.batch
        place = self._names.index(_SKIPS)
        skips = args[place] if place < len(args) else kwargs[_SKIPS]
        counts = reversed(plan.branches)  # the first resnet uses the last skip connection
        skips = tuple(batch.fit(skip, count) for skip, count in zip(skips, counts, strict=True))
        if place < len(args):
            return (*args[:place], skips, *args[place + 1 :]), kwargs
        return args, kwargs | {_SKIPS: skips}


class DenoiserArguments:
    """Reads and enlarges the arguments of a denoiser's forward, positional or by keyword.

    Args:
        denoiser: The model.
        batched: Names of arguments with one entry per sample, as tensors or collections of tensors.
        listed: Arguments in ``batched`` that are lists with one item per sample.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        batched: frozenset[str] = DENOISER_ARGUMENTS,
        listed: frozenset[str] = frozenset(),
    ) -> None:
        self._names = parameter_names(denoiser)
        self.batched = batched
        self._listed = listed

    def get(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument ``name``; None if it was not passed or the model has no such argument."""
        if name not in self._names:
            return kwargs.get(name)
        position = self._names.index(name)
        return args[position] if position < len(args) else kwargs.get(name)

    def grow_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch, count: int) -> Arguments:
        """Append ``count`` branches to every batch-first argument, so that every block runs with them."""
        args, kwargs = _map_arguments(self._names, self._listed, args, kwargs, lambda x: batch.grow_list(x, count))
        return _map_arguments(self._names, self.batched - self._listed, args, kwargs, lambda x: batch.grow(x, count))

    def grow(
        self, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch, count: int
    ) -> Arguments:
        """Fit some arguments to ``count`` branches, because they are added to tensors with that many branches."""
        return _map_arguments(self._names, names, args, kwargs, lambda value: batch.fit(value, count))

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch, samples: slice) -> Arguments:
        """Cut every batch-first argument to some samples of the pipeline's own batch."""
        return _map_arguments(self._names, self.batched, args, kwargs, lambda value: batch.take(value, samples))

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], **values: Any) -> Arguments:
        """Return the arguments with some values replaced."""
        changed = list(args)
        named = dict(kwargs)
        for name, value in values.items():
            position = self._names.index(name) if name in self._names else len(changed)
            if position < len(changed):
                changed[position] = value
            else:
                named[name] = value
        return tuple(changed), named


def difference(output: torch.Tensor, batch: Batch, branch: int) -> torch.Tensor:
    """Return ``c - p`` of a branch in at least float32.

    Args:
        output: The denoiser's output with branches.
        batch: The pipeline's own batch.
        branch: Index of the branch in the order of joining.
    """
    compute = torch.promote_types(output.dtype, torch.float32)
    return output[batch.conditional].to(compute) - output[batch.branch(branch)].to(compute)


def summed(guided: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    """Return ``sum_i s_i (c - p_i)`` from pairs of a scale and a :func:`difference`; None without pairs."""
    total: torch.Tensor | None = None
    for scale, moved in guided:
        total = scale * moved if total is None else total + scale * moved
    return total


def fold(
    output: torch.Tensor, batch: Batch, shift: torch.Tensor | None, rescaled_guidance_scale: float | None
) -> torch.Tensor:
    """Return the guided prediction for the pipeline's own batch.

    With the shift ``d``, the result is ``c + d`` without classifier-free guidance. With classifier-free guidance, the
    result is ``(u + d, c + d)``, so the pipeline's ``u + g (c - u)`` becomes ``u + g (c - u) + d``. With
    ``guidance_rescale``, the pipeline uses the norm of the conditional prediction, which must not change;
    ``(u - d / (g - 1), c)`` then results in the same sum.

    Args:
        output: The denoiser's output. Only the pipeline's own batch is used.
        batch: The pipeline's own batch.
        shift: Result of :func:`summed`, one entry per conditional sample.
        rescaled_guidance_scale: ``g`` with guidance_rescale, otherwise None.

    Returns:
        ``[batch.size, ...]`` in the dtype of ``output``. Sums are computed in at least float32.

    Source: SEG (arXiv 2408.00760); guidance_rescale: arXiv 2305.08891, section 3.4.
    """
    own = output[: batch.size]
    if shift is None:
        return own
    if batch.first == 0:
        return shifted(own, shift)
    conditional, unconditional = own[batch.conditional], own[batch.unconditional]
    if rescaled_guidance_scale is None:
        conditional, unconditional = shifted(conditional, shift), shifted(unconditional, shift)
    else:
        unconditional = shifted(unconditional, shift, rescaled_guidance_scale)
    return torch.cat([conditional, unconditional] if batch.conditional_first else [unconditional, conditional])


def shifted(
    prediction: torch.Tensor, shift: torch.Tensor, rescaled_guidance_scale: float | None = None
) -> torch.Tensor:
    """Return a prediction with the shift added, or, for an unconditional prediction, with its equivalent.

    Args:
        prediction: The prediction for some samples.
        shift: Result of :func:`summed` for the same samples.
        rescaled_guidance_scale: ``g`` if only the unconditional prediction may change, otherwise None.
    """
    by = shift if rescaled_guidance_scale is None else shift / (1.0 - rescaled_guidance_scale)
    return (prediction.to(by.dtype) + by).to(prediction.dtype)


def _map_arguments(
    names: tuple[str, ...],
    chosen: Collection[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    change: Callable[[Any], Any],
) -> Arguments:
    """Return the arguments with ``change`` applied to the chosen ones."""
    positional = tuple(
        change(value) if i < len(names) and names[i] in chosen else value for i, value in enumerate(args)
    )
    return positional, {name: change(value) if name in chosen else value for name, value in kwargs.items()}

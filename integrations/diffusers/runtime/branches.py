# SPDX-License-Identifier: Apache-2.0
"""The batch of a guided forward: where branches join it, and how they fold back into the prediction.

The pipeline's own batch is ``[unconditional, conditional]`` under classifier-free guidance and
``[conditional]`` without it. Branches are appended behind it. A perturbed branch equals the conditional one
until its first perturbed layer, so it joins only there: what comes before runs on the pipeline's own batch, and
whatever was computed before (skip connections, embeddings) is the conditional slice, appended when a later
module asks for it.
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

# Arguments of a UNet and of its blocks that hold one entry per sample. Others (cross_attention_kwargs, upsample_size)
# pass through untouched.
MODULE_ARGUMENTS = frozenset(
    {
        "hidden_states",
        "res_hidden_states_tuple",  # of up blocks that are joined as a whole
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
    """The pipeline's own batch of one forward.

    Attributes:
        size: samples in it.
        first: number of unconditional samples: half the size under classifier-free guidance, else 0.
        branches: how many will have joined at the end.
        conditional_first: whether the unconditional samples come after the conditional ones.
    """

    size: int
    first: int
    branches: int = 0
    conditional_first: bool = False

    @property
    def samples(self) -> int:
        """Number of conditional samples, which is that of a branch."""
        return self.size - self.first

    @property
    def conditional(self) -> slice:
        """The conditional samples."""
        return slice(0, self.samples) if self.conditional_first else slice(self.first, self.size)

    @property
    def unconditional(self) -> slice:
        """The unconditional samples; none without classifier-free guidance."""
        return slice(self.samples, self.size) if self.conditional_first else slice(0, self.first)

    @property
    def reference(self) -> slice:
        """The unconditional samples under classifier-free guidance, else the conditional ones."""
        return self.unconditional if self.first else self.conditional

    def times(self, count: int) -> Batch:
        """The same where every sample stands for so many, its frames, one after the other."""
        return replace(self, size=count * self.size, first=count * self.first)

    def branch(self, index: int) -> slice:
        """The samples of the ``index``-th appended branch."""
        return slice(self.with_branches(index), self.with_branches(index + 1))

    def with_branches(self, count: int) -> int:
        """Samples in the batch once ``count`` branches have joined."""
        return self.size + count * self.samples

    def fit(self, value: Any, count: int) -> Any:
        """``value`` with every batch-first tensor in it brought to ``count`` branches.

        A tensor that carries fewer gets the missing ones, one that carries more loses the last;
        tensors whose first dimension is no such batch, and anything that is not a tensor, list, tuple or
        dictionary, come back as they are.
        """
        return _map_tensors(value, lambda x: self._fit_tensor(x, count))

    def grow(self, value: Any, count: int) -> Any:
        """``value``, an argument of the denoiser, with ``count`` branches behind every batch-first tensor in it.

        A tensor may have several rows for each sample, one after the other (two pictures of a sample, for example).
        """

        def grown(x: torch.Tensor) -> torch.Tensor:
            rows, rest = divmod(x.shape[0], self.size) if x.ndim else (0, 1)
            return x if rest or not rows or not count else torch.cat([x, *[x[self.times(rows).conditional]] * count])

        return _map_tensors(value, grown)

    def grow_list(self, value: Any, count: int) -> Any:
        """A list with one item per sample and ``count`` branches; one of another length is for all samples alike."""
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
        """``value`` with every tensor of the pipeline's own batch in it cut to some samples."""
        return _map_tensors(value, lambda x: x[samples] if x.ndim and x.shape[0] == self.size else x)


def _map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """``value`` with every tensor changed that it is, or that is in its lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: item if _is_of_all(key, item) else _map_tensors(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([_map_tensors(item, change) for item in value])
    return value


def _is_of_all(name: Any, value: Any) -> bool:
    """True for a named tensor that is for all samples alike, whatever its size.

    PyTorch's attention takes masks ``[tokens, tokens]`` and ``[heads, tokens, tokens]``; one entry for each sample have
    only those of 4 dimensions, and those ``[samples, keys]`` that diffusers' native backend takes beside them.
    """
    if name == "attention_mask" and isinstance(value, torch.Tensor):
        return value.ndim == 3 or (value.ndim == 2 and value.shape[0] == value.shape[1])
    return name == "ip_adapter_masks"


@dataclass(frozen=True)
class Forward:
    """One forward of a guided denoiser.

    Attributes:
        batch: the pipeline's own.
        branches: guidances that have one in it, in the order in which they join.
        first: for every guidance the place at which its branch joins.
        share: whether they join there, not at the denoiser's input.
        strengths: of all guidances that act.
        reused: those whose last difference is taken.
        sag: those of SAG, which a forward of their own follows.
        reference: samples of the output that SAG degrades.
        pair: number of the call where one for the negative prompt may follow, else None.
        rescaled: the guidance scale where the conditional prediction must stay what it is, else None.
        frames: as how many each sample runs through the blocks.
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

    @property
    def inside(self) -> Batch:
        """The pipeline's own batch as the blocks have it."""
        return self.batch.times(self.frames) if self.frames > 1 else self.batch

    def joined(self, place: int) -> int:
        """The number of branches that run through a place."""
        return sum(self.first[index] <= place for index in self.branches) if self.share else len(self.branches)


@dataclass(frozen=True)
class JoinPlan:
    """The branches with which one module runs in one forward.

    Attributes:
        batch: of the forward.
        branches: how many the module runs with; for an up block's skip connections, how many each resnet runs with.
    """

    batch: Batch
    branches: tuple[int, ...]


class Join(Hook):
    """Forward pre-hook of a module: its arguments get the branches that it runs with, no more and no fewer.

    Attributes:
        module: the one it was made for.
        plan: of the forward under way; None while no branch joins inside.
        outside: whether it stays outside of what is compiled.
    """

    def __init__(self, module: nn.Module, batched: frozenset[str] = MODULE_ARGUMENTS) -> None:
        self.module = module
        self._names = parameter_names(module)
        self._batched = batched
        self.plan: JoinPlan | None = None
        self.outside = False

    def hook(self) -> RemovableHandle:
        """Register it on its module."""
        hook = Outer(self) if self.outside else self
        return self.module.register_forward_pre_hook(hook, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        plan = self.plan if acts_here() else None
        if plan is None or module is not self.module:  # a copy of the module is not guided
            return None
        batch, (count,) = plan.batch, plan.branches
        return _map_arguments(self._names, self._batched, args, kwargs, lambda value: batch.fit(value, count))


class JoinSkips(Join):
    """Forward pre-hook of an up block: each skip connection gets the branches that its resnet runs with."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        plan = self.plan if acts_here() else None
        if plan is None or module is not self.module:
            return None
        batch = plan.batch
        place = self._names.index(_SKIPS)
        skips = args[place] if place < len(args) else kwargs[_SKIPS]
        counts = reversed(plan.branches)  # the first resnet takes the last skip connection
        skips = tuple(batch.fit(skip, count) for skip, count in zip(skips, counts, strict=True))
        if place < len(args):
            return (*args[:place], skips, *args[place + 1 :]), kwargs
        return args, kwargs | {_SKIPS: skips}


class DenoiserArguments:
    """Reads and enlarges the arguments of a denoiser's forward, however they were passed.

    Args:
        denoiser: the model.
        batched: names of those that hold one entry per sample, as tensors or collections of tensors.
        listed: of them those that are a list with one item per sample.
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
        """The argument called ``name``; None when it was not passed, or a version of the model does not know it."""
        if name not in self._names:
            return kwargs.get(name)
        position = self._names.index(name)
        return args[position] if position < len(args) else kwargs.get(name)

    def grow_all(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch, count: int) -> Arguments:
        """Every batch-first argument with ``count`` branches, so that every block runs with them."""
        args, kwargs = _map_arguments(self._names, self._listed, args, kwargs, lambda x: batch.grow_list(x, count))
        return _map_arguments(self._names, self.batched - self._listed, args, kwargs, lambda x: batch.grow(x, count))

    def grow(
        self, names: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch, count: int
    ) -> Arguments:
        """Some arguments with ``count`` branches: those that are added where so many have joined already."""
        return _map_arguments(self._names, names, args, kwargs, lambda value: batch.fit(value, count))

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], batch: Batch, samples: slice) -> Arguments:
        """Every batch-first argument cut to some samples of the pipeline's own batch."""
        return _map_arguments(self._names, self.batched, args, kwargs, lambda value: batch.take(value, samples))

    def put(self, args: tuple[Any, ...], kwargs: dict[str, Any], **values: Any) -> Arguments:
        """The arguments with other values for some of them."""
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
    """``c - p`` of a branch, in float32 at least.

    Args:
        output: the denoiser's, with branches.
        batch: the pipeline's own batch.
        branch: in the order in which they joined.
    """
    compute = torch.promote_types(output.dtype, torch.float32)
    return output[batch.conditional].to(compute) - output[batch.branch(branch)].to(compute)


def summed(guided: Sequence[tuple[float, torch.Tensor]]) -> torch.Tensor | None:
    """``sum_i s_i (c - p_i)``, from the scale and :func:`difference` of each guidance; None for none."""
    total: torch.Tensor | None = None
    for scale, moved in guided:
        total = scale * moved if total is None else total + scale * moved
    return total


def fold(
    output: torch.Tensor, batch: Batch, shift: torch.Tensor | None, rescaled_guidance_scale: float | None
) -> torch.Tensor:
    """The prediction of the pipeline's own batch with the guidance in it.

    With ``d`` for the shift: ``c + d`` without classifier-free guidance; ``(u + d, c + d)`` with it, so that the
    pipeline's ``u + g (c - u)`` becomes ``u + g (c - u) + d``. With ``guidance_rescale`` the pipeline measures the
    conditional prediction, which must stay what it was: ``(u - d / (g - 1), c)`` gives the same sum.

    Args:
        output: the denoiser's; only the pipeline's own batch of it is read.
        batch: the pipeline's own batch.
        shift: :func:`summed`, one for each conditional sample.
        rescaled_guidance_scale: ``g`` under guidance_rescale, else None.

    Returns:
        ``[batch.size, ...]`` in the dtype of ``output``; the sum is taken in float32 at least.

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
    """A prediction with the guidance in it; an unconditional one so that the conditional one can stay what it is.

    Args:
        prediction: of some samples.
        shift: :func:`summed`, for the same samples.
        rescaled_guidance_scale: ``g`` where only the unconditional prediction may change, else None.
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
    """The arguments, those of the chosen names changed."""
    positional = tuple(
        change(value) if i < len(names) and names[i] in chosen else value for i, value in enumerate(args)
    )
    return positional, {name: change(value) if name in chosen else value for name, value in kwargs.items()}

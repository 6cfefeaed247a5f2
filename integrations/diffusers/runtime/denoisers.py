# SPDX-License-Identifier: Apache-2.0
"""Common interface to the models that can be guided, UNets and transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from torch import nn

from segkern.grid import Grid
from segkern.integrations.diffusers.models.architectures import (
    Architecture,
    Start,
    architecture_of,
    batch_of,
)
from segkern.integrations.diffusers.models.layers import grids_of_unet
from segkern.integrations.diffusers.runtime.branches import (
    DENOISER_ARGUMENTS,
    Arguments,
    DenoiserArguments,
    Forward,
)
from segkern.integrations.diffusers.runtime.interception import intercepting
from segkern.integrations.diffusers.runtime.origins import name_of
from segkern.integrations.diffusers.runtime.pipeline_run import PipelineRun
from segkern.integrations.diffusers.runtime.processor import STANDARD_PROCESSORS, GuidedProcessor
from segkern.integrations.diffusers.runtime.transformer_places import BlockPlaces
from segkern.integrations.diffusers.runtime.unet_places import Places


class Denoiser(ABC):
    """A pipeline's model, without the wrapper of ``torch.compile``.

    Attributes:
        name: Name of the pipeline component.
        model: The model.
        places: Places at which branches can join.
        arguments: Reads the arguments of the model's forward.
        sample_name: Name of the argument with the noisy images.
    """

    name: str
    model: nn.Module
    places: Places | BlockPlaces
    arguments: DenoiserArguments
    sample_name: str

    def sample(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the noisy images of a call as one tensor."""
        return batch_of(self.arguments.get(self.sample_name, args, kwargs))

    def latents(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the noisy images as passed: a tensor, or a list with one per sample."""
        return self.arguments.get(self.sample_name, args, kwargs)

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the timestep of a call."""
        return self.arguments.get("timestep", args, kwargs)

    def prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the prompt embeddings of a call."""
        return self.arguments.get("encoder_hidden_states", args, kwargs)

    def units(self, timestep: float) -> float:
        """Convert the scheduler's timestep to the model's units."""
        return timestep

    def is_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return False for an auxiliary call of the pipeline, which is not guided."""
        return True

    def frames(self, sample: torch.Tensor) -> int:
        """Return the number of frames of each sample, which are consecutive batch entries in the blocks."""
        return 1

    @property
    def conditional_first(self) -> bool:
        """True if pipelines put the conditional samples first in a batch of both texts."""
        return False

    def rescaled_guidance_scale(self, run: PipelineRun) -> float | None:
        """Return the guidance scale of a run if only the unconditional prediction may change, otherwise None.

        This applies with ``guidance_rescale``, which uses the unmodified conditional prediction.

        Raises:
            ValueError: If the scale is not known.
        """
        rescale = run.setting("guidance_rescale")
        return None if rescale is None or float(rescale) <= 0.0 else _known_scale(run, "guidance_scale")

    @abstractmethod
    def can_share(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if branches can join inside the model with these arguments."""

    @abstractmethod
    def grown(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Return the arguments with the branches that join before the first block; None for no change."""

    @abstractmethod
    def stand_in(self, original: Any, boundary: str, backend: str) -> GuidedProcessor:
        """Return the processor that replaces a layer's own.

        Raises:
            ValueError: If the original processor is not supported.
        """

    def grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
        """Return the grid of all layers in the next call; None if each layer has its own grid, which hooks read."""
        return None

    def starts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Return the first image token of each sample in every attention if samples differ, otherwise nothing."""
        return ()

    @abstractmethod
    def tokens(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Start]:
        """Return the number of image tokens of a sample in a transformer block, and the first one, in the next call."""


class UNet(Denoiser):
    """``UNet2DConditionModel``: Stable Diffusion 1, 2, XL, Kolors and related models."""

    sample_name = "sample"

    # Arguments with one entry per frame of each sample, in the layout of the blocks.
    framed: frozenset[str] = frozenset()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places: Places = Places(model)
        self.arguments = DenoiserArguments(model, DENOISER_ARGUMENTS - self.framed)

    def can_share(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return True if residuals from other models match the batch of the tensors they are added to.

        Residuals of a T2I-Adapter are added inside down blocks and to the mid block's output. Those of a ControlNet are
        added after all down blocks, to skip connections that are already larger if a branch has joined by then.
        """
        down = self.arguments.get("down_block_additional_residuals", args, kwargs)
        mid = self.arguments.get("mid_block_additional_residual", args, kwargs)
        inside = self.arguments.get("down_intrablock_additional_residuals", args, kwargs)
        if inside is not None or (down is not None and mid is None):  # the latter is the old way to pass the former
            return False
        return down is None or forward.joined(self.places.last_of("down")) == forward.joined(-1)

    def grown(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        count = forward.joined(-1)
        if count:
            args, kwargs = self.arguments.grow_all(args, kwargs, forward.batch, count)
            args, kwargs = self.arguments.grow(self.framed, args, kwargs, forward.inside, count)
        mid = forward.joined(self.places.last_of("mid"))
        if mid > count:  # a ControlNet's residual is added to the mid block's enlarged output
            args, kwargs = self.arguments.grow({"mid_block_additional_residual"}, args, kwargs, forward.inside, mid)
        return (args, kwargs) if mid or count else None

    def tokens(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Start]:
        grids = grids_of_unet(self.model, *self.sample(args, kwargs).shape[-2:])
        return next(grid.tokens for name, grid in grids.items() if block.startswith(f"{name}.")), 0

    def stand_in(self, original: Any, boundary: str, backend: str) -> GuidedProcessor:
        if type(original) not in STANDARD_PROCESSORS:
            raise ValueError(f"a {name_of(type(original))} is not standard self-attention")
        return GuidedProcessor(original, boundary, backend)


class MotionUNet(UNet):
    """``UNetMotionModel``: AnimateDiff. Inside the model, the batch has every frame of every sample.

    Guided layers attend over single frames. Motion modules, which attend over frames, are not changed.
    """

    framed = frozenset(
        {
            "encoder_hidden_states",
            "attention_mask",
            "down_block_additional_residuals",
            "mid_block_additional_residual",
        }
    )

    def frames(self, sample: torch.Tensor) -> int:
        return sample.shape[2]


class Transformer(Denoiser):
    """A transformer of :mod:`architectures`."""

    def __init__(self, model: nn.Module, architecture: Architecture) -> None:
        self.model = model
        self.architecture = architecture
        self.sample_name = architecture.sample
        self.places: BlockPlaces = BlockPlaces(model, architecture)
        self.arguments = DenoiserArguments(model, architecture.batched, architecture.listed)
        self._ids: tuple[torch.Tensor, tuple[int, int, int]] | None = None  # the last position ids and their size

    def timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.arguments.get(self.architecture.timestep, args, kwargs)

    def prompt(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.arguments.get(self.architecture.prompt, args, kwargs)

    def units(self, timestep: float) -> float:
        return self.architecture.units(timestep)

    def is_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        other = self.architecture.other
        return other is None or self.arguments.get(other, args, kwargs) is None

    @property
    def conditional_first(self) -> bool:
        return self.architecture.conditional_first

    def rescaled_guidance_scale(self, run: PipelineRun) -> float | None:
        if run.is_loop:
            return None
        if self.architecture.rescales:
            return _known_scale(run, "true_cfg_scale")
        if run.arguments.get("skip_guidance_layers") is not None:  # skip-layer guidance also uses it
            return _known_scale(run, "guidance_scale")
        limit = run.setting("cfg_normalization")
        if limit is not None and float(limit) > 0.0:  # a number for Z-Image, true or false for Lumina 2
            return _known_scale(run, "guidance_scale") + float(self.architecture.shift)
        return super().rescaled_guidance_scale(run)

    def can_share(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return False if residuals are added between blocks, because residuals must match the batch."""
        given = (self.arguments.get(name, args, kwargs) for name in self.architecture.residuals)
        return all(value is None for value in given) and not getattr(self.model, "zero_cond_t", False)

    def grown(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Return the arguments with all branches, because everything around the blocks runs on the whole batch."""
        return self.arguments.grow_all(args, kwargs, forward.batch, len(forward.branches))

    def stand_in(self, original: Any, boundary: str, backend: str) -> GuidedProcessor:
        return intercepting(original, boundary, backend)

    def grid(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Grid | None:
        frames, height, width = self._size(args, kwargs)
        start = self._start(args, kwargs)
        return Grid(height, width, start if isinstance(start, int) else start[0], frames)

    def starts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...]:
        start = self._start(args, kwargs)
        return () if isinstance(start, int) else start

    def tokens(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, Start]:
        frames, height, width = self._size(args, kwargs)
        whole = any(stage.sequence for stage in self.architecture.stages if block.startswith(f"{stage.blocks}."))
        return frames * height * width, self._start(args, kwargs) if whole else 0

    def _start(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Start:
        return self.architecture.start(self.model, lambda name: self.arguments.get(name, args, kwargs))

    def _size(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int, int]:
        def get(name: str) -> Any:
            return self.arguments.get(name, args, kwargs)

        ids = get("img_ids")
        if ids is None:
            return self.architecture.size(self.model, get)
        if self._ids is None or self._ids[0] is not ids:
            self._ids = ids, self.architecture.size(self.model, get)
        return self._ids[1]


def _known_scale(run: PipelineRun, name: str) -> float:
    scale = run.setting(name)
    if scale is None:
        raise ValueError(
            f"this {type(run.pipe).__name__} rescales to its conditional prediction, so guide needs its {name}, which "
            f"is known only if the pipeline is called as pipe(...)"
        )
    return float(scale)


def find_denoisers(pipe: Any) -> list[Denoiser]:
    """Return the models of a pipeline that can be guided: none, one, or two that alternate in a run (Wan 2.2)."""
    denoisers: list[Denoiser] = []
    for name in ("unet", "transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        model = getattr(model, "_orig_mod", model)
        if any(model is other.model for other in denoisers):
            continue
        denoiser = _denoiser(model)
        if denoiser is not None:
            denoiser.name = name
            denoisers.append(denoiser)
    return denoisers


def _denoiser(model: Any) -> Denoiser | None:
    if isinstance(model, UNet2DConditionModel):
        return UNet(model)
    if isinstance(model, UNetMotionModel):
        return MotionUNet(model)
    architecture = architecture_of(model)
    return None if architecture is None else Transformer(model, architecture)

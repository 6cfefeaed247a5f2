# SPDX-License-Identifier: Apache-2.0
"""Transformers such as Flux and Stable Diffusion 3: blocks, perturbed attention, and skipped blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.flux.model
import comfy.ldm.lumina.model
import comfy.ldm.modules.diffusionmodules.mmdit
import comfy.ldm.qwen_image.model
import comfy.ldm.wan.model
import torch
from comfy.ldm.modules.attention import get_attn_precision
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from segkern import Grid
from segkern.integrations.specs import SLG, TPG
from segkern.integrations.specs.base import Spec
from segkern.integrations.specs.layer_names import LayerInfo

from .blocks import BlockChange
from .perturbation import Perturbation
from .recording import Recording

Options = dict[str, Any]  # transformer_options, or a part of them
Arguments = dict[str, Any]  # arguments of a block replacement
_Key = tuple[str | None, int]  # key of a block replacement

_LATENTS = "segkern_latents"  # key of the latent shape in a forward pass's options
_OVERRIDE = "optimized_attention_override"
_FUSED_WITH = {"attn_precision", "transformer_options", "_inside_attn_wrapper"}  # arguments that do not affect results


@dataclass(frozen=True)
class Stage:
    """A list of blocks.

    Attributes:
        blocks: Name of the list in the model.
        part: Part of the layer names.
        key: First item of the key under which ComfyUI replaces a block; None if it cannot.
        text: Whether a block has the text as a separate sequence and changes it.
    """

    blocks: str
    part: str
    key: str | None
    text: bool


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        users: Name of the model family for messages.
        stages: Lists of blocks in execution order.
        before: Function that returns the number of tokens before the image in the first attention of a block.
        default: Default layers.
    """

    users: str
    stages: tuple[Stage, ...]
    before: Callable[[Any, Options, Arguments, int], int]
    default: str | None = None


def _text(model: Any, options: Options, arguments: Arguments, tokens: int) -> int:
    """Return the number of text tokens, from a separate text sequence or from the tokens before the image."""
    return arguments["txt"].shape[1] if "txt" in arguments else options["img_slice"][0]


def _none(model: Any, options: Options, arguments: Arguments, tokens: int) -> int:
    return 0


def _all_but_padded_image(model: Any, options: Options, arguments: Arguments, tokens: int) -> int:
    """Return the number of tokens before the image, which is last and padded to a multiple of tokens."""
    image, multiple = _grid(model, options).tokens, model.pad_tokens_multiple or 1
    return tokens - -(-image // multiple) * multiple


FAMILIES: dict[type, Family] = {
    comfy.ldm.flux.model.Flux: Family(
        "Flux",
        (
            Stage("double_blocks", "double", "double_block", True),
            Stage("single_blocks", "single", "single_block", False),
        ),
        _text,
    ),
    comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper: Family(
        "Stable Diffusion 3", (Stage("joint_blocks", "blocks", "double_block", True),), _text, "7-9"
    ),
    comfy.ldm.qwen_image.model.QwenImageTransformer2DModel: Family(
        "Qwen-Image", (Stage("transformer_blocks", "blocks", "double_block", True),), _text
    ),
    comfy.ldm.wan.model.WanModel: Family("Wan", (Stage("blocks", "blocks", "double_block", False),), _none),
    comfy.ldm.lumina.model.NextDiT: Family(
        "Lumina 2, Z-Image", (Stage("layers", "blocks", None, False),), _all_but_padded_image
    ),
}


class Transformer:
    """The blocks of a transformer, and the changes that guidance makes to its forward pass."""

    def __init__(self, model: Any) -> None:
        self.model, self._family = model, FAMILIES[type(model)]
        self._keys: list[tuple[Stage, int]] = []
        layers = []
        for stage in self._family.stages:
            for index in range(len(getattr(model, stage.blocks))):
                number = len(self._keys)
                self._keys.append((stage, index))
                name = f"{stage.part[0]}{index}"
                layers.append(LayerInfo(name, f"{stage.part}.{index}", stage.part, 0, 0, block=number))
        self.layers: Sequence[LayerInfo] = layers
        self.why_not_shared: str | None = None
        if any(stage.key is None for stage in self._family.stages):
            self.why_not_shared = f"ComfyUI has no hook that skips blocks of {self._family.users}"

    def default_for(self, spec: Spec) -> str | None:
        """Return the default layers of a guidance method; None if the model has none."""
        return self._family.default

    def skipped(self, layers: Sequence[LayerInfo]) -> float:
        """Return the share of blocks before the first of these layers."""
        return self._number(layers[0]) / len(self._keys)

    def perturb(self, options: Options, layers: Sequence[LayerInfo], perturbation: Perturbation) -> None:
        """Change ``transformer_options`` so that a forward pass perturbs these layers."""
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "segkern", _note_latents, options)
        chosen = {}
        for layer in layers:
            stage, index = self._keys[self._number(layer)]
            chosen[index] = layer.module
            if stage.key is not None:
                key = stage.key, index
                attentions = _attentions(getattr(self.model, stage.blocks)[index])
                before = _replacement(options, key)
                _replace(options, key, _PerturbedBlock(self, layer.module, perturbation, attentions, before))
        if any(stage.key is None for stage in self._family.stages):
            options[_OVERRIDE] = _ByIndex(self, chosen, perturbation, options.get(_OVERRIDE))

    def change_blocks(self, options: Options, layers: Sequence[LayerInfo], change: BlockChange) -> None:
        """Change ``transformer_options`` so that a forward pass skips these blocks or shuffles their tokens."""
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "segkern", _note_latents, options)
        for layer in layers:
            stage, index = self._keys[self._number(layer)]
            key = stage.key, index
            _replace(options, key, _ChangedBlock(self, layer, stage.text, change, _replacement(options, key)))

    def why_unchangeable(self, spec: SLG | TPG) -> str | None:
        """Return why a method that changes blocks is not supported; None if it is."""
        if all(stage.key is not None for stage in self._family.stages):
            return None
        return f"ComfyUI has no hook that replaces blocks of {self._family.users}"

    def record(self, options: Options, recording: Recording, entries: Sequence[Sequence[LayerInfo]]) -> None:
        """Record the activations that perturbed forward passes need; ``entries`` lists the layers of each method."""
        for number in {self._number(layers[0]) for layers in entries}:
            stage, index = self._keys[number]
            key = stage.key, index
            _replace(options, key, _Recorder(recording, number, stage.text, _replacement(options, key)))

    def replay(self, options: Options, recording: Recording, layers: Sequence[LayerInfo]) -> _Replay:
        """Skip the blocks before the first of these layers, and use their recorded activations."""
        entry = self._number(layers[0])
        replay = _Replay(recording, entry, self._keys[entry][0].text)
        for number, (stage, index) in enumerate(self._keys[: entry + 1]):
            key = stage.key, index
            _replace(options, key, _ReplayedBlock(replay, number, _replacement(options, key)))
        return replay

    def grid(self, options: Options, arguments: Arguments, tokens: int) -> Grid:
        """Return the image's grid in the tokens of a block's first attention."""
        grid = _grid(self.model, options)
        start = self._family.before(self.model, options, arguments, tokens)
        after = sum(options.get("reference_image_num_tokens", ()))
        multiple = getattr(self.model, "pad_tokens_multiple", None) or 1
        if start < 0 or start + -(-grid.tokens // multiple) * multiple + after != tokens:
            raise ValueError(
                f"guidance cannot locate the image tokens: {self._family.users} has {tokens} tokens, "
                f"{start} of them before an image of {grid.frames} x {grid.height} x {grid.width} and {after} of "
                f"references after it; another node or conditioning adds tokens"
            )
        return Grid(grid.height, grid.width, start=start, frames=grid.frames)

    def _number(self, layer: LayerInfo) -> int:
        assert layer.block is not None
        return layer.block


def _note_latents(
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: torch.Tensor | None = None,
    c_crossattn: torch.Tensor | None = None,
    control: Any = None,
    transformer_options: Options | None = None,
    **conditions: Any,
) -> torch.Tensor:
    """Store the latent shape of a forward pass in its options. With areas, it differs from that of the run."""
    options = {**(transformer_options or {}), _LATENTS: tuple(x.shape)}
    return executor(x, t, c_concat, c_crossattn, control, options, **conditions)


def _grid(model: Any, options: Options) -> Grid:
    """Return the grid of the image's tokens, with partial patches counted as whole patches."""
    shape = options.get(_LATENTS)
    if shape is None:
        raise RuntimeError(
            "guidance cannot read the size of the latents, because another node (TorchCompileModel) compiles the model "
            "and reuses the options of the first forward pass; remove that node"
        )
    *_, height, width = shape
    frames = shape[2] if len(shape) == 5 else 1
    patch = model.patch_size
    by_frame, by_row, by_column = patch if isinstance(patch, (tuple, list)) else (1, patch, patch)
    return Grid(-(-height // by_row), -(-width // by_column), frames=-(-frames // by_frame))


def _attentions(block: Any) -> int:
    """Return how many self-attentions a block computes before any other attention."""
    return 1 + bool(getattr(getattr(block, "x_block", None), "x_block_self_attn", False))


class _BlockPatch:
    """Replaces one block (``patches_replace["dit"]``)."""

    def __init__(self, before: Callable[..., Arguments] | None) -> None:
        self.before = before

    def compute(self, arguments: Arguments, extra: Options) -> Arguments:
        """Run the block, through another node's replacement if there is one."""
        if self.before is not None:
            return self.before(arguments, extra)
        return extra["original_block"](arguments)


def _replacement(options: Options, key: _Key) -> Callable[..., Arguments] | None:
    return options.get("patches_replace", {}).get("dit", {}).get(key)


def _replace(options: Options, key: _Key, patch: _BlockPatch) -> None:
    replaced = dict(options.get("patches_replace", {}))
    replaced["dit"] = {**replaced.get("dit", {}), key: patch}
    options["patches_replace"] = replaced


class _PerturbedBlock(_BlockPatch):
    """Replaces a block and perturbs its self-attentions."""

    def __init__(
        self,
        model: Transformer,
        layer: str,
        perturbation: Perturbation,
        attentions: int,
        before: Callable[..., Arguments] | None,
    ) -> None:
        super().__init__(before)
        self.model, self.layer, self.perturbation, self.attentions = model, layer, perturbation, attentions

    @torch.compiler.disable
    def __call__(self, arguments: Arguments, extra: Options) -> Arguments:
        options = dict(arguments["transformer_options"])
        override = _Override(options.get(_OVERRIDE))
        left = self.attentions

        def perturbed(call: _Call) -> torch.Tensor | None:
            nonlocal left
            if left == 0:
                return None
            first, left = left == self.attentions, left - 1
            if first:
                grid = self.model.grid(options, arguments, call.query.shape[2])
            else:  # the second attention has only image tokens
                grid = _grid(self.model.model, options)
            layer = self.layer if first else f"{self.layer}.attn2"
            return self.perturbation(layer, call.query, call.key, call.value, grid, call.attend, call.fused)

        override.perturbed = perturbed
        return self.compute({**arguments, "transformer_options": {**options, _OVERRIDE: override}}, extra)


class _ChangedBlock(_BlockPatch):
    """Skips a block, or shuffles the image tokens before it."""

    def __init__(
        self,
        model: Transformer,
        layer: LayerInfo,
        text: bool,
        change: BlockChange,
        before: Callable[..., Arguments] | None,
    ) -> None:
        super().__init__(before)
        self.model, self.layer, self.text, self.change = model, layer, text, change

    @torch.compiler.disable
    def __call__(self, arguments: Arguments, extra: Options) -> Arguments:
        change, name = self.change, self.layer.module
        change.computed.add(name)
        streams = [stream for stream in ("img", "txt") if stream in arguments]
        own = None
        if change.report.wants(name):  # on copies, because blocks change activations in place
            own = self.compute({**arguments, **{stream: arguments[stream].clone() for stream in streams}}, extra)["img"]
        output: Arguments
        if change.skips:
            output = {stream: arguments[stream] for stream in streams}
        else:
            output = self.compute({**arguments, "img": self._shuffled(arguments)}, extra)
        if own is not None:
            change.report.note(name, output["img"], own)
        return output

    def _shuffled(self, arguments: Arguments) -> torch.Tensor:
        image: torch.Tensor = arguments["img"]
        text = arguments["txt"].shape[1] if self.text else 0
        grid = self.model.grid(arguments["transformer_options"], arguments, text + image.shape[1])
        return self.change.shuffled(self.layer, image, grid.start - text, grid.tokens)


@dataclass
class _Call:
    """A call of an attention function, with tensors ``[batch, heads, tokens, head_dim]``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    fused: bool
    options: Options


class _Override:
    """An attention override that calls the previous override."""

    def __init__(self, before: Callable[..., torch.Tensor] | None) -> None:
        self.before = before
        self.perturbed: Callable[[_Call], torch.Tensor | None] = lambda call: None

    def __call__(
        self,
        function: Callable[..., torch.Tensor],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        heads: int,
        *arguments: Any,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **keywords: Any,
    ) -> torch.Tensor:
        options = {**keywords.get("transformer_options", {})}
        if self.before is None:
            options.pop(_OVERRIDE, None)
        else:
            options[_OVERRIDE] = self.before
        keywords["transformer_options"] = options

        def own(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **layout: bool) -> torch.Tensor:
            if self.before is not None:
                return self.before(function, q, k, v, heads, *arguments, **layout, **keywords)
            return function(q, k, v, heads, *arguments, **layout, **keywords)

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return own(q, k, v, skip_reshape=True, skip_output_reshape=True)

        rows = [x if skip_reshape else _split(x, heads) for x in (query, key, value)]
        unknown = {name for name, value in keywords.items() if name not in _FUSED_WITH and value is not None}
        fused = self.before is None and not arguments and not unknown
        fused = fused and get_attn_precision(keywords.get("attn_precision"), query.dtype) is None
        output = self.perturbed(_Call(rows[0], rows[1], rows[2], attend, fused, options))
        if output is None:
            return own(query, key, value, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape)
        return output if skip_output_reshape else output.transpose(1, 2).flatten(2)


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Return ``[batch, heads, tokens, head_dim]`` from ``[batch, tokens, channels]`` or from separate heads."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class _ByIndex(_Override):
    """Perturbs blocks by the number in their options, for models whose blocks cannot be replaced."""

    def __init__(
        self,
        model: Transformer,
        chosen: dict[int, str],
        perturbation: Perturbation,
        before: Callable[..., torch.Tensor] | None,
    ) -> None:
        super().__init__(before)

        def perturbed(call: _Call) -> torch.Tensor | None:
            if "block_index" not in call.options:  # a refiner block
                return None
            layer = chosen.get(call.options["block_index"])
            if layer is None:
                return None
            grid = model.grid(call.options, {}, call.query.shape[2])
            return perturbation(layer, call.query, call.key, call.value, grid, call.attend, call.fused)

        self.perturbed = perturbed


class _Recorder(_BlockPatch):
    """Replaces a block and records its inputs."""

    def __init__(self, recording: Recording, number: int, text: bool, before: Callable[..., Arguments] | None) -> None:
        super().__init__(before)
        self.recording, self.number, self.text = recording, number, text

    @torch.compiler.disable
    def __call__(self, arguments: Arguments, extra: Options) -> Arguments:
        options = arguments["transformer_options"]
        self.recording.keep(("img", self.number), options, arguments["img"])
        if self.text:
            self.recording.keep(("txt", self.number), options, arguments["txt"])
        return self.compute(arguments, extra)


class _Replay:
    """A forward pass that skips blocks. ``full`` is the reason if nothing could be skipped."""

    def __init__(self, recording: Recording, entry: int, text: bool) -> None:
        self.recording, self.entry = recording, entry
        self.streams = ("img", "txt") if text else ("img",)
        self.full: str | None = None

    def serves(self, arguments: Arguments) -> bool:
        """Return True if the batch was recorded."""
        places = [(stream, self.entry) for stream in self.streams]
        if self.recording.has(places, arguments["transformer_options"], arguments["img"].shape[0]):
            return True
        self.full = "another node changed the batch"
        return False


class _ReplayedBlock(_BlockPatch):
    """Skips a block, or runs the first perturbed block on its recorded inputs."""

    def __init__(self, replay: _Replay, number: int, before: Callable[..., Arguments] | None) -> None:
        super().__init__(before)
        self.replay, self.number = replay, number

    @torch.compiler.disable
    def __call__(self, arguments: Arguments, extra: Options) -> Arguments:
        replay = self.replay
        if not replay.serves(arguments):
            return self.compute(arguments, extra)
        if self.number < replay.entry:
            return {stream: arguments[stream] for stream in ("img", "txt") if stream in arguments}
        options = arguments["transformer_options"]
        recorded = {stream: replay.recording.take((stream, replay.entry), options) for stream in replay.streams}
        return self.compute({**arguments, **recorded}, extra)

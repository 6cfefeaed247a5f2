# SPDX-License-Identifier: Apache-2.0
"""UNets of Stable Diffusion 1, 2, XL and related models: layers, perturbed attention, and skipped blocks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules.attention import (
    SpatialTransformer,
    SpatialVideoTransformer,
    get_attn_precision,
    optimized_attention,
)
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel, forward_timestep_embed
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from segkern import Grid
from segkern.integrations.specs import SLG, TPG
from segkern.integrations.specs.base import Spec
from segkern.integrations.specs.layer_names import LayerInfo

from .blocks import BlockChange
from .perturbation import Perturbation
from .recording import Recording

Options = dict[str, Any]  # transformer_options, or a part of them

_PARTS = {"input": "down", "middle": "mid", "output": "up"}
_LAYER_PATCHES = "forward_timestep_embed_patch"
_SDXL_DOWN_LAYERS = 24  # self-attention layers of Stable Diffusion XL in its down blocks


@dataclass(frozen=True)
class _Place:
    """The place of a module that ``forward_timestep_embed`` runs.

    Attributes:
        block: Number of the block in execution order.
        name: Name of the block, such as ``("input", 4)``.
        position: Position in the block.
        last: Whether this is the last module of the block.
    """

    block: int
    name: tuple[str, int]
    position: int
    last: bool


class UNet:
    """The self-attention layers of a UNet, and the changes that guidance makes to its forward pass."""

    why_not_shared: str | None = None  # reason, if no forward pass can skip blocks

    def __init__(self, model: UNetModel) -> None:
        blocks = [(("input", i), block) for i, block in enumerate(model.input_blocks)]
        if model.middle_block is not None:
            blocks.append((("middle", 0), model.middle_block))
        blocks += [(("output", i), block) for i, block in enumerate(model.output_blocks)]
        self._blocks = [name for name, _ in blocks]
        self._places: dict[int, _Place] = {}
        self._transformers: dict[str, tuple[torch.nn.Module, int]] = {}
        self._block_names: dict[str, str] = {}  # module name of each layer's transformer block
        names = {id(module): name for name, module in model.named_modules()}
        layers = []
        count = dict.fromkeys(_PARTS, 0)
        transformers = dict.fromkeys(_PARTS, 0)
        for number, (name, block) in enumerate(blocks):
            part = name[0]
            for position, module in enumerate(block):
                self._places[id(module)] = _Place(number, name, position, position == len(block) - 1)
                if isinstance(module, SpatialVideoTransformer):
                    raise ValueError("guidance does not support Stable Video Diffusion, whose UNet batches frames")
                if not isinstance(module, SpatialTransformer):
                    continue
                for index, transformer in enumerate(module.transformer_blocks):
                    if transformer.disable_self_attn:  # attends to the text instead
                        continue
                    layer = f"{name[0]}.{name[1]}.{index}"
                    self._transformers[layer] = module, index
                    self._block_names[layer] = names[id(transformer)]
                    layers.append(
                        LayerInfo(
                            name=f"{_PARTS[part][0]}{count[part]}",
                            module=layer,
                            part=_PARTS[part],
                            heads=transformer.n_heads,
                            head_dim=transformer.d_head,
                            comfyui=f"{_PARTS[part][0]}{transformers[part]}.{index}",
                        )
                    )
                    count[part] += 1
                transformers[part] += 1
        self.layers: Sequence[LayerInfo] = layers
        self._count = count

    def default_for(self, spec: Spec) -> str | None:
        """Return the default layers of a guidance method; None if the model has none."""
        if isinstance(spec, TPG) and self._count["input"] == _SDXL_DOWN_LAYERS:
            return "d6-23"
        return "mid" if self._count["middle"] else None  # models such as SSD-1B have no middle layers

    def why_unchangeable(self, spec: SLG | TPG) -> str | None:
        """Return why a method that changes blocks is not supported; None if it is."""
        return "ComfyUI has no hook that skips a transformer block of a UNet" if isinstance(spec, SLG) else None

    def change_blocks(self, options: Options, layers: Sequence[LayerInfo], change: BlockChange) -> None:
        """Change ``transformer_options`` so that a forward pass shuffles the tokens before these transformer blocks.

        ComfyUI has no hook for these blocks, so they have PyTorch hooks during the forward pass.
        """
        blocks = {self._block_names[layer.module]: layer for layer in layers}

        def shuffling(executor: Any, *given: Any, **keywords: Any) -> Any:
            model, handles = executor.class_obj.diffusion_model, []
            try:
                for name, layer in blocks.items():
                    hook, block = _ShuffledBlock(layer, change), model.get_submodule(name)
                    handles.append(block.register_forward_pre_hook(hook.begin, with_kwargs=True))
                    handles.append(block.register_forward_hook(hook.end))
                return executor(*given, **keywords)
            finally:
                for handle in handles:
                    handle.remove()

        add_wrapper_with_key(WrappersMP.APPLY_MODEL, "segkern", shuffling, options)

    def skipped(self, layers: Sequence[LayerInfo]) -> float:
        """Return the share of blocks before the first of these layers."""
        return self._entry(layers).block / len(self._blocks)

    def perturb(self, options: Options, layers: Sequence[LayerInfo], perturbation: Perturbation) -> None:
        """Change ``transformer_options`` so that a forward pass perturbs these layers."""
        replaced = dict(options.get("patches_replace", {}))
        replaced["attn1"] = attn1 = dict(replaced.get("attn1", {}))
        for layer in layers:
            name, number, index = layer.module.split(".")
            block = (name, int(number), int(index))
            before = attn1.get(block) or attn1.get(block[:2])
            attn1[block] = _PerturbedAttention(layer.module, perturbation, before)
        options["patches_replace"] = replaced

    def record(self, options: Options, recording: Recording, entries: Sequence[Sequence[LayerInfo]]) -> None:
        """Record the activations that perturbed forward passes need; ``entries`` lists the layers of each method."""
        places: dict[Hashable, bool] = {}
        for needed in map(self._needed, entries):
            places |= {place: values or places.get(place, False) for place, values in needed.items()}
        _patch_layers(options, lambda: _Recorder(self, recording, places))

    def replay(self, options: Options, recording: Recording, layers: Sequence[LayerInfo]) -> _Replay:
        """Skip the modules before the first of these layers, and use their recorded activations."""
        replay = _Replay(self, recording, self._entry(layers), self._needed(layers))
        _patch_layers(options, lambda: replay)
        return replay

    def place(self, module: torch.nn.Module) -> _Place | None:
        """Return the place of a module; None if the module was added after guidance was set up."""
        return self._places.get(id(module))

    def _entry(self, layers: Sequence[LayerInfo]) -> _Place:
        module, _ = self._transformers[layers[0].module]
        return self._places[id(module)]

    def _needed(self, layers: Sequence[LayerInfo]) -> dict[Hashable, bool]:
        """Return which activations are needed, and whether their values are needed or only their shapes.

        These are the input of the first layer's module and the outputs of the blocks before it. An output block reads
        the output of an input block. If both come before the layer, no values are needed.
        """
        entry = self._entry(layers)
        before = self._blocks[: entry.block]
        inputs = [name for name in self._blocks if name[0] == "input"]
        read = len(inputs) - entry.name[1] if entry.name[0] == "output" else len(inputs)
        needed: dict[Hashable, bool] = {("output of", name): name in inputs[:read] for name in before}
        return needed | {("input of", entry.name): True}


class _ShuffledBlock:
    """Hooks of a transformer block that shuffle the tokens before it and measure the effect."""

    def __init__(self, layer: LayerInfo, change: BlockChange) -> None:
        self.layer, self.change = layer, change
        self.own: torch.Tensor | None = None  # the block's output without the change

    def begin(self, block: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Forward pre-hook."""
        self.change.computed.add(self.layer.module)
        x, *others = args
        if self.change.report.wants(self.layer.module):  # on a copy, because blocks change activations in place
            self.own = block.forward(x.clone(), *others, **kwargs)
        return (self.change.shuffled(self.layer, x, 0, x.shape[1]), *others), kwargs

    def end(self, block: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Forward hook."""
        if self.own is not None:
            self.change.report.note(self.layer.module, output, self.own)
            self.own = None


class _PerturbedAttention:
    """Replaces one self-attention (``patches_replace["attn1"]``)."""

    def __init__(self, layer: str, perturbation: Perturbation, before: Callable[..., torch.Tensor] | None) -> None:
        self.layer, self.perturbation, self.before = layer, perturbation, before

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Options) -> torch.Tensor:
        heads = options["n_heads"]
        height, width = options["activations_shape"][2:]
        if query.shape[1] != height * width:
            raise ValueError(
                f"{self.layer} has {query.shape[1]} queries for {height} x {width} positions, because another node "
                f"merges tokens (ToMe, Hypertile) and leaves no grid to blur; remove that node or choose other layers"
            )

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            rows = (_joined(x) for x in (query, key, value))
            if self.before is not None:
                return _split(self.before(*rows, options), heads)
            precision = options["attn_precision"]
            return _split(
                optimized_attention(*rows, heads, attn_precision=precision, transformer_options=options), heads
            )

        own = self.before is None and "optimized_attention_override" not in options
        fused = own and get_attn_precision(options["attn_precision"], query.dtype) is None
        q, k, v = (_split(x, heads) for x in (query, key, value))
        return _joined(self.perturbation(self.layer, q, k, v, Grid(height, width), attend, fused))


def _split(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Reshape ``[batch, tokens, channels]`` to ``[batch, heads, tokens, head_dim]``."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _joined(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


class _LayerPatch:
    """An entry of ``forward_timestep_embed_patch``. It runs instead of every module of a block."""

    def __init__(self, unet: UNet) -> None:
        self.unet = unet

    def compute(self, module: torch.nn.Module, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        """Run a module through other nodes' patches, if there are any for it.

        ``arguments`` are the arguments of :func:`forward_timestep_embed` after ``x``.
        """
        options = arguments[2]
        patches = options["patches"]
        others = [entry for entry in patches[_LAYER_PATCHES] if entry[1] is not self]
        options["patches"] = {**patches, _LAYER_PATCHES: others}
        try:
            return forward_timestep_embed([module], x, *arguments)
        finally:
            options["patches"] = patches


class _Recorder(_LayerPatch):
    """Records the activations that a perturbed forward pass needs."""

    def __init__(self, unet: UNet, recording: Recording, places: Mapping[Hashable, bool]) -> None:
        super().__init__(unet)
        self.recording, self.places = recording, places

    @torch.compiler.disable
    def __call__(self, module: torch.nn.Module, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        place, options = self.unet.place(module), arguments[2]
        if place is None:
            return self.compute(module, x, *arguments)
        if isinstance(module, SpatialTransformer) and ("input of", place.name) in self.places:
            self.recording.keep(("input of", place.name), options, x)
        output = self.compute(module, x, *arguments)
        if place.last and ("output of", place.name) in self.places:
            self.recording.keep(("output of", place.name), options, output, self.places["output of", place.name])
        return output


class _Replay(_LayerPatch):
    """Skips the modules before the first perturbed module. ``full`` is the reason if nothing could be skipped."""

    def __init__(self, unet: UNet, recording: Recording, entry: _Place, places: Mapping[Hashable, bool]) -> None:
        super().__init__(unet)
        self.recording, self.entry, self.places = recording, entry, places
        self.full: str | None = None

    @torch.compiler.disable
    def __call__(self, module: torch.nn.Module, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        place, options = self.unet.place(module), arguments[2]
        if place is None or (place.block, place.position) > (self.entry.block, self.entry.position):
            return self.compute(module, x, *arguments)
        if not self.recording.has(self.places, options, x.shape[0]):
            self.full = "another node changed the model's blocks or the batch"
            return self.compute(module, x, *arguments)
        if place == self.entry:
            return self.compute(module, self.recording.take(("input of", place.name), options), *arguments)
        if isinstance(module, SpatialTransformer):
            options["transformer_index"] += 1  # other nodes read it, and it counts skipped transformers too
        if place.last and place.block < self.entry.block:
            return self.recording.take(("output of", place.name), options)
        return x  # this output is never used


def _patch_layers(options: Options, make: Callable[[], _LayerPatch]) -> None:
    """Run a patch instead of every module of a block. It precedes other nodes' patches and calls them."""
    patches = dict(options.get("patches", {}))
    patches[_LAYER_PATCHES] = [(torch.nn.Module, make()), *patches.get(_LAYER_PATCHES, [])]
    options["patches"] = patches

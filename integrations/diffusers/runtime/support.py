# SPDX-License-Identifier: Apache-2.0
"""Checks that refuse unsupported pipelines and specs before anything is modified."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

from diffusers.models.attention_processor import Attention
from diffusers.modular_pipelines import ModularPipeline
from torch import nn

from segkern.integrations.diffusers.models.layers import (
    LayerInfo,
    default_layers_of,
    find_model,
    list_layers,
    select_layers,
)
from segkern.integrations.diffusers.runtime.denoisers import Denoiser, MotionUNet, Transformer, UNet, find_denoisers
from segkern.integrations.diffusers.runtime.origins import name_of
from segkern.integrations.diffusers.runtime.processor import STANDARD_PROCESSORS, unwrap
from segkern.integrations.specs import CFG, SAG, SEG
from segkern.integrations.specs.base import AttentionSpec, BlockSpec, LayeredSpec, PlacedSpec, Spec
from segkern.integrations.specs.sigmas import LayerSigmas, Sigmas, check_heads


def check_pipeline(pipe: Any) -> list[Denoiser]:
    """Return the denoisers of a pipeline that can be guided: one, or two that alternate in a run.

    Args:
        pipe: A pipeline, or a denoiser without a pipeline.

    Raises:
        ValueError: If it cannot be guided. The message quotes it and gives the reason.
    """
    if isinstance(pipe, ModularPipeline):
        raise ValueError(
            f"guide does not support a {type(pipe).__name__}: in a modular pipeline, guidance is a component; see "
            f"SEGGuider, PAGGuider, SAGGuider, SLGGuider and TPGGuider"
        )
    find_model(pipe)  # raises an error that lists the supported models
    denoisers = find_denoisers(SimpleNamespace(unet=pipe) if isinstance(pipe, nn.Module) else pipe)
    if not denoisers:
        raise ValueError(f"guide needs a pipeline with a denoiser, got a {type(pipe).__name__}")
    if not isinstance(pipe, nn.Module) and not callable(pipe):
        raise ValueError(
            f"guide needs a pipeline that can be called, or a denoiser without a pipeline; a {type(pipe).__name__} is "
            f"not callable"
        )
    try:
        hash(pipe), weakref.ref(pipe)
    except TypeError as error:
        raise ValueError(
            f"guide needs a pipeline that is hashable and supports weak references, as most objects do unless their "
            f"class prevents it (a dataclass, __slots__): {error}"
        ) from None
    for denoiser in denoisers:
        check_model(denoiser.model)
    return denoisers


def check_model(model: nn.Module) -> None:
    """Raise a ValueError for a denoiser that uses outputs of earlier calls, or that runs on only some of its tokens."""
    name = type(model).__name__
    if getattr(model, "is_cache_enabled", False):
        raise ValueError(
            f"guide does not support a {name} with a cache, which uses results of earlier calls with another batch; "
            f"call its disable_cache(), and see SEG(reuse=...)"
        )
    parallel = getattr(model, "_parallel_config", None)
    if parallel is not None and getattr(parallel, "context_parallel_config", None) is not None:
        raise ValueError(
            f"guide does not support a {name} with context parallelism, because no device has the whole image"
        )


def choose_layers(denoiser: Denoiser, specs: tuple[Spec, ...]) -> tuple[PlacedSpec, ...]:
    """Return the layers of each spec.

    Raises:
        ValueError: If there are no specs, if a spec, layer or sigma is not supported, or if specs that share a layer
            have different boundaries or backends.
    """
    if not specs:
        raise ValueError("guide needs at least one spec, such as guide(pipe, SEG(layers='mid'))")
    for spec in specs:
        if not isinstance(spec, (LayeredSpec, SAG, CFG)):
            raise ValueError(
                f"guide supports SEG(...), PAG(...), SAG(...), SLG(...), TPG(...) and CFG(...) specs, got {spec!r}"
            )
    if sum(isinstance(spec, CFG) for spec in specs) > 1:
        raise ValueError(f"guide supports only one CFG(...) spec, got {', '.join(map(repr, specs))}")
    if any(isinstance(spec, SAG) for spec in specs) and any(isinstance(spec, CFG) and spec.reuse > 1 for spec in specs):
        raise ValueError(
            f"SAG degrades the prediction of CFG in every step, so CFG.reuse must be 1 with SAG, got {specs}"
        )
    available = list_layers(denoiser.model)
    if not available and not all(isinstance(spec, CFG) for spec in specs):
        raise ValueError(
            f"guide does not support this {type(denoiser.model).__name__}: it has no self-attention layers over image "
            f"tokens only"
        )
    if isinstance(denoiser, Transformer):
        _check_for_transformer(denoiser, specs)
    if isinstance(denoiser, MotionUNet):
        _check_for_motion(specs)
    placed = tuple(_choose(denoiser, available, spec) for spec in specs)
    owner: dict[str, AttentionSpec] = {}
    for placed_spec in placed:
        for layer in placed_spec.layers:
            if isinstance(denoiser, UNet) and not isinstance(placed_spec.spec, BlockSpec):
                check_layer(denoiser.model, layer)
            if not isinstance(placed_spec.spec, AttentionSpec) or placed_spec.spec.boundary is None:
                continue
            spec, other = placed_spec.spec, owner.setdefault(layer.module, placed_spec.spec)
            if (other.boundary, other.backend) != (spec.boundary, spec.backend):
                raise ValueError(
                    f"specs that share layer {layer.name} ({layer.module}) must have the same boundary and "
                    f"backend, got {other} and {spec}"
                )
    return placed


def _check_for_transformer(denoiser: Transformer, specs: Sequence[Spec]) -> None:
    """Raise a ValueError for a spec that is not supported for transformers."""
    name = type(denoiser.model).__name__
    for spec in specs:
        if not isinstance(spec, LayeredSpec):
            raise ValueError(
                f"{type(spec).__name__} needs a UNet2DConditionModel; a {name} supports SEG(...), PAG(...), SLG(...) "
                f"and TPG(...)"
            )
        if isinstance(spec, SEG) and spec.query_stride not in (1, (1, 1)):
            raise ValueError(
                f"SEG.query_stride={spec.query_stride!r} needs a UNet2DConditionModel; a {name} supports only 1"
            )


def _check_for_motion(specs: Sequence[Spec]) -> None:
    """Raise a ValueError for a spec that is not supported for UNets of videos."""
    for spec in specs:
        if not isinstance(spec, AttentionSpec):
            needed = (
                "a UNet2DConditionModel or a transformer" if isinstance(spec, BlockSpec) else "a UNet2DConditionModel"
            )
            raise ValueError(f"{type(spec).__name__} needs {needed}; a UNetMotionModel supports SEG(...) and PAG(...)")


def _choose(denoiser: Denoiser, available: Sequence[LayerInfo], spec: Spec) -> PlacedSpec:
    if isinstance(spec, CFG):
        return PlacedSpec(spec)
    if isinstance(spec, SAG):
        layers = select_layers(available, spec.layer)
        if len(layers) != 1:
            raise ValueError(f"SAG.layer={spec.layer!r} must name one layer, but it names {len(layers)}")
        return PlacedSpec(spec, tuple(layers))
    assert isinstance(spec, LayeredSpec)
    if not spec.layer_names:
        default = default_layers_of(denoiser.model, type(spec).__name__)[0]
        spec = replace(spec, layers=default)  # type: ignore[type-var]
    layers = select_layers(available, spec.layer_names)
    if isinstance(spec, BlockSpec):
        return PlacedSpec(spec, tuple(_blocks(denoiser, layers)))
    if not isinstance(spec, SEG):
        return PlacedSpec(spec, tuple(layers))
    sigmas = _layer_sigmas(available, spec, layers)
    for layer in layers:
        check_heads("SEG", sigmas[layer.module], layer.name, layer.heads)
    return PlacedSpec(spec, tuple(layers), sigmas)


def _blocks(denoiser: Denoiser, layers: Sequence[LayerInfo]) -> list[LayerInfo]:
    """Return one entry per transformer block, with the name of its first layer and the module name of the block.

    Raises:
        ValueError: If a layer is not in a transformer block whose arguments and outputs are known.
    """
    blocks: dict[int, LayerInfo] = {}
    for layer in layers:
        place = denoiser.places.of(layer.module)
        if denoiser.places.block(place) is None:
            raise ValueError(
                f"layer {layer.name} ({layer.module}) is not in a transformer block that can be skipped or shuffled; "
                f"choose other layers"
            )
        name = layer.name.split(".")[0]
        blocks.setdefault(place, replace(layer, name=name, module=denoiser.places.names[place]))
    return list(blocks.values())


def _layer_sigmas(available: Sequence[LayerInfo], spec: SEG, layers: Sequence[LayerInfo]) -> dict[str, Sigmas]:
    """Return the sigmas of each layer, from a mapping or the same for all layers."""
    given = cast("Sigmas | LayerSigmas", spec.sigma)
    if not isinstance(given, LayerSigmas):
        return dict.fromkeys((layer.module for layer in layers), given)
    names: dict[str, str] = {}
    sigmas: dict[str, Sigmas] = {}
    for name, value in given.items():
        for layer in select_layers(available, name):
            if layer.module in names:
                raise ValueError(f"SEG.sigma names layer {layer.name} twice, as {names[layer.module]!r} and {name!r}")
            names[layer.module], sigmas[layer.module] = name, value
    wanted = {layer.module: layer.name for layer in layers}
    for module, name in wanted.items():
        if module not in sigmas:
            raise ValueError(f"SEG.sigma has no entry for layer {name} of SEG.layers={spec.layers!r}, got {given!r}")
    for module, name in names.items():
        if module not in wanted:
            raise ValueError(f"SEG.sigma has an entry {name!r} for layers that are not in SEG.layers={spec.layers!r}")
    return sigmas


def check_layer(unet: nn.Module, layer: LayerInfo) -> None:
    """Raise a ValueError for a layer that is not standard self-attention over the image."""
    attention = unet.get_submodule(layer.module)
    assert isinstance(attention, Attention)
    if attention.is_cross_attention or attention.added_kv_proj_dim is not None:
        raise ValueError(
            f"layer {layer.name} ({layer.module}) does not attend to image tokens only; choose other layers"
        )
    names = layer.module.split(".")
    around = (unet.get_submodule(".".join(names[:count])) for count in range(1, len(names)))
    if any(type(module).__name__ == "SplitInferenceModule" for module in around):
        raise ValueError(
            f"layer {layer.name} ({layer.module}) processes the batch in pieces, in which branches cannot be "
            f"identified; call guide on the pipeline without enable_free_noise_split_inference"
        )
    processor = unwrap(attention.processor)
    if type(processor) not in STANDARD_PROCESSORS:
        raise ValueError(
            f"layer {layer.name} ({layer.module}) has a {name_of(type(processor))}, which is not standard "
            f"self-attention; supported are {', '.join(map(name_of, STANDARD_PROCESSORS))}. Choose other layers, or "
            f"set one of these"
        )

# SPDX-License-Identifier: Apache-2.0
"""One self-attention layer with blurred queries or identity attention: diffusers' steps around segkern's attention."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention

from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.projections import Projections
from segkern.integrations.diffusers.runtime.query_rows import EVERY_TOKEN, LayerRows, Stride
from segkern.integrations.specs.sigmas import Perturbed


def self_attention(
    attn: Attention,
    hidden_states: torch.Tensor,
    sigmas: tuple[Perturbed, ...],
    grid: Grid | None,
    *,
    attention_mask: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
    boundary: str = "reflect",
    backend: str = "auto",
    fused: bool = False,
    strides: tuple[Stride, ...] | None = None,
    blends: tuple[float, ...] | None = None,
    own: int | None = None,
    source: slice = slice(0, 0),
    values: torch.Tensor | None = None,
) -> torch.Tensor:
    """diffusers' standard self-attention, sample ``i`` with queries blurred by ``sigmas[i]``.

    Args:
        attn: the layer, its projections and norms.
        hidden_states: ``[batch, tokens, channels]``, or ``[batch, channels, height, width]``, which brings
            its grid.
        sigmas: one per sample, a number or one for each head; 0 is the plain layer; or identity attention.
        grid: where the image lies in the tokens.
        attention_mask: as diffusers passes it, an additive bias ``[batch or batch * heads, 1 or tokens,
            tokens]``.
        temb: conditioning of a ``spatial_norm``, if the layer has one.
        boundary: of the blur.
        backend: of the attention.
        fused: project with ``attn.to_qkv``.
        strides: one per sample, of its query rows over the grid; None computes every row. It says nothing where
            sigma is 0 or infinite, nor under a mask with rows of its own.
        blends: one per sample; less than 1 mixes the layer's output with that of the same sample's plain attention.
        own: the samples after so many have the hidden states of ``source``, once or several times, and share their
            projections; None where all have their own.
        source: samples before ``own``, of the plain layer.
        values: the sigmas, in a CPU tensor to be read when a graph runs; those of ``sigmas`` only say then which are
            0, infinite or neither. Not with strides.

    Returns:
        The layer's output in the shape of ``hidden_states``.

    Raises:
        ValueError: when the grid is missing or does not fit the tokens.
    """
    residual = hidden_states
    image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
    hidden_states = tokens_of(attn, hidden_states, temb)
    if image_shape is not None:
        grid = _same_grid(grid, Grid(image_shape[2], image_shape[3]))
    batch, tokens, _ = hidden_states.shape
    if grid is None:
        raise ValueError(
            f"a blur over {tokens} tokens needs their grid: give grid=Grid(height, width), or 4-dimensional "
            f"hidden states; it is never guessed"
        )
    grid.check(tokens)
    if attention_mask is not None:
        attention_mask = attn.prepare_attention_mask(attention_mask, tokens, batch)
        attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])

    strides = (EVERY_TOKEN,) * batch if strides is None else strides
    blends = (1.0,) * batch if blends is None else blends
    projections = Projections(attn, fused)
    layer = LayerRows(attn, grid, sigmas, strides, blends, attention_mask, boundary, backend, projections, values)
    output = layer.attend(hidden_states, batch if own is None else own, source)
    if image_shape is not None:
        output = output.transpose(1, 2).unflatten(2, image_shape[2:])
    if attn.residual_connection:
        output = output + residual
    return output if attn.rescale_output_factor == 1.0 else output / attn.rescale_output_factor


def tokens_of(attn: Attention, hidden_states: torch.Tensor, temb: torch.Tensor | None) -> torch.Tensor:
    """Tokens ``[batch, tokens, channels]`` as a layer projects them, after its norms."""
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    if hidden_states.ndim == 4:
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states


def _same_grid(given: Grid | None, actual: Grid) -> Grid:
    if given is not None and given != actual:
        raise ValueError(f"got {given} for hidden states of {actual.height} x {actual.width} tokens")
    return actual

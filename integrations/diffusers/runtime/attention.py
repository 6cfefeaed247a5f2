# SPDX-License-Identifier: Apache-2.0
"""One self-attention layer with blurred queries or identity attention: diffusers' steps with segkern's attention."""

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
    """Compute diffusers' standard self-attention, with the queries of sample ``i`` blurred by ``sigmas[i]``.

    Args:
        attn: The layer with its projections and norms.
        hidden_states: ``[batch, tokens, channels]``, or ``[batch, channels, height, width]``, which defines the grid.
        sigmas: One per sample: a number, one number per head, or identity attention. 0 leaves the layer unchanged.
        grid: Grid of the image in the tokens.
        attention_mask: Additive bias in the form that diffusers passes, ``[batch or batch * heads, 1 or tokens,
            tokens]``.
        temb: Conditioning of a ``spatial_norm``, if the layer has one.
        boundary: Boundary of the blur.
        backend: Backend of the attention.
        fused: Whether to project with ``attn.to_qkv``.
        strides: Query stride of each sample; None computes every row. Ignored if sigma is 0 or infinite, or if the mask
            has separate rows.
        blends: Share of the perturbed attention in each sample's output; below 1, the sample's own attention is mixed
            in.
        own: Number of samples with their own hidden states. The samples after them repeat the hidden states of
            ``source``, once or several times, and share their projections. None if all samples have their own hidden
            states.
        source: Unperturbed samples before ``own``.
        values: The sigmas in a CPU tensor that is read when a compiled graph runs. ``sigmas`` then specifies only
            which are 0, infinite or finite. Cannot be combined with strides.

    Returns:
        The layer's output in the shape of ``hidden_states``.

    Raises:
        ValueError: If the grid is missing or does not match the tokens.
    """
    residual = hidden_states
    image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
    hidden_states = tokens_of(attn, hidden_states, temb)
    if image_shape is not None:
        grid = _same_grid(grid, Grid(image_shape[2], image_shape[3]))
    batch, tokens, _ = hidden_states.shape
    if grid is None:
        raise ValueError(
            f"a blur over {tokens} tokens needs their grid, which is never guessed: pass grid=Grid(height, width) or "
            f"4-dimensional hidden states"
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
    """Return tokens ``[batch, tokens, channels]`` after the layer's norms, before its projections."""
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

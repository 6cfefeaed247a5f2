# SPDX-License-Identifier: Apache-2.0
"""One self-attention layer with blurred queries: diffusers' steps around segkern's attention.

At infinite sigma a perturbed sample has one query, the mean query, and because the projections are affine it
is the projection of the mean token. Such samples therefore spend no query projection, one row of attention
per head and one row of output projection, whose result every token shares; only their keys and values are
computed in full.

At a finite sigma with a query stride a perturbed sample has queries at a few points of its grid. Sampling the blurred
tokens there, and interpolating between them, are sums over tokens with weights that add up to 1, so both commute with
the affine projections: the query projection, the attention and the output projection see the points alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from segkern.api import coarse_error, coarse_outputs, coarse_queries, seg_attention
from segkern.blur import runs
from segkern.coarse import coarse_grid
from segkern.grid import Grid
from segkern.plans import takes_points

Stride = tuple[int, int]

EVERY_ROW: Stride = (1, 1)
_ONE_ROW: Stride = (0, 0)  # of a sample of infinite sigma


def self_attention(
    attn: Attention,
    hidden_states: torch.Tensor,
    sigmas: tuple[float, ...],
    grid: Grid | None,
    *,
    attention_mask: torch.Tensor | None = None,
    temb: torch.Tensor | None = None,
    boundary: str = "reflect",
    backend: str = "auto",
    fused: bool = False,
    strides: tuple[Stride, ...] | None = None,
    own: int | None = None,
    source: slice = slice(0, 0),
    values: torch.Tensor | None = None,
    probed: Sequence[tuple[slice, Sequence[Stride]]] = (),
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """diffusers' standard self-attention, sample ``i`` with queries blurred by ``sigmas[i]``.

    Args:
        attn: the layer, its projections and norms.
        hidden_states: ``[batch, tokens, channels]``, or ``[batch, channels, height, width]``, which brings
            its grid.
        sigmas: one per sample; 0 is the plain layer.
        grid: where the image lies in the tokens.
        attention_mask: as diffusers passes it, an additive bias ``[batch or batch * heads, 1 or tokens,
            tokens]``.
        temb: conditioning of a ``spatial_norm``, if the layer has one.
        boundary: of the blur.
        backend: of the attention.
        fused: project with ``attn.to_qkv``.
        strides: one per sample, of its query rows over the grid; None computes every row. It says nothing where
            sigma is 0 or infinite, nor under a mask with rows of its own.
        own: the samples after so many have the hidden states of ``source``, once or several times, and share their
            projections; None where all have their own.
        source: samples before ``own``.
        values: the sigmas, in a CPU tensor to be read when a graph runs; those of ``sigmas`` only say then which are
            0, infinite or neither. Not with strides.
        probed: samples of finite sigma, and the strides whose error to estimate there.

    Returns:
        The layer's output in the shape of ``hidden_states``; and for each of ``probed`` the estimates
        :func:`segkern.coarse_error`, ``[strides, samples]``, infinite under a mask with rows of its own.

    Raises:
        ValueError: when the grid is missing or does not fit the tokens.
    """
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    image_shape = hidden_states.shape if hidden_states.ndim == 4 else None
    if image_shape is not None:
        grid = _same_grid(grid, Grid(image_shape[2], image_shape[3]))
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
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
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

    layer = _Layer(attn, grid, boundary, backend, fused, values)
    ways = layer.ways(sigmas, strides, attention_mask)
    errors: tuple[torch.Tensor, ...] = ()
    own = batch if own is None else own
    few_rows = any(way != EVERY_ROW for way in ways)
    alone = layer.projects_rows(tokens, attention_mask) if few_rows else layer.projects_parts()
    if not probed and alone and (few_rows or own < batch):
        output = layer.attend_by_kind(hidden_states, sigmas, ways, attention_mask, own, source)
    else:
        qkv = layer.project(hidden_states)
        output = layer.project_out(layer.attend_by_stride(qkv, sigmas, ways, attention_mask))
        errors = tuple(layer.estimate(qkv, sigmas, attention_mask, *each) for each in probed)

    if image_shape is not None:
        output = output.transpose(1, 2).unflatten(2, image_shape[2:])
    if attn.residual_connection:
        output = output + residual
    return (output if attn.rescale_output_factor == 1.0 else output / attn.rescale_output_factor), errors


def _same_grid(given: Grid | None, actual: Grid) -> Grid:
    if given is not None and given != actual:
        raise ValueError(f"got {given} for hidden states of {actual.height} x {actual.width} tokens")
    return actual


class _Layer:
    """The steps of one layer between its norms and its residual; made anew for every call."""

    def __init__(
        self, attn: Attention, grid: Grid, boundary: str, backend: str, fused: bool, values: torch.Tensor | None
    ) -> None:
        self.values = values
        self.attn = attn
        self.grid = grid
        self.boundary = boundary
        self.backend = backend
        self.fused = fused

    def ways(
        self, sigmas: tuple[float, ...], strides: tuple[Stride, ...] | None, attention_mask: torch.Tensor | None
    ) -> tuple[Stride, ...]:
        """Which query rows each sample needs: one, those of a stride, or every one."""
        if attention_mask is not None and attention_mask.shape[2] != 1:
            return (EVERY_ROW,) * len(sigmas)
        return tuple(
            self._way(sigma, EVERY_ROW if strides is None else strides[sample]) for sample, sigma in enumerate(sigmas)
        )

    def _way(self, sigma: float, stride: Stride) -> Stride:
        if sigma == math.inf:
            return _ONE_ROW
        if sigma == 0.0 or stride == EVERY_ROW:
            return EVERY_ROW
        coarse = coarse_grid(self.grid, stride, self.boundary)
        return EVERY_ROW if coarse.tokens == self.grid.tokens else stride

    def projects_rows(self, tokens: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether queries at weighted means of tokens are the query projection of those means.

        The mean of the whole image is one, the points of a coarse grid are others.
        """
        affine = self.attn.norm_q is None and self.projects_parts()
        one_row_mask = attention_mask is None or attention_mask.shape[2] == 1
        return affine and one_row_mask and self.grid.start == 0 and self.grid.tokens == tokens

    def projects_parts(self) -> bool:
        """Whether queries can be projected without keys and values."""
        return not self.fused or _is_plain_linear(self.attn.to_qkv)

    def attend_by_kind(
        self,
        hidden_states: torch.Tensor,
        sigmas: tuple[float, ...],
        ways: tuple[Stride, ...],
        attention_mask: torch.Tensor | None,
        own: int,
        source: slice,
    ) -> torch.Tensor:
        """Output ``[batch, tokens, channels]`` of samples some of which need few query rows, projected alone.

        Samples after ``own`` repeat ``source``: they are read there.
        """
        key, value = self.project_key_value(hidden_states[:own])
        length = max(1, source.stop - source.start)
        repeats = [(slice(i, i + length), ways[i]) for i in range(own, len(ways), length)]
        shared = key[:0]
        outputs = []
        for samples, way in [*runs(ways[:own]), *repeats]:
            where = source if samples.start >= own else samples
            tokens, known = hidden_states[where], sigmas[samples]
            some: tuple[float, ...] | torch.Tensor = known
            mask = None if attention_mask is None else attention_mask[samples]
            grid = self.grid
            if way == EVERY_ROW:
                some = self.sigmas(sigmas, samples)
            if way == EVERY_ROW and where is samples:
                queries = self.project_query(tokens)
                if samples.start <= source.start and source.stop <= samples.stop:
                    shared = queries[source.start - samples.start : source.stop - samples.start]
            elif way == EVERY_ROW:
                queries = shared  # the source is a plain sample, whose queries are all there
            elif way == _ONE_ROW:  # one query row is its own mean; saying so chooses the kernel for few rows
                queries, grid = self.project_query(_mean_token(tokens)), Grid(1, 1)
            else:
                rows = coarse_queries(tokens[:, None], self.grid, known, way, self.boundary)[:, 0]
                queries, some, grid = self.project_query(rows), (0.0,) * len(known), Grid(1, 1)
            output = self.project_out(self.attend((queries, key[where], value[where]), some, mask, grid))
            if way == _ONE_ROW:
                output = output.expand(-1, tokens.shape[1], -1)
            elif way != EVERY_ROW:
                output = coarse_outputs(output[:, None], self.grid, way, self.boundary)[:, 0]
            outputs.append(output)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def attend_by_stride(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sigmas: tuple[float, ...],
        ways: tuple[Stride, ...],
        attention_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention output ``[batch, heads, tokens, head_dim]`` where every query is projected already."""
        strides = runs([EVERY_ROW if way == _ONE_ROW else way for way in ways])
        outputs = []
        for samples, stride in strides:
            query, key, value = (x[samples] for x in qkv) if len(strides) > 1 else qkv
            mask = None if attention_mask is None else attention_mask[samples]
            some = self.sigmas(sigmas, samples)
            outputs.append(self.attend((query, key, value), some, mask, query_stride=stride))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def sigmas(self, known: tuple[float, ...], samples: slice) -> tuple[float, ...] | torch.Tensor:
        """Of some samples: numbers, or the tensor's where it has any to tell."""
        some = known[samples]
        return some if self.values is None or not any(map(takes_points, some)) else self.values[samples]

    def estimate(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sigmas: tuple[float, ...],
        attention_mask: torch.Tensor | None,
        samples: slice,
        strides: Sequence[Stride],
    ) -> torch.Tensor:
        """The error of each stride for some samples, ``[strides, samples]``."""
        query, key, value = (x[samples] for x in qkv)
        mask = None if attention_mask is None else attention_mask[samples]
        if mask is not None and mask.shape[2] != 1:
            return query.new_full((len(strides), query.shape[0]), math.inf, dtype=torch.float32)
        options = {"scale": self.attn.scale, "attn_mask": mask, "boundary": self.boundary}
        return torch.stack(
            [coarse_error(query, key, value, self.grid, sigmas[samples], stride, **options) for stride in strides]
        )

    def attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        sigmas: tuple[float, ...] | torch.Tensor,
        attention_mask: torch.Tensor | None,
        grid: Grid | None = None,
        query_stride: Stride = EVERY_ROW,
    ) -> torch.Tensor:
        """Attention output ``[samples, heads, rows, head_dim]`` of projected queries, keys and values."""
        output = seg_attention(
            *qkv,
            grid or self.grid,
            sigmas,
            scale=self.attn.scale,
            attn_mask=attention_mask,
            boundary=self.boundary,
            query_stride=query_stride,
            backend=self.backend,
        )
        assert isinstance(output, torch.Tensor)
        return output

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.fused:
            return self.project_query(x), *self.project_key_value(x)
        query, key, value = self.attn.to_qkv(x).chunk(3, dim=-1)
        return self._query_heads(query), *self._key_value_heads(key, value)

    def project_query(self, x: torch.Tensor) -> torch.Tensor:
        return self._query_heads(_thirds(self.attn.to_qkv, x, 0, 1) if self.fused else self.attn.to_q(x))

    def project_key_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.fused:
            key, value = _thirds(self.attn.to_qkv, x, 1, 3).chunk(2, dim=-1)
        else:
            key, value = self.attn.to_k(x), self.attn.to_v(x)
        return self._key_value_heads(key, value)

    def project_out(self, x: torch.Tensor) -> torch.Tensor:
        """``[samples, heads, rows, head_dim]`` to ``[samples, rows, channels]``."""
        linear, dropout = self.attn.to_out[0], self.attn.to_out[1]
        return dropout(linear(x.transpose(1, 2).flatten(2)))

    def _query_heads(self, query: torch.Tensor) -> torch.Tensor:
        query = self._split_heads(query)
        return query if self.attn.norm_q is None else self.attn.norm_q(query)

    def _key_value_heads(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = self._split_heads(key)
        return key if self.attn.norm_k is None else self.attn.norm_k(key), self._split_heads(value)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """``[samples, rows, heads * head_dim]`` to ``[samples, heads, rows, head_dim]``, a view."""
        return x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)


def _mean_token(x: torch.Tensor) -> torch.Tensor:
    """``[samples, tokens, channels]`` to ``[samples, 1, channels]``; sums in float32 at least."""
    return x.mean(dim=1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


def _is_plain_linear(linear: nn.Module) -> bool:
    """Whether it is ``F.linear`` on its weight and nothing else, so that rows can be used alone."""
    return type(linear) is nn.Linear and "forward" not in vars(linear) and not linear._forward_hooks


def _thirds(linear: nn.Linear, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """The outputs of ``linear(x)`` from third ``first`` up to third ``last``; the others are not computed."""
    third = linear.out_features // 3
    rows = slice(first * third, last * third)
    return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])

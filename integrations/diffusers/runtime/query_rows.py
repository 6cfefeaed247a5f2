# SPDX-License-Identifier: Apache-2.0
"""Self-attention that computes only the query rows that each sample needs.

With infinite sigma, a perturbed sample has a single query, the mean query. If the projections are affine, the mean
query is the projection of the mean token. Such samples need no query projection, one row of attention per head and one
row of the output projection, whose result all tokens share. Only their keys and values are computed in full. If the
query projection is not known to be affine, the mean is computed from all queries; if the output projection is not known
to be affine, it is computed for every token.

With a finite sigma and a query stride, a perturbed sample has queries at a few points of its grid. Sampling the blurred
tokens and interpolating between points are weighted sums of tokens with weights that sum to 1, so both commute with
affine projections: the query projection, the attention and the output projection are computed only at the points. If a
projection is not known to be affine, only the attention is computed at the points.

With identity attention, the output of a sample is its values, so it needs no query or key projection and no attention.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from diffusers.models.attention_processor import Attention

from segkern.api import seg_attention
from segkern.core.coarse_queries import coarse_grid
from segkern.core.sigmas import equal_runs, is_finite_blur
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.projections import Projections
from segkern.integrations.specs.sigmas import Perturbation, Perturbed
from segkern.ops.coarse import coarse_outputs, coarse_queries

Stride = tuple[int, int]

EVERY_TOKEN: Stride = (1, 1)


class Rows(Enum):
    """Query rows that a sample needs, other than the points of a stride."""

    EVERY = "one for each token"
    ONE = "the mean query's, of infinite sigma"
    NONE = "no queries, of identity attention"


def is_finite(sigma: Perturbed) -> bool:
    """Return True for a single finite sigma greater than 0."""
    return isinstance(sigma, float) and is_finite_blur(sigma)


class _Inputs:
    """Projections of a layer's samples, computed on demand and kept for samples that share them.

    Args:
        projections: Projections of the layer.
        hidden_states: Hidden states of the samples that do not share those of another sample.
        keys: For each of these samples, whether it needs keys.
    """

    def __init__(self, projections: Projections, hidden_states: torch.Tensor, keys: Sequence[bool]) -> None:
        self._projections = projections
        self.hidden_states = hidden_states
        self._queries: list[tuple[slice, torch.Tensor]] = []
        if all(keys):
            key, self._values = projections.key_value(hidden_states)
            self._keys = [(slice(0, len(keys)), key)]
        else:
            self._values = projections.value(hidden_states)
            self._keys = [(some, projections.key(hidden_states[some])) for some, needed in equal_runs(keys) if needed]

    def query(self, samples: slice) -> torch.Tensor:
        """Return all queries of some samples."""
        query = _within(self._queries, samples)
        if query is None:
            query = self._projections.query(self.hidden_states[samples])
            self._queries.append((samples, query))
        return query

    def key(self, samples: slice) -> torch.Tensor:
        """Return the keys of samples that need them."""
        key = _within(self._keys, samples)
        assert key is not None
        return key

    def value(self, samples: slice) -> torch.Tensor:
        """Return the values of some samples."""
        return self._values[samples]


def _within(known: Sequence[tuple[slice, torch.Tensor]], samples: slice) -> torch.Tensor | None:
    """Return some samples from the first known range that contains them."""
    for run, x in known:
        if run.start <= samples.start and samples.stop <= run.stop:
            return x[samples.start - run.start : samples.stop - run.start]
    return None


def _shift(samples: slice, by: int) -> slice:
    return slice(samples.start + by, samples.stop + by)


@dataclass
class LayerRows:
    """The computation of one layer between its norms and its residual, for one call.

    Args:
        attn: The layer.
        grid: Grid of the image in the layer's tokens.
        sigmas: One per sample.
        strides: Query stride of each sample.
        blends: Share of the perturbed attention in each sample's output.
        mask: Additive mask ``[batch, heads, 1 or tokens, tokens]``.
        boundary: Boundary of the blur.
        backend: Backend of the attention.
        projections: Projections of the layer.
        values: The sigmas in a CPU tensor that a compiled graph reads when it runs, or None.
    """

    attn: Attention
    grid: Grid
    sigmas: tuple[Perturbed, ...]
    strides: tuple[Stride, ...]
    blends: tuple[float, ...]
    mask: torch.Tensor | None
    boundary: str
    backend: str
    projections: Projections
    values: torch.Tensor | None

    def attend(self, hidden_states: torch.Tensor, own: int, source: slice) -> torch.Tensor:
        """Return the output ``[batch, tokens, channels]``. Samples after ``own`` repeat ``source``."""
        rows = [self._rows_of(sigma, stride) for sigma, stride in zip(self.sigmas, self.strides, strict=True)]
        few_rows = any(needed not in (Rows.EVERY, Rows.NONE) for needed in rows)
        apart = self.projections.apart and (not few_rows or self._projects_means(hidden_states.shape[1]))
        if apart and (few_rows or own < len(rows) or Rows.NONE in rows):
            return self._attend_apart(hidden_states, rows, own, source)
        return self.projections.out(self._attend_projected(self.projections.all(hidden_states), rows))

    def _rows_of(self, sigma: Perturbed, stride: Stride) -> Rows | Stride:
        if sigma is Perturbation.IDENTITY:
            return Rows.NONE
        if self.mask is not None and self.mask.shape[2] != 1:
            return Rows.EVERY
        if sigma == math.inf:
            return Rows.ONE
        if stride == EVERY_TOKEN or not is_finite(sigma):
            return Rows.EVERY
        points = coarse_grid(self.grid, stride, self.boundary)
        return Rows.EVERY if points.tokens == self.grid.tokens else stride

    def _projects_means(self, tokens: int) -> bool:
        """Return True if queries at weighted means of tokens are the query projections of those means.

        This covers the mean of the whole image and the points of a coarse grid.
        """
        one_row_mask = self.mask is None or self.mask.shape[2] == 1
        return self.attn.norm_q is None and one_row_mask and self.grid.start == 0 and self.grid.tokens == tokens

    def _attend_apart(
        self, hidden_states: torch.Tensor, rows: list[Rows | Stride], own: int, source: slice
    ) -> torch.Tensor:
        """Return the output if some samples need few query rows, with separate projections for each kind."""
        kinds = list(zip(rows, self.blends, strict=True))
        keys = [needed is not Rows.NONE or blend != 1.0 for needed, blend in kinds[:own]]
        inputs = _Inputs(self.projections, hidden_states[:own], keys)
        # Ranges of samples of the same kind, and the positions of their inputs.
        alike = [(samples, samples, kind) for samples, kind in equal_runs(kinds[:own])]
        for first in range(own, len(rows), max(1, source.stop - source.start)):
            branch = kinds[first : first + source.stop - source.start]
            alike += [(_shift(some, first), _shift(some, source.start), kind) for some, kind in equal_runs(branch)]
        plain: list[tuple[slice, torch.Tensor]] = []  # outputs of unperturbed samples, which repeats may be mixed with
        outputs = []
        for samples, where, (needed, blend) in alike:
            output = self._attend_rows(needed, inputs, where, samples)
            if samples.start < own and needed is Rows.EVERY and blend == 1.0:
                plain.append((samples, output))
            if blend != 1.0:
                unblurred = _within(plain, where) if samples.start >= own else None
                if unblurred is None:
                    qkv = inputs.query(where), inputs.key(where), inputs.value(where)
                    unblurred = self.projections.out(self._attend(qkv, samples, (0.0,) * len(output)))
                output = torch.lerp(unblurred, output, blend)
            outputs.append(output)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _attend_rows(self, rows: Rows | Stride, inputs: _Inputs, where: slice, samples: slice) -> torch.Tensor:
        """Return the output of one range of samples whose inputs are at ``where``, with single rows expanded."""
        if rows is Rows.NONE:
            return self.projections.out(inputs.value(where))
        if rows is Rows.ONE:
            return self._attend_mean(inputs, where, samples)
        key, value = inputs.key(where), inputs.value(where)
        if rows is Rows.EVERY:
            return self.projections.out(self._attend((inputs.query(where), key, value), samples, self._sigmas(samples)))
        some: Any = self.sigmas[samples]
        assert isinstance(rows, tuple)
        if not (self.projections.query_is_affine and self.projections.out_is_affine):
            qkv = inputs.query(where), key, value
            return self.projections.out(self._attend(qkv, samples, some, query_stride=rows))
        points = coarse_queries(inputs.hidden_states[where][:, None], self.grid, some, rows, self.boundary)[:, 0]
        qkv = self.projections.query(points), key, value
        output = self.projections.out(self._attend(qkv, samples, (0.0,) * len(some), Grid(1, 1)))
        return coarse_outputs(output[:, None], self.grid, rows, self.boundary)[:, 0]

    def _attend_mean(self, inputs: _Inputs, where: slice, samples: slice) -> torch.Tensor:
        """Return the output of samples that use only the mean query, expanded to every token."""
        tokens = inputs.hidden_states[where]
        if self.projections.query_is_affine:
            query = self.projections.query(_mean(tokens, 1))
        else:
            query = _mean(inputs.query(where), 2)
        # A single query row is its own mean. A 1 x 1 grid selects the kernel for few rows.
        output = self._attend(
            (query, inputs.key(where), inputs.value(where)), samples, self.sigmas[samples], Grid(1, 1)
        )
        if self.projections.out_is_affine:
            return self.projections.out(output).expand(-1, tokens.shape[1], -1)
        return self.projections.out(output.expand(-1, -1, tokens.shape[1], -1))

    def _attend_projected(
        self, qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rows: list[Rows | Stride]
    ) -> torch.Tensor:
        """Return attention output ``[batch, heads, tokens, head_dim]`` if all queries are already projected."""
        kinds = equal_runs([(Rows.EVERY if r is Rows.ONE else r, b) for r, b in zip(rows, self.blends, strict=True)])
        outputs = []
        for samples, (needed, blend) in kinds:
            query, key, value = (x[samples] for x in qkv) if len(kinds) > 1 else qkv
            if needed is Rows.NONE:
                output = value
            else:
                stride = needed if isinstance(needed, tuple) else EVERY_TOKEN
                output = self._attend((query, key, value), samples, self._sigmas(samples), query_stride=stride)
            if blend != 1.0:
                unblurred = self._attend((query, key, value), samples, (0.0,) * query.shape[0])
                output = torch.lerp(unblurred, output, blend)
            outputs.append(output)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _sigmas(self, samples: slice) -> Any:
        """Return the sigmas of some samples, as a tensor if there is one and any sigma is finite."""
        some = self.sigmas[samples]
        return some if self.values is None or not any(map(is_finite, some)) else self.values[samples]

    def _attend(
        self,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        samples: slice,
        sigmas: Any,
        grid: Grid | None = None,
        query_stride: Stride = EVERY_TOKEN,
    ) -> torch.Tensor:
        """Return attention output ``[samples, heads, rows, head_dim]`` for projected queries, keys and values."""
        output = seg_attention(
            *qkv,
            grid or self.grid,
            sigmas,
            scale=self.attn.scale,
            attn_mask=None if self.mask is None else self.mask[samples],
            boundary=self.boundary,
            query_stride=query_stride,
            backend=self.backend,
        )
        assert isinstance(output, torch.Tensor)
        return output


def _mean(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the mean over a dimension of tokens, which is kept. Sums are computed in at least float32."""
    return x.mean(dim=dim, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)

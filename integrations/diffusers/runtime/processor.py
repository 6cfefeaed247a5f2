# SPDX-License-Identifier: Apache-2.0
"""Attention processors: the one users set on a layer themselves, and the one that ``guide`` sets for them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)

from segkern.api import attention_mass
from segkern.core.coarse_queries import check_query_stride
from segkern.core.dispatch import check_backend
from segkern.core.gaussian import check_boundary
from segkern.core.sigmas import check_sigma
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.attention import self_attention, tokens_of
from segkern.integrations.diffusers.runtime.hooks import acts_here
from segkern.integrations.diffusers.runtime.plans import LayerPlan
from segkern.integrations.diffusers.runtime.projections import Projections

STANDARD_PROCESSORS = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    XFormersAttnProcessor,
    SlicedAttnProcessor,
)


class SEGAttnProcessor:
    """Self-attention with Gaussian-blurred queries, for ``attn.set_processor``.

    Takes the place of diffusers' standard processor on a self-attention layer and does its steps: norms,
    mask, fused projections, output projection, residual. ``guide`` sets processors by itself; this one is for
    other uses.

    Args:
        sigma: standard deviation in tokens, one number or one per sample of the batch the layer will see. The
            official layout under classifier-free guidance, [unconditional, conditional, perturbed], is
            ``(0, 0, sigma)`` for one image.
        grid: where the image lies in the layer's tokens. Not needed when the layer gets 4-dimensional hidden
            states.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        query_stride: 1 computes every query row; with more, or a pair for height and width, samples of finite
            sigma are computed at points so many tokens apart at most; see :func:`segkern.seg_attention`. Their
            query and output projections see the points alone.

    Raises:
        ValueError: when an argument does not fit, and, when the layer runs, for a missing or wrong grid, a
            number of sigmas that is not the batch, or a cross-attention layer.

    Source: SEG (arXiv 2408.00760), Proposition 3.1: blurring queries is blurring logits.

    Example:
        >>> from diffusers.models.attention_processor import Attention
        >>> attn = Attention(query_dim=32, heads=2, dim_head=16)
        >>> attn.set_processor(SEGAttnProcessor(sigma=(0, 0, 4.0), grid=Grid(6, 9)))
        >>> attn(torch.randn(3, 54, 32)).shape
        torch.Size([3, 54, 32])
    """

    def __init__(
        self,
        sigma: float | Sequence[float],
        grid: Grid | None = None,
        boundary: str = "reflect",
        backend: str = "auto",
        query_stride: int | tuple[int, int] = 1,
    ) -> None:
        count = len(sigma) if isinstance(sigma, (list, tuple)) else None
        checked = check_sigma(sigma, 1 if count is None else count)
        if grid is not None and not isinstance(grid, Grid):
            raise ValueError(f"grid must be a segkern.Grid(height, width) or None, got {grid!r}")
        check_boundary(boundary)
        check_backend(backend)
        self.sigma: float | tuple[float, ...] = checked[0] if count is None else checked
        self.grid = grid
        self.boundary = boundary
        self.backend = backend
        self.query_stride = check_query_stride(query_stride)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None:
            raise ValueError(
                f"SEGAttnProcessor blurs the queries of self-attention; this layer attends to "
                f"encoder_hidden_states of shape {tuple(encoder_hidden_states.shape)}"
            )
        sigmas = check_sigma(self.sigma, hidden_states.shape[0])
        return self_attention(
            attn,
            hidden_states,
            sigmas,
            self.grid,
            attention_mask=attention_mask,
            temb=temb,
            boundary=self.boundary,
            backend=self.backend,
            fused=attn.fused_projections,
            strides=(self.query_stride,) * len(sigmas),
        )


class GuidedProcessor:
    """Stands in for a layer's own processor while it is guided; an inactive forward runs that very processor.

    ``guide`` gives it a plan before each forward of the denoiser; nothing is counted in here, so that a compiled
    denoiser need not be compiled again from step to step.

    Attributes:
        original: the processor it stands in for.
        plan: of the forward under way; None while no guidance acts.
        grid: of the layer's tokens in this forward.
        sizes: a tensor whose shape are the grid's numbers, where a whole denoiser may be compiled; else None.
        mass: after a forward, that of the samples to read, ``[samples, heads, tokens]``.
        moved: after a forward, for each branch that is perturbed here, the norms ``[2, samples]`` of the difference
            between its output and the conditional one, and of the conditional one.
    """

    def __init__(self, original: Any = None, boundary: str = "reflect", backend: str = "auto") -> None:
        # Without an original when diffusers, loading an IP-Adapter, renews every processor by its class.
        self.original = AttnProcessor2_0() if original is None else original
        self.boundary = boundary
        self.backend = backend
        self.fused = isinstance(self.original, FusedAttnProcessor2_0)
        self.plan: LayerPlan | None = None
        self.grid: Grid | None = None
        self.sizes: torch.Tensor | None = None
        self.mass: torch.Tensor | None = None
        self.moved: tuple[torch.Tensor, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of the layer is a layer of its own, without guidance, wherever it is loaded."""
        return operator.itemgetter(0), ((self.original,),)

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        plan = self.plan if acts_here() else None
        if plan is not None and plan.read is not None:
            self.mass = self._mass(attn, hidden_states, attention_mask, temb, plan.read)
        if plan is None or not plan.acts:
            known = {} if temb is None else {"temb": temb}
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                attention_mask=attention_mask,
                **known,
            )
        sigmas, values = plan.told_sigmas()
        output = self_attention(
            attn,
            hidden_states,
            sigmas,
            self.told_grid(),
            values=values,
            attention_mask=attention_mask,
            temb=temb,
            boundary=self.boundary,
            backend=self.backend,
            fused=self.fused,
            strides=plan.strides,
            blends=plan.blends,
            own=plan.own,
            source=plan.conditional,
        )
        self.measure(output, plan)
        return output

    def told_grid(self) -> Grid | None:
        """The grid; in a graph that is being compiled from a tensor's shape, which may change, unlike numbers."""
        if torch.compiler.is_compiling() and self.sizes is not None:
            height, width, start, frames = self.sizes.shape
            return Grid(height, width, start, frames)
        return self.grid

    def measure(self, output: torch.Tensor, plan: LayerPlan) -> None:
        """Keep how far the perturbed samples of the layer's output are from the conditional ones."""
        conditional = output[plan.conditional]
        reference = norms(conditional)
        self.moved = tuple(torch.stack([norms(output[p] - conditional), reference]) for p in plan.perturbed)

    def _mass(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        temb: torch.Tensor | None,
        samples: slice,
    ) -> torch.Tensor:
        """The attention that each token receives, from queries and keys made for it."""
        if attention_mask is not None:
            raise ValueError(
                f"SAG needs a layer without attention mask, got one of shape {tuple(attention_mask.shape)}"
            )
        tokens = tokens_of(attn, hidden_states[samples], None if temb is None else temb[samples])
        query, key = Projections(attn, self.fused).query_key(tokens)
        return attention_mass(query.detach(), key.detach(), scale=attn.scale, backend=self.backend)


def norms(x: torch.Tensor) -> torch.Tensor:
    """The L2 norm of each sample, ``[samples]``, in float32 at least; no gradient, since reports are kept."""
    dims = tuple(range(1, x.ndim))
    return torch.linalg.vector_norm(x.detach(), dim=dims, dtype=torch.promote_types(x.dtype, torch.float32))


def unwrap(processor: Any) -> Any:
    """The processor itself, or the one that guidances stand in for."""
    while isinstance(processor, GuidedProcessor):
        processor = processor.original
    return processor

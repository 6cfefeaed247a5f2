# SPDX-License-Identifier: Apache-2.0
"""Attention processors: the public ``SEGAttnProcessor``, and the processor that ``guide`` sets."""

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

    Replaces the standard diffusers processor of a self-attention layer and performs the same steps: norms, mask, fused
    projections, output projection, residual. ``guide`` sets its own processors; this one is for other uses.

    Args:
        sigma: Standard deviation of the blur in tokens: one number, or one per sample of the layer's batch. For one
            image in the official layout under classifier-free guidance, [unconditional, conditional, perturbed], it is
            ``(0, 0, sigma)``.
        grid: Grid of the image in the layer's tokens. Not needed if the hidden states have 4 dimensions.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.
        query_stride: 1 computes every query row. With a larger number, or a pair for height and width, samples with a
            finite sigma are computed at points at most this many tokens apart, and so are their query and output
            projections; see :func:`segkern.seg_attention`.

    Raises:
        ValueError: If an argument is invalid. When the layer runs: if the grid is missing or wrong, if the number of
            sigmas is not the batch size, or if the layer is a cross-attention layer.

    Source: SEG (arXiv 2408.00760), Proposition 3.1: blurring queries is equivalent to blurring logits.

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
                f"SEGAttnProcessor supports only self-attention, but this layer attends to encoder_hidden_states of "
                f"shape {tuple(encoder_hidden_states.shape)}"
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
    """Replaces a layer's processor while the layer is guided. Unguided denoiser calls run the original processor.

    ``guide`` sets a plan before each denoiser call. The processor keeps no counters, so a compiled denoiser is not
    recompiled from step to step.

    Attributes:
        original: The replaced processor.
        plan: Plan of the current denoiser call; None if guidance is inactive.
        grid: Grid of the layer's tokens in this call.
        sizes: A tensor whose shape holds the grid's numbers, if the whole denoiser may be compiled; otherwise None.
        mass: After a call: the attention mass of the samples to read, ``[samples, heads, tokens]``.
        moved: After a call, for each branch that is perturbed here: the norms ``[2, samples]`` of the difference
            between its output and the conditional output, and of the conditional output.
    """

    def __init__(self, original: Any = None, boundary: str = "reflect", backend: str = "auto") -> None:
        # There is no original if diffusers recreates every processor from its class to load an IP-Adapter.
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
        """Replace this object by the original processor in copies, so that a copied layer is not guided."""
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
        """Return the grid. While compiling, read it from a tensor's shape: unlike numbers, shapes may vary."""
        if torch.compiler.is_compiling() and self.sizes is not None:
            height, width, start, frames = self.sizes.shape
            return Grid(height, width, start, frames)
        return self.grid

    def measure(self, output: torch.Tensor, plan: LayerPlan) -> None:
        """Store how far the perturbed samples of the layer's output are from the conditional samples."""
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
        """Return the attention that each token receives, from additional query and key projections."""
        if attention_mask is not None:
            raise ValueError(
                f"SAG needs a layer without an attention mask, got one of shape {tuple(attention_mask.shape)}"
            )
        tokens = tokens_of(attn, hidden_states[samples], None if temb is None else temb[samples])
        query, key = Projections(attn, self.fused).query_key(tokens)
        return attention_mass(query.detach(), key.detach(), scale=attn.scale, backend=self.backend)


def norms(x: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each sample, ``[samples]``, in at least float32, detached because reports are kept."""
    dims = tuple(range(1, x.ndim))
    return torch.linalg.vector_norm(x.detach(), dim=dims, dtype=torch.promote_types(x.dtype, torch.float32))


def unwrap(processor: Any) -> Any:
    """Return the processor, or the original processor if guidance has replaced it."""
    while isinstance(processor, GuidedProcessor):
        processor = processor.original
    return processor

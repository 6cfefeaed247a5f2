# SPDX-License-Identifier: Apache-2.0
"""Perturbed attention at the point where a model calls attention.

Transformers process queries and keys differently (norms, rotary embeddings, text in the same sequence), but all of them
pass three tensors to ``torch.nn.functional.scaled_dot_product_attention``, also through diffusers' dispatch. The
queries are final at this point, so segkern blurs them in this call.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
    XFormersJointAttnProcessor,
)
from torch.overrides import TorchFunctionMode

from segkern.api import seg_attention
from segkern.core.private_apis import pytorch_attention
from segkern.core.sigmas import equal_runs
from segkern.grid import Grid
from segkern.integrations.diffusers.runtime.hooks import acts_here
from segkern.integrations.diffusers.runtime.origins import name_of
from segkern.integrations.diffusers.runtime.processor import GuidedProcessor
from segkern.integrations.specs.sigmas import Perturbation

_PYTORCHS = pytorch_attention()

# Processors that do not call PyTorch's attention, and processors with the same steps that do.
_CALLING_PYTORCHS: dict[type, type] = {
    AttnProcessor: AttnProcessor2_0,
    SlicedAttnProcessor: AttnProcessor2_0,
    XFormersAttnProcessor: AttnProcessor2_0,
    XFormersJointAttnProcessor: JointAttnProcessor2_0,
}


class InterceptingProcessor(GuidedProcessor):
    """Replaces any processor of a self-attention layer: runs the processor and replaces the attention that it calls.

    :func:`intercepting` creates the class of an instance. Its ``__call__`` has the signature of the original's, because
    models pass a processor only the arguments in its signature.
    """

    def __init__(self, original: Any, boundary: str = "reflect", backend: str = "auto") -> None:
        super().__init__(original, boundary, backend)
        calling = _CALLING_PYTORCHS.get(type(original))
        self._runs = original if calling is None else calling()

    def run(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the original processor's output, with perturbed attention for perturbed samples."""
        plan = self.plan if acts_here() else None
        if plan is None or not plan.acts:
            return self.original(attn, *args, **kwargs)
        if self._runs is not self.original:
            self._check_steps(attn)
        meeting = _Meeting(self)
        with meeting:
            output = self._runs(attn, *args, **kwargs)
        if not meeting.met:
            raise RuntimeError(self._missed())
        self.measure(output[0] if isinstance(output, tuple) else output, plan)
        return output

    def _check_steps(self, attn: Any) -> None:
        """Raise a ValueError if the processor to run performs other steps than the original."""
        norms = type(self._runs) is AttnProcessor2_0 and (attn.norm_q is not None or attn.norm_k is not None)
        if norms or not attn.scale_qk:
            what = "without norms of queries and keys" if norms else "with its own scale"
            raise ValueError(
                f"guide does not support a layer with a {name_of(type(self.original))}, which computes attention "
                f"{what} and does not call PyTorch's attention; set the model's own processors"
            )

    def _missed(self) -> str:
        """Return the message for an attention call that was not intercepted."""
        missed = f"guide could not intercept the attention of a layer with a {name_of(type(self.original))}: "
        function = F.scaled_dot_product_attention
        if function is not _PYTORCHS:
            name = name_of(function)
            return (
                f"{missed}torch.nn.functional.scaled_dot_product_attention was replaced by {name}, in which guidance "
                f"cannot act; restore PyTorch's function before the run, or choose the kernel with the model's "
                f"set_attention_backend, which guidance bypasses"
            )
        return (
            f"{missed}it must call torch.nn.functional.scaled_dot_product_attention on [batch, heads, tokens, "
            f"head_dim] with the image's {self.grid} in its tokens; set the model's own processors"
        )

    def attend(
        self,
        meeting: _Meeting,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Return the result of ``scaled_dot_product_attention``, with perturbed attention for perturbed samples."""
        plan, grid = self.plan, self.told_grid()
        assert plan is not None
        assert grid is not None
        if (
            query.ndim != 4
            or key.shape[2] != query.shape[2]
            or query.shape[0] != len(plan.sigmas)
            or query.shape[2] < max(plan.starts, default=grid.start) + grid.tokens
            or is_causal
        ):
            return _PYTORCHS(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if meeting.met:
            raise RuntimeError(
                f"{name_of(type(self.original))} calls attention twice on the image's tokens, and guide cannot "
                f"determine which call is self-attention; set a processor that calls it once, or choose other layers"
            )
        meeting.met = True
        device = query.device.type
        if not query.dtype == key.dtype == value.dtype and torch.is_autocast_enabled(device):
            # Cast as autocast does before attention, because norms may have left some tensors in float32.
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        if query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        by_sample = attn_mask is not None and attn_mask.ndim == 4
        if attn_mask is not None and by_sample:
            attn_mask = attn_mask.expand(query.shape[0], -1, -1, -1)
        parts = zip(plan.graph_sigmas, plan.blends, plan.starts or (None,) * len(plan.sigmas), strict=True)
        kinds = [(kind is Perturbation.IDENTITY, blend, start) for kind, blend, start in parts]
        sigmas, values = plan.told_sigmas()
        # Frames are blurred before attention, which needs numbers.
        given: Any = plan.sigmas if grid.frames > 1 else sigmas if values is None else values
        outputs = []
        for samples, (identity, blend, start) in equal_runs(kinds):
            qkv = query[samples], key[samples], value[samples]
            place = grid if start is None else replace(grid, start=start)
            mask = attn_mask[samples] if attn_mask is not None and by_sample else attn_mask
            output: Any
            if identity:
                output = _identity(*qkv, place, mask, scale, self.backend)
            else:
                options: Any = {"scale": scale, "attn_mask": mask, "boundary": self.boundary, "backend": self.backend}
                output = seg_attention(*qkv, place, given[samples], **options)
            if blend != 1.0:
                own = F.scaled_dot_product_attention(*qkv, mask, scale=scale)
                output = torch.lerp(own, output, blend)
            outputs.append(output)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class _Meeting(TorchFunctionMode):
    """Replaces attention by that of a processor inside this mode.

    Attributes:
        met: Whether self-attention was called.
    """

    def __init__(self, processor: InterceptingProcessor) -> None:
        super().__init__()
        self._processor = processor
        self.met = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _PYTORCHS:
            return self._processor.attend(self, *args, **(kwargs or {}))
        if func is torch.Tensor.unflatten:  # it calls super(), which torch.compile cannot trace from here
            func = torch.unflatten
        return func(*args, **(kwargs or {}))


@functools.lru_cache(maxsize=64)
def _processor_class(original: Any) -> type[InterceptingProcessor]:
    """Return the class that replaces processors of a class."""

    @functools.wraps(original.__call__)
    def call(self: InterceptingProcessor, attn: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run(attn, *args, **kwargs)

    return type(f"Guided{original.__name__}", (InterceptingProcessor,), {"__call__": call})


def intercepting(original: Any, boundary: str = "reflect", backend: str = "auto") -> InterceptingProcessor:
    """Return the processor that replaces another one."""
    kind: Any = type(original)
    return _processor_class(kind)(original, boundary, backend)


def _identity(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    attn_mask: torch.Tensor | None,
    scale: float | None,
    backend: str,
) -> torch.Tensor:
    """Compute attention in which every image token attends only to itself and to the tokens outside the image.

    The tokens outside the image attend to all tokens. With ``m`` the log-sum-exp over them and ``a`` the logit of the
    image token itself, the softmax over both gives the image token the weight ``sigmoid(a - m)``.

    Source: PAG (arXiv 2403.17377), equation 14; for text in the sequence diffusers' pipeline for Stable Diffusion 3.
    """
    tokens = query.shape[2]
    image = slice(grid.start, grid.stop)
    if grid.tokens == tokens:
        return value
    rest = [slice(0, grid.start), slice(grid.stop, tokens)]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:2], tokens, tokens)
    options: Any = {"scale": scale, "backend": backend}

    def others(x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        return torch.cat([x.narrow(dim, some.start, some.stop - some.start) for some in rest], dim)

    mask = None if attn_mask is None else others(attn_mask[:, :, image], 3)
    attended, lse = seg_attention(
        query[:, :, image], others(key), others(value), Grid(1, 1), 0.0, attn_mask=mask, return_lse=True, **options
    )
    factor = query.shape[3] ** -0.5 if scale is None else scale
    own = (query[:, :, image].to(lse.dtype) * key[:, :, image].to(lse.dtype)).sum(-1) * factor
    if attn_mask is not None:
        own = _masked(own, attn_mask[:, :, image, image].diagonal(dim1=-2, dim2=-1))
    weight = torch.sigmoid(own - lse)[..., None]
    of_image = torch.lerp(attended.to(weight.dtype), value[:, :, image].to(weight.dtype), weight).to(value.dtype)
    mask = None if attn_mask is None else others(attn_mask)
    of_others = F.scaled_dot_product_attention(others(query), key, value, mask, scale=scale)
    return torch.cat([of_others[:, :, : grid.start], of_image, of_others[:, :, grid.start :]], dim=2)


def _masked(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Apply a mask as PyTorch's attention does: Booleans select logits, and numbers are added to them."""
    return logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask.to(logits.dtype)

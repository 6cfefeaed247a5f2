# SPDX-License-Identifier: Apache-2.0
"""The projections of a self-attention layer, fused or not, for selected samples and rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import nn

from segkern.integrations.diffusers.runtime.affine import is_affine, is_plain_linear, passes_on


class Projections:
    """Projections to queries, keys and values ``[samples, heads, rows, head_dim]``, and the output projection.

    Args:
        attn: The layer.
        fused: Whether to use ``attn.to_qkv``.
    """

    def __init__(self, attn: Attention, fused: bool) -> None:
        self.attn = attn
        self.fused = fused

    @property
    def apart(self) -> bool:
        """True if queries, keys and values can be projected separately."""
        return not self.fused or is_plain_linear(self.attn.to_qkv)

    @property
    def query_is_affine(self) -> bool:
        """True if the query of a weighted mean of tokens is known to be the mean of their queries, before norms."""
        return is_affine(self.attn.to_qkv if self.fused else self.attn.to_q)

    @property
    def out_is_affine(self) -> bool:
        """True if the output projection is known to be affine, which also means that equal rows have equal outputs."""
        return is_affine(self.attn.to_out[0]) and passes_on(self.attn.to_out[1])

    def all(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values."""
        if not self.fused:
            return self.query(x), self.key(x), self.value(x)
        query, key, value = self.attn.to_qkv(x).chunk(3, dim=-1)
        return self._normed(query, self.attn.norm_q), self._normed(key, self.attn.norm_k), self._split_heads(value)

    def query(self, x: torch.Tensor) -> torch.Tensor:
        """Return only queries."""
        return self._normed(self._thirds(x, 0, 1) if self.fused else self.attn.to_q(x), self.attn.norm_q)

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Return only keys."""
        return self._normed(self._thirds(x, 1, 2) if self.fused else self.attn.to_k(x), self.attn.norm_k)

    def key_value(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values, computed in one product if fused."""
        if not self.fused:
            return self.key(x), self.value(x)
        key, value = self._thirds(x, 1, 3).chunk(2, dim=-1)
        return self._normed(key, self.attn.norm_k), self._split_heads(value)

    def query_key(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return queries and keys; values are computed only if they cannot be separated."""
        return (self.query(x), self.key(x)) if self.apart else self.all(x)[:2]

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Return only values."""
        return self._split_heads(self._thirds(x, 2, 3) if self.fused else self.attn.to_v(x))

    def out(self, x: torch.Tensor) -> torch.Tensor:
        """Project ``[samples, heads, rows, head_dim]`` to ``[samples, rows, channels]``."""
        linear, dropout = self.attn.to_out[0], self.attn.to_out[1]
        return dropout(linear(x.transpose(1, 2).flatten(2)))

    def _normed(self, x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
        x = self._split_heads(x)
        return x if norm is None else norm(x)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view of ``[samples, rows, heads * head_dim]`` as ``[samples, heads, rows, head_dim]``."""
        return x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2)

    def _thirds(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return thirds ``first`` up to ``last`` of the output of ``to_qkv`` without computing the others."""
        linear = self.attn.to_qkv
        third = linear.out_features // 3
        rows = slice(first * third, last * third)
        return F.linear(x, linear.weight[rows], None if linear.bias is None else linear.bias[rows])

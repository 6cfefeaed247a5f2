# SPDX-License-Identifier: Apache-2.0
"""Energies of rows, masses of keys and their gradients in PyTorch.

Logits are formed in blocks of some query rows of some heads, 16 MB of float32 on a CPU. No N x N matrix is formed. All
blocks reuse the same memory and are turned into probabilities in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from segkern.core.precision import compute_dtype, exact_dtype, full_precision
from segkern.core.sigmas import equal_runs
from segkern.grid import Grid
from segkern.ops.torch_blur import gaussian_blur, grid_mean

# Maximum rows of a block, and maximum logits over all heads. A CPU is fastest if a block fits its cache, but its
# threads synchronise after every operation on a block, so smaller blocks would synchronise more often. Other devices
# need large blocks to be fully used.
_CPU_BLOCK = (1024, 2**22)
_OTHER_BLOCK = (4096, 2**26)

Heads = tuple[int, slice]  # a sample and some of its heads


def attention_mass(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Return, for each key, the sum of its probabilities over the queries, ``[batch, heads, keys]``; no gradient."""
    mass = torch.zeros(*key.shape[:3], dtype=exact_dtype(query), device=query.device)
    for heads, _, logits in _blocks(query, key, scale):
        torch.softmax(logits, dim=-1, out=logits)
        mass[heads] += logits.sum(dim=1)
    return mass.to(compute_dtype(query.dtype))


def attention_energy(
    query: torch.Tensor, key: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], scale: float, boundary: str
) -> torch.Tensor:
    """Return minus the log-sum-exp of every blurred query's logits, ``[batch, heads, tokens]``; no gradient.

    The image tokens of a sample with infinite sigma share one row, the row of their mean.
    """
    energy = torch.empty(*query.shape[:3], dtype=compute_dtype(query.dtype), device=query.device)
    for samples, sigma in equal_runs(sigmas):
        q, k, rows = query[samples], key[samples], energy[samples]
        if math.isinf(sigma):
            row = q.new_empty(*q.shape[:2], 1, dtype=energy.dtype)
            _write_energy(grid_mean(q, grid), k, scale, row)
            rows[:, :, grid.start : grid.stop] = row
            for outside in (slice(0, grid.start), slice(grid.stop, q.shape[2])):
                _write_energy(q[:, :, outside], k, scale, rows[:, :, outside])
        else:
            q = q if sigma == 0.0 else gaussian_blur(q, grid, sigmas[samples], boundary)
            _write_energy(q, k, scale, rows)
    return energy


def _write_energy(query: torch.Tensor, key: torch.Tensor, scale: float, energy: torch.Tensor) -> None:
    for heads, rows, logits in _blocks(query, key, scale):
        highest = logits.amax(dim=-1, keepdim=True)
        highest = highest.masked_fill_(highest.isinf(), 0.0)  # as torch.logsumexp does
        sums = logits.sub_(highest).exp_().sum(dim=-1)
        energy[heads][:, rows] = sums.log_().add_(highest[..., 0]).neg_()


def composed_mass(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Compute :func:`attention_mass` from operations that can be transformed and differentiated repeatedly."""
    return torch.softmax(_all_logits(query, key, scale), dim=-1).sum(dim=-2).to(compute_dtype(query.dtype))


def composed_energy(
    query: torch.Tensor, key: torch.Tensor, grid: Grid, sigmas: tuple[float, ...], scale: float, boundary: str
) -> torch.Tensor:
    """Compute :func:`attention_energy` from operations that can be transformed and differentiated repeatedly."""
    if any(sigmas):
        query = gaussian_blur(query, grid, sigmas, boundary)
    return -torch.logsumexp(_all_logits(query, key, scale), dim=-1).to(compute_dtype(query.dtype))


def _all_logits(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    dtype = exact_dtype(query)
    with full_precision(query.device):
        return torch.matmul(query.to(dtype), key.to(dtype).transpose(-2, -1)) * scale


def attention_mass_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of query and key from the gradient of the masses, ``[batch, heads, keys]``."""
    into = _Gradients(query, key, scale)
    for heads, rows, logits in _blocks(query, key, scale):
        torch.softmax(logits, dim=-1, out=logits)
        weights = grad[heads][:, None].to(logits.dtype)  # per key, equal for all rows
        with full_precision(query.device):
            centre = torch.matmul(logits, weights.transpose(1, 2))
        into.add(heads, rows, logits.mul_(weights - centre))
    return into.query_and_key()


def attention_energy_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    boundary: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of query and key from the gradient of the energies, ``[batch, heads, tokens]``."""
    blurred = gaussian_blur(query, grid, sigmas, boundary) if any(sigmas) else query
    into = _Gradients(blurred, key, scale)
    for heads, rows, logits in _blocks(blurred, key, scale):
        torch.softmax(logits, dim=-1, out=logits)
        into.add(heads, rows, logits.mul_(-grad[heads][:, rows, None].to(logits.dtype)))
    grad_query, grad_key = into.query_and_key()
    if any(sigmas):
        grad_query = gaussian_blur(grad_query, grid, sigmas, boundary, adjoint=True).contiguous()
    return grad_query, grad_key


class _Gradients:
    """Accumulates gradients of queries and keys from gradients of logits."""

    def __init__(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> None:
        dtype = exact_dtype(query)
        self.query, self.key, self.scale = query, key, scale
        self.of_query = torch.zeros(query.shape, dtype=dtype, device=query.device)
        self.of_key = torch.zeros(key.shape, dtype=dtype, device=key.device)

    def add(self, heads: Heads, rows: slice, of_logits: torch.Tensor) -> None:
        q, k = self.query[heads][:, rows].to(of_logits.dtype), self.key[heads].to(of_logits.dtype)
        with full_precision(q.device):
            self.of_query[heads][:, rows] = torch.matmul(of_logits, k) * self.scale
            self.of_key[heads] += torch.matmul(of_logits.transpose(1, 2), q) * self.scale

    def query_and_key(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.of_query.to(self.query.dtype), self.of_key.to(self.key.dtype)


def _blocks(query: torch.Tensor, key: torch.Tensor, scale: float) -> Iterator[tuple[Heads, slice, torch.Tensor]]:
    """Yield heads, rows and their logits ``[heads, rows, keys]``. The next block overwrites the logits."""
    batch, heads, tokens, _ = query.shape
    keys, dtype = key.shape[2], exact_dtype(query)
    most_rows, most = _CPU_BLOCK if query.device.type == "cpu" else _OTHER_BLOCK
    row_count = max(1, min(tokens, most_rows, most // keys))
    head_count = max(1, min(heads, most // (row_count * keys)))
    memory = torch.empty(head_count * row_count * keys, dtype=dtype, device=query.device)
    for sample in range(batch):
        for head in range(0, heads, head_count):
            some = sample, slice(head, head + head_count)
            k = key[some].to(dtype).transpose(1, 2)
            for row in range(0, tokens, row_count):
                rows = slice(row, row + row_count)
                q = query[some][:, rows].to(dtype)
                logits = memory[: q.shape[0] * q.shape[1] * keys].view(*q.shape[:2], keys)
                with full_precision(query.device):
                    torch.baddbmm(logits, q, k, beta=0, alpha=scale, out=logits)
                yield some, rows, logits

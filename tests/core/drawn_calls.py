# SPDX-License-Identifier: Apache-2.0
"""Random calls of the public functions (shapes, memory, dtypes, grids, sigmas, masks), and checks of their results."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

import segkern
from segkern import Grid, reference
from segkern.core.gaussian import BOUNDARIES
from tests.core.contract import assert_contract, plain_attention, plain_mass

HEAD_DIMS = (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 40, 64, 65, 80, 96, 127, 128, 160, 255, 256)
SIGMAS = (0.0, 5e-324, 1e-310, 1e-30, 0.02, 0.3, 0.7, 1.0, 1.6, 3.0, 9.0, 1e4, 1e30, 1.7e308, math.inf)
LAYOUTS = ("contiguous", "permuted", "steps", "offset", "expanded", "overlapping", "flipped")


def tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return normal values in a random layout. PyTorch's strides are not negative, but may be 0."""
    layout = rng.choice(LAYOUTS)
    if layout == "overlapping" and dtype == torch.bfloat16:  # PyTorch's own attention reads past its end on a CPU
        layout = "expanded"
    generator = torch.Generator().manual_seed(rng.randrange(2**31))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    if layout == "permuted":
        order = rng.sample(range(len(shape)), len(shape))
        x = normal(*(shape[i] for i in order))
        return x.permute([order.index(i) for i in range(len(shape))])
    if layout == "steps":
        dim, step = rng.randrange(len(shape)), rng.randint(2, 3)
        x = normal(*(step * n if i == dim else n for i, n in enumerate(shape)))
        return x[(slice(None),) * dim + (slice(rng.randrange(step), None, step),)]
    if layout == "offset":
        first = rng.randint(1, 5)
        return normal(first + math.prod(shape) + 3)[first : first + math.prod(shape)].view(shape)
    if layout == "expanded":
        dim = rng.randrange(len(shape))
        return normal(*(1 if i == dim else n for i, n in enumerate(shape))).expand(shape)
    if layout == "overlapping":
        strides = [rng.randint(0, 7) for _ in shape]
        return normal(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))).as_strided(shape, strides)
    if layout == "flipped":
        return normal(*shape).flip(rng.randrange(len(shape))).transpose(0, -1).contiguous().transpose(0, -1)
    return normal(*shape)


@dataclass
class Call:
    """The arguments of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    grid: Grid
    sigma: Any
    boundary: str
    scale: float | None
    mask: torch.Tensor | None


def grid_for(rng: random.Random, largest: int) -> tuple[Grid, int]:
    """Return a grid, often a line or a single token, and the number of tokens of its sequence."""
    height, width = (rng.choice((1, 1, rng.randint(1, largest))) for _ in range(2))
    height, width = rng.choice(((height, width), (rng.randint(1, largest), rng.randint(1, largest))))
    grid = Grid(height, width, rng.choice((0, 0, 1, rng.randint(0, 9))))
    return grid, grid.stop + rng.choice((0, 0, 1, rng.randint(0, 9)))


def sigma_for(rng: random.Random, batch: int, heads: int) -> Any:
    """Return one sigma for all samples, one per sample in several kinds of sequence, or one per head."""
    one = [rng.choice(SIGMAS) for _ in range(batch)]
    kinds = [lambda: one[0], lambda: tuple(one), lambda: list(one), lambda: torch.tensor(one, dtype=torch.float64)]
    kinds.append(lambda: [[rng.choice(SIGMAS[:1] + SIGMAS[6:]) for _ in range(heads)] for _ in range(batch)])
    return rng.choice(kinds)()


def mask_for(rng: random.Random, full: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor | None:
    """Return a mask of any broadcast shape, boolean or additive with -inf, with some rows without keys."""
    if rng.random() < 0.3:
        return None
    shape = tuple(1 if rng.random() < 0.4 else n for n in full)
    shape = shape[rng.randint(0, next((i for i, n in enumerate(shape) if n != 1), 3)) :]
    takes_part = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randrange(2**31))) > rng.random() * 0.6
    if len(shape) > 1 and rng.random() < 0.3:
        takes_part[..., : rng.randint(1, max(1, shape[-2] // 2)), :] = False
    if rng.random() < 0.5:
        return takes_part
    return tensor(rng, shape, dtype).masked_fill(~takes_part, -math.inf)


def draw_call(rng: random.Random, dtypes: tuple[torch.dtype, ...], largest: int) -> Call:
    """Return a random call."""
    dtype, dim = rng.choice(dtypes), rng.choice(HEAD_DIMS)
    grid, tokens = grid_for(rng, largest)
    batch, heads, keys = rng.randint(1, 3), rng.randint(1, 3), rng.choice((tokens, rng.randint(1, 5 * largest)))
    query = tensor(rng, (batch, heads, tokens, dim), dtype)
    key, value = (tensor(rng, (batch, heads, keys, dim), dtype) for _ in range(2))
    if dim * tokens < 64:  # few numbers can almost cancel, which makes plain PyTorch's error small by chance
        value = value.abs()
    return Call(
        query,
        key,
        value,
        grid,
        sigma_for(rng, batch, heads),
        rng.choice(BOUNDARIES),
        rng.choice((None, None, 0.2, -0.3, 0.0)),
        mask_for(rng, (batch, heads, tokens, keys), dtype),
    )


def plain_sigmas(call: Call) -> list[list[float]]:
    """Return one sigma for each head of each sample."""
    batch, heads = call.query.shape[:2]
    sigma = call.sigma.tolist() if isinstance(call.sigma, torch.Tensor) else call.sigma
    rows = sigma if isinstance(sigma, (tuple, list)) else [sigma] * batch
    return [row if isinstance(row, list) else [row] * heads for row in rows]


def by_heads(function: Any, call: Call, mask: torch.Tensor | None) -> torch.Tensor:
    """Call a function that supports one sigma per sample, separately for each head."""
    batch, heads, tokens, _ = call.query.shape
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, call.key.shape[2])
    sigmas = plain_sigmas(call)
    result = []
    for h in range(heads):
        options = {"attn_mask": None if mask is None else mask[:, [h]], "scale": call.scale, "boundary": call.boundary}
        q, k, v = (x[:, [h]] for x in (call.query, call.key, call.value))
        result.append(function(q, k, v, call.grid, [row[h] for row in sigmas], **options))
    return torch.cat(result, dim=1)


def largest_logit(call: Call) -> float:
    """Return an upper bound on the logits of queries and keys, at least 1."""
    norms = [x.double().norm(dim=-1).amax().item() for x in (call.query, call.key)]
    scale = call.query.shape[-1] ** -0.5 if call.scale is None else abs(call.scale)
    return max(1.0, norms[0] * norms[1] * scale)


def assert_exact(call: Call, result: torch.Tensor, oracle: torch.Tensor, plain: torch.Tensor) -> None:
    """Check the contract, or in float32 and float64 an error of a few roundings of the logits.

    In float64 the reference itself rounds. In float32 plain PyTorch's error is small by chance for one of many inputs.
    """
    assert result.shape == oracle.shape
    eps = torch.finfo(call.query.dtype).eps
    few = 16 if call.query.dtype == torch.float64 else 4
    rounded = few * eps * largest_logit(call) * oracle.abs().max()
    if call.query.dtype in (torch.float32, torch.float64) and (result.double() - oracle).abs().max() <= rounded:
        return
    assert_contract(result, oracle, plain)


def check_attention(call: Call, backend: str) -> None:
    """Check output and log-sum-exp under the contract."""
    q, k, v, mask = call.query, call.key, call.value, call.mask
    result, lse = segkern.seg_attention(
        q, k, v, call.grid, call.sigma, scale=call.scale, attn_mask=mask, boundary=call.boundary, backend=backend,
        return_lse=True,
    )  # fmt: skip
    double = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    oracle, oracle_lse = reference.seg_attention(
        q.double(), k.double(), v.double(), call.grid, plain_sigmas(call), scale=call.scale, attn_mask=double,
        boundary=call.boundary, return_lse=True,
    )  # fmt: skip
    assert result.dtype == q.dtype
    assert_exact(call, result, oracle, by_heads(plain_attention, call, mask))
    finite = oracle_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert torch.equal(lse[~finite].double(), oracle_lse[~finite])
    if finite.any():
        eps = max(torch.finfo(q.dtype).eps, torch.finfo(torch.float32).eps)
        assert (lse.double() - oracle_lse)[finite].abs().max() <= 8 * eps * largest_logit(call)


def check_blur(call: Call, backend: str) -> None:
    """Check the blur. Its weights sum to 1, so the error is a few roundings of the values."""
    x = call.query
    result = segkern.gaussian_blur(x, call.grid, call.sigma, boundary=call.boundary, backend=backend)
    oracle = reference.gaussian_blur(x.double(), call.grid, plain_sigmas(call), boundary=call.boundary)
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    eps = torch.finfo(x.dtype).eps
    bound = eps + 16 * (torch.finfo(torch.float64).eps if x.dtype == torch.float64 else 2**-23)
    assert (result.double() - oracle).abs().max() <= bound * x.double().abs().max()
    outside = torch.cat([result[:, :, : call.grid.start], result[:, :, call.grid.stop :]], dim=2)
    assert torch.equal(outside, torch.cat([x[:, :, : call.grid.start], x[:, :, call.grid.stop :]], dim=2))


def check_scores(call: Call, backend: str) -> None:
    """Check masses and energies. Masses sum to the number of queries."""
    q, k = call.query, call.key
    mass = segkern.attention_mass(q, k, scale=call.scale, backend=backend)
    plain = plain_mass(q, k, call.scale)
    assert_exact(call, mass, reference.attention_mass(q.double(), k.double(), scale=call.scale), plain)
    assert (mass.sum(dim=-1) - q.shape[2]).abs().max() <= 1e-5 * q.shape[2]
    sigma = [row[0] for row in plain_sigmas(call)]
    options = {"scale": call.scale, "boundary": call.boundary}
    energy = segkern.attention_energy(q, k, call.grid, sigma, backend=backend, **options)
    oracle = reference.attention_energy(q.double(), k.double(), call.grid, sigma, **options)
    few = 64 if q.dtype == torch.float64 else 8  # roundings; in float64 the reference rounds too
    assert (energy.double() - oracle).abs().max() <= few * torch.finfo(q.dtype).eps * largest_logit(call)
    assert energy.dtype == mass.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)

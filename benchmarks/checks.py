# SPDX-License-Identifier: Apache-2.0
"""Correctness checks of results: a sampled part is compared with the float64 reference under the numerics contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case, Inputs
from benchmarks.providers import Provider
from segkern import Grid, reference
from tests.core.contract import assert_contract, plain_attention, plain_blur, plain_mass

_HEADS = 4
_ROWS = 256


@dataclass(frozen=True)
class Part:
    """The samples, heads and tokens to check. Checking everything in float64 would take too long."""

    samples: list[int]
    heads: list[int]
    rows: list[int]

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return this part of ``[batch, heads, tokens, dim]`` or ``[batch, heads, tokens]``."""
        return x[self.samples][:, self.heads][:, :, self.rows]


def draw_part(case: Case) -> Part:
    """Choose one unblurred and one blurred sample, some heads, and some rows including the first and the last."""
    generator = torch.Generator().manual_seed(case.tokens + case.heads)

    def drawn(count: int, of: int, always: set[int]) -> list[int]:
        return sorted(always | set(torch.randperm(of, generator=generator)[:count].tolist()))

    samples = [*drawn(1, case.batch - case.third, set()), case.batch - 1]
    ends = {case.grid.start, case.grid.stop - 1, 0, case.tokens - 1}
    return Part(samples, drawn(_HEADS, case.heads, set()), drawn(_ROWS, case.tokens, ends))


@dataclass(frozen=True)
class Expected:
    """The reference's result in float64, and the result of plain PyTorch in the inputs' dtype."""

    part: Part
    oracle: torch.Tensor
    plain: torch.Tensor


def expected(inputs: Inputs, sigma: float, kind: str) -> Expected:
    """Return the expected result of providers of a kind, on a part of the result."""
    case, grid = inputs.case, inputs.case.grid
    part = draw_part(case)
    query, key, value = (x[part.samples][:, part.heads] for x in (inputs.query, inputs.key, inputs.value))
    if kind == "mass":
        return Expected(
            part,
            _masses(query, key, reference.attention_mass, torch.float64)[:, :, part.rows],
            _masses(query, key, plain_mass, case.dtype)[:, :, part.rows],
        )
    sigmas = [0.0 if kind == "plain" else case.sigmas(sigma)[sample] for sample in part.samples]
    exact = reference.gaussian_blur(query.double(), grid, sigmas)[:, :, part.rows]
    plain = plain_blur(query, grid, sigmas)[:, :, part.rows]
    if kind != "blur":
        exact, _ = reference.attention(exact, key.double(), value.double())
        plain = plain_attention(plain, key, value, Grid(1, 1), 0.0)  # the queries are already blurred
    return Expected(part, exact, plain)


def _masses(
    query: torch.Tensor, key: torch.Tensor, compute: Callable[..., torch.Tensor], dtype: torch.dtype
) -> torch.Tensor:
    """Return masses ``[samples, heads, keys]``, one head at a time: all scores together would fill the memory."""
    masses = [
        [compute(q[None, None], k[None, None])[0, 0] for q, k in zip(*both, strict=True)]
        for both in zip(query.to(dtype), key.to(dtype), strict=True)
    ]
    return torch.stack([torch.stack(heads) for heads in masses])


def judge(provider: Provider, result: torch.Tensor, inputs: Inputs, wanted: Expected) -> tuple[dict[str, Any], str]:
    """Return the errors of a result's blurred sample, and the reason why the result is wrong, or an empty string.

    The contract must hold for everything that is checked. Its root-mean-square bound must also hold for the blurred
    sample alone: its values are much smaller, so a wrong blur in half precision would be hidden by the other sample.
    An approximation is only checked to be finite.
    """
    case = inputs.case
    shape: tuple[int, ...] = (case.batch, case.heads, case.tokens, case.head_dim)
    shape, dtype = (shape[:3], torch.float32) if provider.kind == "mass" else (shape, case.dtype)
    if result.shape != shape:
        return {}, f"the shape of the result is {tuple(result.shape)}, expected {shape}"
    if result.dtype != dtype:
        return {}, f"the dtype of the result is {result.dtype}, expected {dtype}"
    looked_at = wanted.part.of(result)
    if not looked_at.isfinite().all():
        return {}, f"{(~looked_at.isfinite()).sum()} of {looked_at.numel()} values are not finite"
    oracle = wanted.oracle[-1]
    error, plain = looked_at[-1].double() - oracle, wanted.plain[-1].double() - oracle
    errors = {
        "rms": error.square().mean().sqrt().item(),
        "relative": (error.norm() / oracle.norm()).item(),
        "plain_rms": plain.square().mean().sqrt().item(),
        "largest_value": oracle.abs().max().item(),
    }
    if provider.exact:
        try:
            assert_contract(looked_at, wanted.oracle, wanted.plain)
        except AssertionError as failure:
            return errors, f"wrong under the numerics contract: {failure}"
        share = share_of_allowed(errors, case.dtype)
        if share > 1.0:
            return errors, f"wrong in the blurred sample: rms error {errors['rms']:.3e}, {share:.2f} times the limit"
    return errors, ""


def share_of_allowed(errors: dict[str, Any], dtype: torch.dtype) -> float:
    """Return a sample's root-mean-square error divided by the contract's limit."""
    allowed = 2 * errors["plain_rms"] + torch.finfo(dtype).eps * errors["largest_value"]
    return float(errors["rms"] / allowed)

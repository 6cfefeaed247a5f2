# SPDX-License-Identifier: Apache-2.0
"""Explanation of the backend, kernels and tiles of one ``seg_attention`` call."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from segkern.core.dispatch import choose_backend, triton_is_installed
from segkern.core.gaussian import tap_count
from segkern.grid import Grid

if TYPE_CHECKING:
    from segkern.kernels._configs import Tile


@dataclass(frozen=True)
class Call:
    """One ``seg_attention`` call.

    Attributes:
        grid: Token grid.
        heads: Number of heads.
        head_dim: Dimension of each head.
        sigma: Sigma of the perturbed samples.
        dtype: Data type of queries, keys and values.
    """

    grid: Grid
    heads: int
    head_dim: int
    sigma: float
    dtype: torch.dtype = torch.float16


def explain(call: Call, device: torch.device, arch: str | None = None) -> list[tuple[str, str]]:
    """Return topics and answers that explain how a call with ``backend="auto"`` is computed.

    Args:
        call: The call. One sample of its batch is perturbed.
        device: Device of the call.
        arch: GPU architecture to assume, such as ``"sm_90"``; None for the architecture of ``device``.

    Raises:
        ValueError: If the architecture is unknown.

    Example:
        >>> call = Call(Grid(64, 64), heads=10, head_dim=64, sigma=math.inf)
        >>> dict(explain(call, torch.device("cpu")))["perturbed rows"]
        '1 of 4096: the mean query'
    """
    if arch is None:
        backend, reason = choose_backend(device, call.dtype, call.head_dim, blurs=call.sigma > 0)
        answers = [("backend", f"{backend}: {reason}")]
    else:
        from segkern.kernels._configs import ARCHITECTURES

        if arch not in ARCHITECTURES:
            raise ValueError(f"--arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        backend, answers = "triton", [("backend", f"triton, for {arch}")]
    answers += [("perturbed rows", _rows(call)), ("blur", _blur(call))]
    if backend == "triton" and triton_is_installed():
        answers += _kernels(call, device, arch)
    elif call.sigma > 0:
        answers.append(("computed by", "a blur matrix per axis, then PyTorch's scaled_dot_product_attention"))
    return answers


def _rows(call: Call) -> str:
    tokens = call.grid.tokens
    if call.sigma == 0:
        return f"all {tokens}, without blur"
    if math.isinf(call.sigma):
        return f"1 of {tokens}: the mean query"
    return f"all {tokens}"


def _blur(call: Call) -> str:
    if call.sigma == 0 or math.isinf(call.sigma):
        return "none" if call.sigma == 0 else "mean over the grid"
    taps = [tap_count(call.sigma, n) for n in (call.grid.height, call.grid.width)]
    wanted = tap_count(call.sigma, 10**9)
    clamped = " (clamped to the grid)" if min(taps) < wanted else ""
    return f"{taps[0]} x {taps[1]} taps{clamped}, separable"


def _kernels(call: Call, device: torch.device, arch: str | None) -> list[tuple[str, str]]:
    from segkern.kernels import _configs, _routes

    arch = arch or _configs.architecture(device)
    tile = _configs.attention_tile(arch, call.head_dim, call.dtype)
    known = _configs.measured(arch, call.head_dim, call.dtype)
    sdpa = None if known is None else known.sdpa.get(_configs.size_class(call.grid.tokens))
    if sdpa is not None and 0 < call.sigma < math.inf:
        backend = "" if sdpa == "default" else f" ({sdpa})"
        return [("computed by", f"the blur kernel, then PyTorch's attention{backend}, which was measured to be faster")]
    answers = [("attention tile", f"{_tile(tile)} ({'default' if known is None else 'measured'})")]
    if 0 < call.sigma < math.inf:
        estimate = _routes.estimate_blur(
            arch, call.grid, (call.sigma,), "reflect", call.heads, call.head_dim, call.dtype.itemsize, tile.block_m
        )
        before = estimate.place == _routes.BlurPlace.BEFORE
        where = "separate kernel before the attention" if before else "prologue of the attention kernel"
        costs = (
            f"estimates: {estimate.before_microseconds:.1f} us separately, "
            f"{estimate.prologue_microseconds:.1f} us in the prologue"
        )
        answers.append(("blur computed in", f"{where} ({'narrow grid' if estimate.narrow else costs})"))
    elif call.sigma > 0:
        answers.append(("mean query tile", _tile(_configs.split_tile(arch, call.head_dim, call.dtype, 1))))
    return answers


def _tile(tile: Tile) -> str:
    limit = "" if tile.max_registers is None else f", at most {tile.max_registers} registers"
    copies = ", tensor descriptors for keys and values" if tile.descriptors else ""
    return (
        f"{tile.block_m} queries x {tile.block_n} keys, {tile.num_warps} warps, {tile.num_stages} stages{limit}{copies}"
    )

# SPDX-License-Identifier: Apache-2.0
"""How far attention at few points is from attention at every row, told by a few exact rows between the points.

The error between points is smooth and largest halfway, so a few rows there, spread over the grid, say how large it is
everywhere. Three kinds of rows look at it from three sides: halfway between points; on tokens that are no points,
for what is not smooth; and halfway where the output changes fastest, for an error that sits in one place.
"""

from __future__ import annotations

import math

import torch

from segkern.core.bounded_cache import kept
from segkern.core.coarse_queries import coarse_grid, points
from segkern.core.gaussian import runs, table_making
from segkern.grid import Grid
from segkern.ops import torch_attention

TRUSTED = 0.1  # from here on the points do not describe the output, and rows between them say nothing of the others

_GOLDEN = (math.sqrt(5) - 1) / 2  # steps of it fill an interval evenly, whatever their number
_DEVIATIONS = 2.0  # of the mean's own spread, added to it


def coarse_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    mask: torch.Tensor | None,
    boundary: str,
    stride: tuple[int, int],
    probes: int,
) -> torch.Tensor:
    """See :func:`segkern.coarse_error`; arguments are checked already."""
    errors = torch.zeros(query.shape[0], dtype=torch.float32, device=query.device)
    if coarse_grid(grid, stride, boundary).tokens == grid.tokens:
        return errors
    compute = torch.promote_types(query.dtype, torch.float32)
    image = Grid(grid.height, grid.width)
    for samples, coarse in runs([0.0 < sigma < math.inf for sigma in sigmas]):
        if coarse:
            q = query[samples, :, grid.start : grid.stop].to(compute)
            kv = key[samples].to(compute), value[samples].to(compute)
            m = mask[samples] if mask is not None and mask.shape[0] != 1 else mask
            m = m if m is None or m.dtype == torch.bool else m.to(compute)
            with torch_attention.full_precision(query.device):
                errors[samples] = _estimate(q, *kv, image, sigmas[samples], scale, m, boundary, stride, probes)
    return errors


def _estimate(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    sigmas: tuple[float, ...],
    scale: float,
    mask: torch.Tensor | None,
    boundary: str,
    stride: tuple[int, int],
    probes: int,
) -> torch.Tensor:
    """Of samples of finite sigma whose tokens are the grid: float32 ``[batch]``."""
    at_points = torch_attention.coarse_queries(query, grid, sigmas, stride, boundary)
    output, _ = torch_attention.attend(at_points, key, value, scale, mask, False)
    output = torch_attention.coarse_outputs(output, grid, stride, boundary)
    halfway, elsewhere = (
        rows.expand(len(sigmas), -1) for rows in _spread_rows(grid, stride, boundary, probes, query.device)
    )
    steep = _steepest_rows(output, grid, stride, boundary, probes // 4)
    rows = torch.cat([halfway, elsewhere, steep], dim=1)
    blurred = torch_attention.gaussian_blur(query, grid, sigmas, boundary)
    exact, _ = torch_attention.attend(_take(blurred, rows), key, value, scale, mask, False)
    squares = (_take(output, rows) - exact).square().mean(dim=(1, 3))  # [batch, rows]
    spread = halfway.shape[1] + elsewhere.shape[1]
    largest = torch.stack([_upper_mean(squares[:, :n]) for n in (halfway.shape[1], spread, rows.shape[1])]).amax(dim=0)
    size = output.square().mean(dim=(1, 2, 3))
    error = torch.where(largest == 0, 0.0, (largest / size).sqrt()).float()
    return error.masked_fill(~(error < TRUSTED), math.inf)  # NaN is not less than anything


def _upper_mean(squares: torch.Tensor) -> torch.Tensor:
    """What the mean of all rows is hardly above, if these ``[batch, rows]`` are drawn from them."""
    deviation = squares.std(dim=1, correction=0) / math.sqrt(squares.shape[1])
    return squares.mean(dim=1) + _DEVIATIONS * deviation


def _take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows ``[batch, count]`` of ``[batch, heads, tokens, dim]``."""
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _steepest_rows(
    output: torch.Tensor, grid: Grid, stride: tuple[int, int], boundary: str, count: int
) -> torch.Tensor:
    """The tokens halfway between points at which the output changes fastest along an axis: ``[batch, count]``."""
    image = output.unflatten(2, (grid.height, grid.width))
    change = output.new_zeros(output.shape[0], grid.height, grid.width)
    for axis, length in ((2, grid.height), (3, grid.width)):
        if length > 1:
            change += torch.gradient(image, dim=axis)[0].square().mean(dim=(1, 4))
    tokens = _halfway_tokens(grid, stride, boundary, output.device)
    best = change.flatten(1)[:, tokens].topk(min(count, len(tokens)), dim=1).indices
    return tokens[best]


@kept(most=256)  # on the device, so that nothing is copied to it at every call
def _halfway_tokens(grid: Grid, stride: tuple[int, int], boundary: str, device: torch.device) -> torch.Tensor:
    """Every token that is halfway between points on both axes, int64."""
    with table_making():
        rows, columns = (_halfway(*axis, boundary) for axis in _axes(grid, stride, boundary))
        return (rows[:, None] * grid.width + columns).flatten().to(device)


@kept(most=256)
def _spread_rows(
    grid: Grid, stride: tuple[int, int], boundary: str, probes: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens spread over the grid: half of the probes halfway between points, a quarter anywhere off the points."""
    down, across = _axes(grid, stride, boundary)
    with table_making():
        halfway = _spread(_halfway(*down, boundary), _halfway(*across, boundary), grid.width, probes // 2)
        elsewhere = _spread(_off_points(*down, boundary), _off_points(*across, boundary), grid.width, probes // 4)
        return halfway.to(device), elsewhere.to(device)


def _axes(grid: Grid, stride: tuple[int, int], boundary: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tokens and points of each axis."""
    coarse = coarse_grid(grid, stride, boundary)
    return (grid.height, coarse.height), (grid.width, coarse.width)


def _halfway(length: int, count: int, boundary: str) -> torch.Tensor:
    """The tokens nearest to the middle between neighbouring points; all tokens of an axis that is not coarse."""
    if count == length:
        return torch.arange(length, device="cpu")
    at = points(length, count, boundary)
    if boundary == "circular":  # the first point again lies behind the last
        at = torch.cat([at, at.new_tensor([length])])
    off = _off_points(length, count, boundary)
    middles = ((at[1:] + at[:-1]) / 2).round().long()
    middles = off[torch.isin(off, middles)]
    return middles if len(middles) else off


def _off_points(length: int, count: int, boundary: str) -> torch.Tensor:
    """The tokens that no point lies nearest to; all tokens of an axis that is not coarse."""
    tokens = torch.arange(length, device="cpu")
    if count == length:
        return tokens
    return tokens[~torch.isin(tokens, points(length, count, boundary).round().long())]


def _spread(rows: torch.Tensor, columns: torch.Tensor, width: int, count: int) -> torch.Tensor:
    """So many tokens of those rows and columns or a few less, as even as a lattice and aligned with neither axis."""
    if count >= len(rows) * len(columns):
        return (rows[:, None] * width + columns).flatten()
    step = torch.arange(count, dtype=torch.float64, device="cpu")
    down = ((step + 0.5) / count * len(rows)).long()
    across = ((step * _GOLDEN + 0.5) % 1 * len(columns)).long()
    return (rows[down] * width + columns[across]).unique()

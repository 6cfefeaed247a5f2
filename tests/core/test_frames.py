# SPDX-License-Identifier: Apache-2.0
"""Videos: each frame of a grid is blurred separately."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import segkern
from segkern import Grid, reference

sigmas = st.one_of(st.just(0.0), st.just(math.inf), st.floats(0.1, 20.0))


@st.composite
def videos(draw: st.DrawFn) -> tuple[Grid, torch.Tensor, list[float]]:
    """Return a grid, float64 queries ``[batch, heads, tokens, 8]`` with tokens around it, and one sigma per sample."""
    height, width, frames = (draw(st.integers(1, most)) for most in (7, 6, 4))
    grid = Grid(height, width, draw(st.integers(0, 3)), frames)
    batch, heads, after = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(batch, heads, grid.stop + after, 8, generator=generator, dtype=torch.float64)
    if draw(st.booleans()):  # attention's layout, with heads after tokens
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    return grid, x, [draw(sigmas) for _ in range(batch)]


def frame_by_frame(blur: Any, x: torch.Tensor, grid: Grid, sigma: Any, **options: Any) -> torch.Tensor:
    """Call once for each frame, with only its tokens."""
    out = x.clone()
    size = grid.height * grid.width
    for first in range(grid.start, grid.stop, size):
        out[:, :, first : first + size] = blur(
            x[:, :, first : first + size], Grid(grid.height, grid.width), sigma, **options
        )
    return out


@pytest.mark.parametrize("blur", [reference.gaussian_blur, segkern.gaussian_blur], ids=["reference", "api"])
@given(videos())
def test_frames_are_images(blur: Any, video: tuple[Grid, torch.Tensor, list[float]]) -> None:
    grid, x, sigma = video
    before = x.clone()
    result = blur(x, grid, sigma)
    torch.testing.assert_close(result, frame_by_frame(reference.gaussian_blur, x, grid, sigma), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)
    outside = [*range(grid.start), *range(grid.stop, x.shape[2])]
    assert torch.equal(result[:, :, outside], x[:, :, outside])


@given(videos())
def test_attention_blurs_the_logits_of_each_frame(video: tuple[Grid, torch.Tensor, list[float]]) -> None:
    grid, query, sigma = video
    key, value = torch.randn(2, *query.shape[:2], 9, 8, dtype=torch.float64)
    result = segkern.seg_attention(query, key, value, grid, sigma)
    logits = frame_by_frame(reference.gaussian_blur, query @ key.transpose(-2, -1) * 8**-0.5, grid, sigma)
    torch.testing.assert_close(result, logits.softmax(-1) @ value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reference.seg_attention(query, key, value, grid, sigma), result, rtol=1e-9, atol=1e-9)


def test_a_sigma_for_each_head() -> None:
    grid = Grid(4, 5, start=2, frames=3)
    x = torch.randn(2, 3, 64, 8, dtype=torch.float64)
    by_head = [[0.0, 1.5, math.inf], [2.0, 2.0, 0.5]]
    expected = torch.stack(
        [
            torch.cat([segkern.gaussian_blur(x[[i]][:, [h]], grid, by_head[i][h]) for h in range(3)], dim=1)[0]
            for i in range(2)
        ]
    )
    torch.testing.assert_close(segkern.gaussian_blur(x, grid, by_head), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(reference.gaussian_blur(x, grid, by_head), expected, rtol=1e-12, atol=1e-12)
    key, value = torch.randn(2, 2, 3, 64, 8, dtype=torch.float64)
    result = segkern.seg_attention(x, key, value, grid, by_head, return_lse=True)
    torch.testing.assert_close(result[0], reference.attention(expected, key, value)[0])


@pytest.mark.one_in(3)
@pytest.mark.parametrize("boundary", ["reflect", "symmetric", "circular"])
def test_boundaries_and_gradients(boundary: str) -> None:
    grid = Grid(3, 4, frames=2)
    x = torch.randn(1, 2, 24, 4, dtype=torch.float64, requires_grad=True)
    key, value = torch.randn(2, 1, 2, 24, 4, dtype=torch.float64, requires_grad=True)

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        result = segkern.seg_attention(*qkv, grid, 1.3, boundary=boundary)
        assert isinstance(result, torch.Tensor)
        return result

    assert torch.autograd.gradcheck(attend, (x, key, value))


def test_under_compile() -> None:
    grid = Grid(5, 4, start=3, frames=3)
    q, k, v = torch.randn(3, 2, 2, 70, 16)
    call = torch.compile(
        lambda *qkv: segkern.seg_attention(*qkv, grid, (0.0, 2.0)), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(call(q, k, v), segkern.seg_attention(q, k, v, grid, (0.0, 2.0)))


def test_what_takes_one_frame_says_so() -> None:
    grid = Grid(2, 3, frames=2)
    q, k, v = torch.randn(3, 1, 1, 12, 8)
    with pytest.raises(
        ValueError, match=r"grid must have one frame here, got Grid\(height=2, width=3, start=0, frames=2\)"
    ):
        segkern.attention_energy(q, k, grid, 1.0)
    with pytest.raises(ValueError, match="query_stride=2 supports only a grid of one frame"):
        segkern.seg_attention(q, k, v, grid, 1.0, query_stride=2)
    with pytest.raises(ValueError, match=r"covers tokens 0 to 17 \(3 x 2 x 3 = 18\), but the sequence has only 12"):
        segkern.gaussian_blur(q, Grid(2, 3, frames=3), 1.0)
    for frames in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match=r"Grid\.frames"):
            Grid(2, 3, frames=frames)  # type: ignore[arg-type]

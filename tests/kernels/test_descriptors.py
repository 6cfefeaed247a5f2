# SPDX-License-Identifier: Apache-2.0
"""Keys and values copied by tensor descriptors, which kernels use only if tuning measured that to be faster."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from segkern import Grid
from segkern.core.private_apis import triton_allocator

pytest.importorskip("triton", reason="kernels need triton")
from segkern.kernels import _configs, _launch
from tests.kernels.kernel_tools import CUDA, DEVICE, check_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("blur_route")
@pytest.mark.parametrize(
    ("dim", "layouts", "described"),
    [
        (16, "packed", True),
        (40, "tokens_first", True),
        (80, "contiguous", True),
        (64, "transposed_dim", False),
        (64, "offset", False),
        (18, "tokens_first", False),
    ],
    ids=str,
)
def test_keys_and_values_by_descriptors(
    dim: int, layouts: str, described: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that descriptors do not support are loaded by pointers."""
    if CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs Hopper or later")
    seen = []
    real = _launch.scratch_memory
    tile = replace(_configs.attention_tile(_configs.architecture(DEVICE), dim, torch.float16), descriptors=True)
    monkeypatch.setattr("segkern.kernels.unmasked_attention.attention_tile", lambda *_: tile)
    monkeypatch.setattr(
        "segkern.kernels.unmasked_attention.scratch_memory", lambda wanted: seen.append(wanted) or real(wanted)
    )
    for keys in (45, 64):
        arguments = (3, 2, 45, dim), Grid(5, 9), (0.0, 1.2, math.inf), torch.float16, (layouts,) * 3
        check_attention(*arguments, keys=keys)
    assert sum(seen) == 2 * described


def test_wide_heads_round_shares_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in several blocks, with and without a ragged last block, and Hopper's tile."""
    if CUDA and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("needs Hopper or later")
    tile = _configs.default_tile("sm_90", 128, torch.float16)
    assert tile.descriptors
    assert tile.block_n == 128
    monkeypatch.setattr("segkern.kernels.unmasked_attention.attention_tile", lambda *_: tile)
    for keys in (128, 256, 300):
        check_attention((2, 1, 45, 128), Grid(5, 9), (0.0, 1.2), torch.float16, ("tokens_first",) * 3, keys=keys)


def test_tritons_allocator_is_given_back() -> None:
    before = triton_allocator()
    with _launch.scratch_memory(True):
        assert triton_allocator() is not before
    assert triton_allocator() is before

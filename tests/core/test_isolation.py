# SPDX-License-Identifier: Apache-2.0
"""NaN and infinity in one sample and head leave all others bit for bit as they are, and give what PyTorch gives."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import segkern
from segkern import Grid, reference
from segkern.core.dispatch import triton_is_installed

# The interpreter takes its time.
BACKENDS = ["torch", *([pytest.param("triton", marks=pytest.mark.robustness)] if triton_is_installed() else [])]
BAD = {"NaN": math.nan, "infinity": math.inf, "minus infinity": -math.inf}
GRID = Grid(3, 5, start=1)
SHAPE = (3, 2, 18, 16)  # batch, heads, tokens with two outside of the grid, head_dim
SIGMA = (0.0, 1.2, math.inf)

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    # NumPy, which the interpreter computes with, reports the arithmetic of what is put in.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "seg_attention": lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, **o),
    "log-sum-exp": lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, return_lse=True, **o)[1],
    "gaussian_blur": lambda q, k, v, **o: segkern.gaussian_blur(q, GRID, SIGMA, **o),
    "attention_mass": lambda q, k, v, **o: segkern.attention_mass(q, k, **o),
    "attention_energy": lambda q, k, v, **o: segkern.attention_energy(q, k, GRID, SIGMA, **o),
    "coarse queries": lambda q, k, v, **o: segkern.seg_attention(q, k, v, GRID, SIGMA, query_stride=2, **o),
}


def poisoned(x: torch.Tensor, rng: random.Random, sample: int, head: int, bad: float) -> torch.Tensor:
    """One element of one head, or a whole token of it."""
    x = x.clone()
    token, channel = rng.randrange(x.shape[2]), rng.randrange(x.shape[3])
    x[sample, head, token, channel if rng.random() < 0.5 else slice(None)] = bad
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_other_samples_and_heads_are_bit_for_bit_the_same(name: str, backend: str) -> None:
    rng, call = random.Random(name), FUNCTIONS[name]
    clean = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    before = call(*clean, backend=backend)
    assert before.isfinite().all()
    turns = [(where, bad) for where in range(3) for bad in BAD.values()]
    for where, bad in turns if backend == "torch" else turns[::4]:
        for sample in range(3) if backend == "torch" else [where]:
            head = rng.randrange(2)
            tensors = list(clean)
            tensors[where] = poisoned(clean[where], rng, sample, head, bad)
            after = call(*tensors, backend=backend)
            others = torch.ones(SHAPE[:2], dtype=torch.bool)
            others[sample, head] = False
            assert torch.equal(after[others], before[others]), (where, bad, sample)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_what_is_affected_is_what_plain_pytorch_gives(bad: float, backend: str) -> None:
    """Without a blur element by element; NaN spreads over the grid as far as matrices of the reference carry it."""
    for seed in range(40 if backend == "torch" else 3):
        rng = random.Random(f"{bad} {seed}")
        generator = torch.Generator().manual_seed(seed)
        keys = rng.choice((15, 16, 32, 33))
        q, k, v = (torch.randn(1, 1, n, 16, generator=generator) for n in (18, keys, keys))
        where = rng.randrange(3)
        tensors = [q, k, v]
        tensors[where] = poisoned(tensors[where], rng, 0, 0, bad)
        found, lse = segkern.seg_attention(*tensors, GRID, 0.0, backend=backend, return_lse=True)
        expected, expected_lse = reference.seg_attention(*tensors, GRID, 0.0, return_lse=True)
        plain = torch.softmax(tensors[0] @ tensors[1].transpose(-1, -2) / 4, dim=-1) @ tensors[2]
        if backend == "torch":  # PyTorch's attention gives a query of NaN 0 on a CPU, and this is what serves the call
            expected = plain = F.scaled_dot_product_attention(*tensors)
        # To attention that knows of masks a row of logits of minus infinity is empty and gives 0, to softmax NaN.
        empty = (expected_lse == -math.inf)[..., None].expand_as(found)
        for wanted in (expected, plain):
            torch.testing.assert_close(found[~empty], wanted[~empty], rtol=1e-4, atol=1e-5, equal_nan=True)
        assert (found[empty].isnan() | (found[empty] == 0)).all()
        torch.testing.assert_close(lse[~empty[..., 0]], expected_lse[~empty[..., 0]], rtol=1e-4, atol=1e-4,
                                   equal_nan=True)  # fmt: skip
        if where == 0:
            for sigma in (1.2, math.inf):
                blurred = segkern.gaussian_blur(tensors[0], GRID, sigma, backend=backend)
                matrices = reference.gaussian_blur(tensors[0], GRID, sigma)
                good = matrices.isfinite()
                torch.testing.assert_close(blurred[good], matrices[good], rtol=1e-5, atol=1e-6)
                token = tensors[0].isfinite().logical_not().any(-1)
                assert not blurred[token].isfinite().all(), "what is bad stays bad where it is"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_results_are_the_same_bit_for_bit_at_every_run(name: str, backend: str) -> None:
    """As they must be in PyTorch's deterministic mode, in which these tests run, and are without it."""
    tensors = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    first = FUNCTIONS[name](*tensors, backend=backend)
    for turn in range(8 if backend == "torch" else 1):
        torch.use_deterministic_algorithms(turn % 2 == 1, warn_only=True)
        assert torch.equal(FUNCTIONS[name](*(x.clone() for x in tensors), backend=backend), first)

# SPDX-License-Identifier: Apache-2.0
"""Branches join a batch as copies of its conditional part and fold back into the guided prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from segkern.integrations.diffusers.runtime.branches import Batch, Join, difference, fold, summed

batches = st.builds(lambda samples, cfg: Batch(samples * (1 + cfg), samples * cfg), st.integers(1, 4), st.booleans())


@given(batches, st.integers(0, 3), st.integers(0, 3))
def test_missing_branches_are_the_conditional_samples(batch: Batch, joined: int, missing: int) -> None:
    x = torch.arange(float(batch.with_branches(joined)))[:, None].expand(-1, 2)
    grown = batch.fit(x, joined + missing)
    assert torch.equal(grown, torch.cat([x, *[x[batch.first : batch.size]] * missing]))
    for branch in range(joined, joined + missing):
        assert torch.equal(grown[batch.branch(branch)], x[batch.conditional])


def test_containers_grow_and_other_values_pass() -> None:
    batch = Batch(size=2, first=1)
    shared, other = torch.zeros(2, 3), torch.zeros(7, 3)
    grown = batch.fit({"text": (shared, [shared, None]), "other": other, "size": torch.Size([2, 2])}, 2)
    assert grown["text"][0].shape == grown["text"][1][0].shape == (4, 3)
    assert type(grown["text"]) is tuple
    assert type(grown["text"][1]) is list
    assert grown["text"][1][1] is None
    assert grown["other"] is other
    assert grown["size"] == torch.Size([2, 2])
    assert batch.fit(torch.tensor(2.0), 2).ndim == 0


class Block(torch.nn.Module):
    def forward(
        self,
        hidden_states: Any,
        temb: Any = None,
        upsample_size: Any = None,
        cross_attention_kwargs: Any = None,
    ) -> Any:
        return hidden_states, temb, upsample_size, cross_attention_kwargs


@pytest.mark.parametrize("positional", [True, False], ids=["positional", "keyword"])
def test_a_block_gets_branches_for_its_batch_first_arguments_only(positional: bool) -> None:
    block, x = Block(), torch.zeros(2, 3)
    join = Join(block)
    block.register_forward_pre_hook(join, with_kwargs=True)
    values = {"hidden_states": x, "temb": x, "upsample_size": (2, 2), "cross_attention_kwargs": {"masks": x}}

    def call() -> Any:
        return block(*values.values()) if positional else block(**values)

    assert call()[0] is x, "without a forward to act on, nothing is touched"
    join.batch, join.branches = Batch(2, 1), 1
    hidden_states, temb, size, untouched = call()
    assert hidden_states.shape == temb.shape == (3, 3)
    assert size == (2, 2)
    assert untouched["masks"] is x


def folded(output: torch.Tensor, batch: Batch, scales: list[float], rescaled: float | None) -> torch.Tensor:
    guided = [(scale, difference(output, batch, branch)) for branch, scale in enumerate(scales)]
    return fold(output, batch, summed(guided), rescaled)


scales = st.lists(st.floats(-5, 5), min_size=1, max_size=3)


@given(st.integers(1, 3), scales, st.floats(1.1, 12.0), st.booleans(), st.integers(0, 1000))
def test_folding_gives_the_formula_through_the_pipelines_own(
    samples: int, scales: list[float], g: float, rescaled: bool, seed: int
) -> None:
    batch = Batch(2 * samples, samples)
    output = torch.randn(
        batch.with_branches(len(scales)), 4, 3, 5, generator=torch.Generator().manual_seed(seed)
    ).double()
    u, c, *perturbed = output.chunk(2 + len(scales))
    expected = u + g * (c - u) + sum(s * (c - p) for s, p in zip(scales, perturbed, strict=True))
    folded_u, folded_c = folded(output, batch, scales, g if rescaled else None).chunk(2)
    torch.testing.assert_close(folded_u + g * (folded_c - folded_u), expected)
    if rescaled:
        assert torch.equal(folded_c, c), "guidance_rescale measures the unmodified conditional prediction"


@given(st.integers(1, 3), scales)
def test_folding_without_classifier_free_guidance_adds_to_the_prediction(samples: int, scales: list[float]) -> None:
    batch = Batch(samples, 0)
    output = torch.randn(batch.with_branches(len(scales)), 4, 2, 2, dtype=torch.float64)
    c, *perturbed = output.chunk(1 + len(scales))
    expected = c + sum(s * (c - p) for s, p in zip(scales, perturbed, strict=True))
    torch.testing.assert_close(folded(output, batch, scales, None), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_folding_sums_in_float32_and_rounds_once(dtype: torch.dtype) -> None:
    batch = Batch(2, 1)
    output = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = folded(output, batch, [3.0], None)
    u, c, p = output.float().chunk(3)
    assert found.dtype == dtype
    assert torch.equal(found, torch.cat([u + 3 * (c - p), c + 3 * (c - p)]).to(dtype))

# SPDX-License-Identifier: Apache-2.0
"""The cost of guidance for a transformer in floating-point operations, counted without data for SD 3.5 Medium."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from segkern.integrations.diffusers import PAG, SEG, SLG, guide
from segkern.ops import flops  # noqa: F401  the counter knows our operators by it

BLOCKS = 24
MODEL = "SD3Transformer2DModel"


@pytest.fixture(scope="module")
def pipe() -> Any:
    with torch.device("meta"):
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=128,
            num_layers=BLOCKS,
            attention_head_dim=64,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    names = ("vae", *(f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")))
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(names)
    )
    return pipe


def count(pipe: Any) -> dict[str, float]:
    """Return the operations of one call for one sample of 1024 x 1024 pixels, by module."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        pipe.transformer(
            hidden_states=torch.empty(1, 16, 128, 128),
            encoder_hidden_states=torch.empty(1, 333, 4096),
            pooled_projections=torch.empty(1, 2048),
            timestep=torch.empty(1),
        )
    return {name: float(sum(counts.values())) for name, counts in counter.get_flop_counts().items()}


@pytest.mark.filterwarnings("ignore:.*moved by nan")
@pytest.mark.parametrize(
    "first", [pytest.param(0, marks=pytest.mark.slow), 7, pytest.param(20, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_branch_costs_what_comes_from_its_first_block_on(pipe: Any, first: int) -> None:
    """Adds only a blur of the queries, which is cheap, and nothing for modules before or after the blocks."""
    plain = count(pipe)
    whole = plain["Global"]
    blocks = [plain[f"{MODEL}.transformer_blocks.{number}"] for number in range(BLOCKS)]
    bound = whole - sum(blocks[:first])

    def extra(spec: Any, share: bool = True) -> float:
        guidance = guide(pipe, spec, share=share, cfg="none")
        with guidance, guidance.run([1000.0]):
            return count(pipe)["Global"] - whole

    assert bound <= extra(SEG(sigma=10.0, layers=first)) <= 1.002 * bound
    for cheaper in (SEG(layers=first), PAG(layers=first)):
        assert extra(cheaper) < bound
    assert extra(SEG(sigma=10.0, layers=first), share=False) == pytest.approx(whole, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*moved by nan")
@pytest.mark.slow
@pytest.mark.parametrize(("skipped", "first"), [((7, 8, 9), 7), ((3, 20), 3)])
def test_skipped_blocks_cost_nothing(pipe: Any, skipped: tuple[int, ...], first: int) -> None:
    plain = count(pipe)
    whole = plain["Global"]
    blocks = [plain[f"{MODEL}.transformer_blocks.{number}"] for number in range(BLOCKS)]

    def extra(spec: Any, share: bool = True) -> float:
        guidance = guide(pipe, spec, share=share, cfg="none")
        with guidance, guidance.run([1000.0]):
            return count(pipe)["Global"] - whole

    spec = SLG(layers=skipped, start=0.0, stop=1.0)
    omitted = sum(blocks[number] for number in skipped)
    assert extra(spec) == whole - sum(blocks[:first]) - sum(blocks[number] for number in skipped if number >= first)
    assert extra(spec, share=False) == whole - omitted

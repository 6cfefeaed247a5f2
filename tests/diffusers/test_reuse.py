# SPDX-License-Identifier: Apache-2.0
"""A perturbed branch that is reused in several steps is computed only when it is due."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from tests.diffusers.slow_guidance import looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline


def batches(pipe: Any, **arguments: Any) -> tuple[torch.Tensor, list[int]]:
    """Return latents of a run and the number of samples after the denoiser's last block, by step."""
    seen: list[int] = []
    handle = pipe.unet.conv_out.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    try:
        return run(pipe, **arguments), seen
    finally:
        handle.remove()


@pytest.mark.parametrize("cfg", [5.0, 1.0], ids=["cfg", "no cfg"])
def test_other_steps_cost_what_a_plain_step_costs(cfg: float) -> None:
    pipe, own = tiny_pipeline(), 2 if cfg > 1 else 1
    with guide(pipe, SEG(sigma=2.0, reuse=3, start=0.2)) as guidance:
        _, seen = batches(pipe, latents=noise(), num_inference_steps=8, guidance_scale=cfg)
    # Guidance starts after steps 0 and 1.
    assert seen == [own, own, own + 1, own, own, own + 1, own, own]
    assert {row.fired for row in guidance.report().layers} == {2}


def test_every_run_and_every_size_begins_with_a_computed_branch() -> None:
    pipe, spec = tiny_pipeline(), SEG(2.0, 1.0, reuse=4)
    runs = [noise(seed=1), noise(seed=2), noise(1, 12, 20)]
    expected = [looped_run(pipe, [spec], latents=latents) for latents in runs]
    with guide(pipe, spec):
        for latents, output in zip(runs, expected, strict=True):
            result, seen = batches(pipe, latents=latents)
            assert seen == [3, 2, 2]
            assert relative(result, output) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("reuse", [0, -1, 1.5, True, "2", None])
def test_what_is_no_number_of_steps_is_refused(reuse: Any) -> None:
    with pytest.raises(ValueError, match=r"SEG\.reuse must be an integer of at least 1"):
        SEG(reuse=reuse)


def test_a_run_takes_nothing_from_the_one_before_wherever_a_guidance_begins() -> None:
    """Guidance acts in two calls of a run, so a third call would still reuse the first run's difference."""
    pipe, spec = tiny_pipeline(), SEG(2.0, 1.0, reuse=3, start=0.3)
    with guide(pipe, spec):
        run(pipe, latents=noise(seed=4))
        result, seen = batches(pipe, latents=noise(seed=5))
    assert seen == [2, 3, 2]
    assert relative(result, looped_run(pipe, [spec], latents=noise(seed=5))) < PIPELINE_TOLERANCE

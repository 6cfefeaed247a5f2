# SPDX-License-Identifier: Apache-2.0
"""A perturbed branch that serves several steps is computed when it is due, and not otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import SEG, guide
from segkern.integrations.diffusers.runtime.denoisers import UNet
from tests.diffusers.probes import hooks_of
from tests.diffusers.slow_guidance import looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline


def batches(pipe: Any, **arguments: Any) -> tuple[torch.Tensor, list[int]]:
    """Latents of a run and the samples that left the denoiser's last block, step by step."""
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
    # Steps 0 and 1 come before it acts.
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


def test_a_run_that_was_cut_off_leaves_nothing_for_the_next() -> None:
    pipe, spec = tiny_pipeline(), SEG(2.0, 1.0, reuse=4)

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with guide(pipe, spec):
        with pytest.raises(KeyboardInterrupt):
            run(pipe, latents=noise(seed=3), callback_on_step_end=stop)
        found = run(pipe, latents=noise())
    assert relative(found, looped_run(pipe, [spec], latents=noise())) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("reuse", [0, -1, 1.5, True, "2", None])
def test_what_is_no_number_of_steps_is_refused(reuse: Any) -> None:
    with pytest.raises(ValueError, match=r"SEG\.reuse must be an integer of at least 1"):
        SEG(reuse=reuse)


def test_plain_steps_of_a_guided_run_find_the_denoiser_as_it_was() -> None:
    """Nothing of ours is in them: what was compiled for plain forwards serves them."""
    pipe = tiny_pipeline(own_unet=True)
    processors, hooks = dict(pipe.unet.attn_processors), hooks_of(pipe.unet)
    seen: list[tuple[int, bool]] = []

    def note(module: Any, args: Any) -> None:
        same = all(pipe.unet.attn_processors[name] is processor for name, processor in processors.items())
        seen.append((hooks_of(pipe.unet), same))

    handle = pipe.unet.conv_in.register_forward_pre_hook(note)
    with guide(pipe, SEG(sigma=2.0, start=0.3, stop=0.6)):
        run(pipe, latents=noise(), num_inference_steps=4)
        with pytest.raises(ValueError, match="is guided already"):
            guide(pipe, SEG())
    handle.remove()
    plain = hooks + 3  # the denoiser's two and this test's
    assert [each[1] for each in seen] == [True, True, False, True]
    assert [each[0] == plain for each in seen] == [True, True, False, True]
    assert hooks_of(pipe.unet) == hooks


def test_a_guidance_that_could_not_begin_leaves_the_denoiser_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(own_unet=True)
    with monkeypatch.context() as patched:
        patched.setattr(UNet, "hook_grids", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            guide(pipe, SEG())
    with guide(pipe, SEG(sigma=2.0)) as second:
        run(pipe, latents=noise(), num_inference_steps=1)
    third = guide(pipe, SEG(sigma=2.0))
    second.remove()  # is off already: the third one stays
    with pytest.raises(ValueError, match="is guided already"):
        guide(pipe, SEG())
    with third:
        run(pipe, latents=noise(), num_inference_steps=1)


def test_a_run_takes_nothing_from_the_one_before_wherever_a_guidance_begins() -> None:
    """Two forwards act in a run, so that a third one would still take the first run's difference."""
    pipe, spec = tiny_pipeline(), SEG(2.0, 1.0, reuse=3, start=0.3)
    with guide(pipe, spec):
        run(pipe, latents=noise(seed=4))
        found, seen = batches(pipe, latents=noise(seed=5))
    assert seen == [2, 3, 2]
    assert relative(found, looped_run(pipe, [spec], latents=noise(seed=5))) < PIPELINE_TOLERANCE

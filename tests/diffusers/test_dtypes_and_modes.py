# SPDX-License-Identifier: Apache-2.0
"""Other dtypes, modes and gradients around a guided run, and back again: the first results are reproduced."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from segkern.integrations.diffusers import guide
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.subjects import QWEN, SD1, SD3, SDXL, Subject, every, kinds, left_as_it_was


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", ["SEG", "SEG, infinite", "PAG", "SLG, TPG", "SEG, PAG, SAG"])
@pytest.mark.parametrize("subject", every(SD3))
def test_another_dtype(subject: Subject, kind: str) -> None:
    specs = kinds(subject).get(kind, (subject.seg(reuse=2),))
    with left_as_it_was(subject, *specs) as (pipe, _):
        first = subject.run(pipe)
        for dtype in (torch.float64, torch.bfloat16):
            model = subject.denoiser(pipe)
            kept = [(parameter, parameter.data) for parameter in model.parameters()]
            buffers = [(module, dict(module._buffers)) for module in model.modules()]
            model.to(dtype)
            with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
                result = _in(subject, pipe, dtype)
            fresh = subject.build()  # moved first, then guided
            subject.denoiser(fresh).to(dtype)
            with guide(fresh, *specs), torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
                moved = _in(subject, fresh, dtype)
            for parameter, values in kept:
                parameter.data = values
            for module, own in buffers:
                module._buffers.update(own)
            assert result.isfinite().all()
            assert torch.equal(result, moved)
            assert torch.equal(subject.run(pipe), first)


def _in(subject: Subject, pipe: Any, dtype: torch.dtype) -> torch.Tensor:
    """Run a denoiser of this dtype with inputs of this dtype."""
    model = subject.denoiser(pipe)

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cast(item) for name, item in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def convert(_: Any, args: Any, kwargs: Any) -> Any:
        return tuple(map(cast, args)), cast(kwargs)

    handle = model.register_forward_pre_hook(convert, with_kwargs=True, prepend=True)
    try:
        return subject.run(pipe)
    finally:
        handle.remove()


@pytest.mark.parametrize("subject", every(QWEN))
def test_autocast(subject: Subject) -> None:
    for specs in kinds(subject).values():
        with left_as_it_was(subject, *specs) as (pipe, _):
            first = subject.run(pipe)
            model, dtypes = subject.denoiser(pipe), []
            handle = model.register_forward_hook(lambda _, __, output, seen=dtypes: seen.append(output[0].dtype))
            with torch.autocast("cpu", torch.bfloat16):
                result = subject.run(pipe)
            handle.remove()
            assert set(dtypes) == {torch.bfloat16}
            assert 0.0 < relative(result.float(), first) < 0.5
            assert relative(subject.run(pipe), first) < PIPELINE_TOLERANCE


@pytest.mark.parametrize("reuse", [pytest.param(1, marks=pytest.mark.robustness), 2])
@pytest.mark.parametrize("subject", [SD1, pytest.param(SDXL, marks=pytest.mark.robustness)], ids=["sd1", "sdxl"])
def test_gradients_after_inference_mode(subject: Subject, reuse: int) -> None:
    specs = subject.seg(reuse=reuse), subject.seg(sigma=float("inf"), scale=1.0)
    with left_as_it_was(subject, *specs) as (pipe, _):
        first = subject.run(pipe)
        for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
            with mode():
                assert torch.equal(subject.run(pipe), first)
        given: list[Any] = []

        def note(_: Any, args: Any, kwargs: Any) -> None:
            given[:] = [args, kwargs]

        handle = pipe.unet.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        subject.run(pipe)
        handle.remove()
        args, kwargs = given
        sample = args[0].clone().requires_grad_()
        guidance = guide(pipe.unet, *specs, cfg="batch")  # in addition to the pipeline's
        with torch.enable_grad(), guidance, guidance.run(pipe.scheduler.timesteps):
            output = pipe.unet(sample, *args[1:], **kwargs)[0]
            (gradient,) = torch.autograd.grad(output.square().sum(), sample)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0.0
        assert torch.equal(subject.run(pipe), first)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("subject", every(SD3))
def test_deterministic_algorithms(subject: Subject) -> None:
    for specs in kinds(subject).values():
        with left_as_it_was(subject, *specs) as (pipe, _):
            first = subject.run(pipe)
            assert first.isfinite().all()
            torch.use_deterministic_algorithms(False)
            result = subject.run(pipe)
            torch.use_deterministic_algorithms(True, warn_only=True)
            assert relative(result, first) < PIPELINE_TOLERANCE

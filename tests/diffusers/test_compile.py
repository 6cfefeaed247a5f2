# SPDX-License-Identifier: Apache-2.0
"""A compiled denoiser has the eager denoiser's latents under guidance and is not recompiled at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from segkern.integrations.diffusers import CFG, PAG, SAG, SEG, SLG, TPG, guide
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, smaller_pipeline
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer


def wrapped(pipe: Any, backend: Any) -> None:
    pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)


def in_place(pipe: Any, backend: Any) -> None:
    pipe.unet.compile(backend=backend, fullgraph=True)


def repeated_blocks(pipe: Any, backend: Any) -> None:
    pipe.unet.compile_repeated_blocks(backend=backend, fullgraph=True)


def drawn(pipe: Any, guidances: Sequence[Sequence[Any]], **arguments: Any) -> list[torch.Tensor]:
    """Return latents of a run under each of these guidance settings."""
    outputs = []
    for specs in guidances:
        with guide(pipe, *specs):
            outputs.append(run(pipe, **arguments))
    return outputs


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "compile_, spec",
    [
        pytest.param(wrapped, SEG(sigma=2.0, layers="m0", start=0.3), marks=pytest.mark.slow),
        pytest.param(in_place, SEG(layers="m0"), marks=pytest.mark.slow),
        (repeated_blocks, SEG(layers="m0", start=0.3)),
        pytest.param(wrapped, TPG(layers=["m0", "u0"]), marks=pytest.mark.slow),
        (repeated_blocks, TPG(layers=["m0", "u0"])),
        pytest.param(in_place, SLG(layers="mid", start=0.0, stop=1.0), marks=pytest.mark.slow),
        pytest.param(repeated_blocks, SLG(layers="mid", start=0.0, stop=1.0), marks=pytest.mark.slow),
    ],
    ids=[
        "wrapped",
        "in_place",
        "repeated_blocks",
        "wrapped, TPG",
        "repeated_blocks, TPG",
        "in_place, SLG",
        "repeated_blocks, SLG",
    ],
)
def test_a_compiled_denoiser_is_guided_and_left_alone_afterwards(
    compile_: Callable[[Any, Any], None], spec: SEG | SLG | TPG
) -> None:
    pipe, latents, counter = smaller_pipeline(), noise(), CompileCounter()
    plain = run(pipe, latents=latents)
    with guide(pipe, spec):
        guided = run(pipe, latents=latents)
    compile_(pipe, counter)
    compiled = []
    for _ in range(2):
        assert relative(run(pipe, latents=latents), plain) < PIPELINE_TOLERANCE
        with guide(pipe, spec) as guidance:
            assert relative(run(pipe, latents=latents), guided) < PIPELINE_TOLERANCE
        assert guidance.report().layers[0].fired == (2 if spec.start else 3)
        compiled.append(counter.frame_count)
    assert relative(run(pipe, latents=latents), plain) < PIPELINE_TOLERANCE
    assert 0 < compiled[0] == compiled[1] == counter.frame_count, "a second run was compiled again"


@pytest.mark.slow
def test_another_guidance_does_not_run_what_was_compiled_for_the_last_one() -> None:
    pipe, arguments = smaller_pipeline(), {"latents": noise(), "num_inference_steps": 1}
    guidances = [[SEG(sigma=2.0, layers="m0")], [SEG(layers="m0"), SEG(1.0, math.inf, "u0")]]
    expected = drawn(pipe, guidances, **arguments)
    wrapped(pipe, "eager")
    for output, eager in zip(drawn(pipe, guidances, **arguments), expected, strict=True):
        assert relative(output, eager) < PIPELINE_TOLERANCE


@pytest.mark.slow
def test_compiling_inside_the_context() -> None:
    pipe, latents = smaller_pipeline(), noise()
    denoiser = pipe.unet
    with guide(pipe, SEG(layers="m0")):
        expected = run(pipe, latents=latents)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        assert relative(run(pipe, latents=latents), expected) < PIPELINE_TOLERANCE
    assert not denoiser._forward_hooks


@pytest.mark.slow
def test_a_compiled_denoiser_is_guided_at_every_size() -> None:
    pipe = smaller_pipeline()
    sizes = [(16, 16), (12, 20), (20, 12), (8, 24)]
    with guide(pipe, SEG(sigma=2.0, layers="m0")):
        expected = [run(pipe, latents=noise(1, *size), num_inference_steps=1) for size in sizes]
    counter = CompileCounter()
    wrapped(pipe, counter)
    with guide(pipe, SEG(sigma=2.0, layers="m0")):
        for size, output in zip(sizes, expected, strict=True):
            result = run(pipe, latents=noise(1, *size), num_inference_steps=1)
            assert relative(result, output) < PIPELINE_TOLERANCE
    assert counter.frame_count < len(sizes), "sizes do not share compiled code"


@pytest.mark.slow
def test_other_sigmas_and_scales_need_no_compilation() -> None:
    pipe, arguments = smaller_pipeline(), {"latents": noise(), "num_inference_steps": 1}
    values = [(9.0, 2.0), (30.0, 2.0), (30.0, 0.7), (-20.0, 0.6)]
    guidances = [[SEG(scale, sigma, "m0")] for scale, sigma in values]
    expected = drawn(pipe, guidances, **arguments)
    counter = CompileCounter()
    wrapped(pipe, counter)
    for output, eager in zip(drawn(pipe, guidances, **arguments), expected, strict=True):
        assert relative(output, eager) < PIPELINE_TOLERANCE
    assert counter.frame_count == 1
    assert relative(expected[2], expected[1]) > 1e-4, "a change of sigma would not be detected"


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [2.0, math.inf], ids=str)
def test_guidance_costs_one_compilation_besides_the_plain_one(sigma: float) -> None:
    pipe, latents, counter = smaller_pipeline(), noise(), CompileCounter()
    wrapped(pipe, counter)
    run(pipe, latents=latents, num_inference_steps=2)
    plain = counter.frame_count
    for start in (0.0, 0.5):  # with unguided steps in the same run
        with guide(pipe, SEG(sigma=sigma, layers="m0", start=start)):
            run(pipe, latents=latents, num_inference_steps=2)
    run(pipe, latents=latents, num_inference_steps=2)
    assert counter.frame_count == plain + 1


@pytest.mark.parametrize(
    ("specs", "guidance_scale", "frames"),
    [
        ((PAG(layers="m0"),), 5.0, 1),
        ((SAG(),), 5.0, 2),  # two batch sizes: the pipeline's batch, and half of it
        ((CFG(), PAG(layers="u0"), SEG(sigma=[(1.0, 3.0)], layers="m0", blend=0.5)), 1.0, 1),
    ],
    ids=["PAG", "SAG", "CFG, PAG and SEG"],
)
@pytest.mark.slow
def test_the_family_is_compiled_without_a_break(specs: tuple[Any, ...], guidance_scale: float, frames: int) -> None:
    pipe, latents, counter = smaller_pipeline(), noise(), CompileCounter()
    arguments = {"latents": latents, "guidance_scale": guidance_scale}
    with guide(pipe, *specs):
        expected = run(pipe, **arguments)
    wrapped(pipe, counter)
    with guide(pipe, *specs):
        assert relative(run(pipe, **arguments), expected) < PIPELINE_TOLERANCE
    assert counter.frame_count == frames


@pytest.mark.slow
def test_a_compiled_denoiser_in_channels_last_with_slicing() -> None:
    pipe, latents = smaller_pipeline(), noise()
    spec = SEG(sigma=2.0, layers="m0")
    with guide(pipe, spec):
        expected = run(pipe, latents=latents, num_inference_steps=2)
    pipe.vae.enable_slicing()
    pipe.unet.to(memory_format=torch.channels_last)
    for compile_ in (lambda pipe, backend: None, wrapped):
        compile_(pipe, "eager")
        with guide(pipe, spec):
            assert relative(run(pipe, latents=latents, num_inference_steps=2), expected) < PIPELINE_TOLERANCE


@pytest.mark.slow
def test_the_code_that_inductor_writes_gives_the_same_latents() -> None:
    pipe, arguments = smaller_pipeline(), {"latents": noise(), "num_inference_steps": 1}
    guidances = [[SEG(2.0, 2.0, "m0")], [SEG(2.0, 0.8, "m0")]]
    expected = drawn(pipe, guidances, **arguments)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, mode="reduce-overhead")
    for output, eager in zip(drawn(pipe, guidances, **arguments), expected, strict=True):
        assert relative(output, eager) < PIPELINE_TOLERANCE


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sigma", [2.0, math.inf], ids=str)
def test_a_guided_step_in_a_cuda_graph(sigma: float) -> None:
    """Decisions that ``guide`` makes before a call are made during graph capture. Replays repeat them."""
    pipe = smaller_pipeline().to("cuda", torch.float16)
    texts = pipe.encode_prompt("a red fox", do_classifier_free_guidance=True)
    text, pooled = torch.cat([texts[1], texts[0]]), torch.cat([texts[3], texts[2]])
    sample = noise().to("cuda", torch.float16).repeat(2, 1, 1, 1)
    conditions = {"text_embeds": pooled, "time_ids": torch.zeros(2, 6, device="cuda", dtype=torch.float16)}
    pipe._guidance_scale, pipe._guidance_rescale, pipe._num_timesteps = 5.0, 0.0, 100
    pipe.scheduler.set_timesteps(100, device="cuda")
    step = torch.tensor(10.0, device="cuda")

    def forward() -> torch.Tensor:
        prediction = pipe.unet(
            sample, step, encoder_hidden_states=text, added_cond_kwargs=conditions, return_dict=False
        )
        assert isinstance(prediction[0], torch.Tensor)
        return prediction[0]

    with torch.no_grad(), guide(pipe, SEG(sigma=sigma, layers="m0")):
        expected = forward()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            forward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = forward()
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert relative(captured, expected) < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_a_compiled_transformer_needs_no_graph_for_each_size(name: str) -> None:
    model = MODELS[name]
    pipe, spec = model.build(), SEG(sigma=1.5, layers=model.layers)

    def drawn() -> list[torch.Tensor]:
        outputs = []
        with guide(pipe, spec):
            for size in [(4, 4), (6, 4), (8, 6), (4, 8), (6, 10)]:
                outputs.append(run_transformer(model, pipe, *size, num_inference_steps=1))
                made.append(counter.frame_count)
        return outputs

    counter, made = CompileCounter(), [0]
    expected = drawn()
    pipe.transformer = torch.compile(pipe.transformer, backend=counter, fullgraph=True)
    made = []
    for output, eager in zip(drawn(), expected, strict=True):
        assert relative(output, eager) < PIPELINE_TOLERANCE
    assert made[2] == made[-1], "sizes do not share compiled code"

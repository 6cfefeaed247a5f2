# SPDX-License-Identifier: Apache-2.0
"""Steps of a run: in which steps guidance with ``start`` and ``stop`` acts, by the run's timesteps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch

from segkern.integrations.diffusers import SEG, GuidanceWarning, guide
from tests.diffusers import unet_cases
from tests.diffusers.slow_guidance import looped_run
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, noise, relative, run, tiny_pipeline, tiny_sd
from tests.diffusers.transformer_cases import MODELS
from tests.diffusers.transformer_cases import run as run_transformer
from tests.diffusers.unet_image_cases import IMAGES

MIDDLE = {"start": 0.25, "stop": 0.75}


def fired(pipe: Any, spec: SEG, draw: Any) -> list[int]:
    """Return how often guidance acted in each step of the pipeline, as seen by its callbacks."""
    sums = [0]
    with guide(pipe, spec) as guidance:

        def note(pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            sums.append(guidance.report().layers[0].fired)
            return given

        draw(callback_on_step_end=note)
    return [after - before for before, after in pairwise(sums)]


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


SCHEDULERS = {
    "DEISMultistepScheduler": [0, 1, 1, 0],
    "TCDScheduler": [0, 1, 1, 0],
    "UniPCMultistepScheduler": [0, 1, 1, 0],
    "DDPMScheduler": [0, 1, 1, 0],
    "HeunDiscreteScheduler": [0, 0, 1, 1, 1, 1, 0],
    "PNDMScheduler": [0, 0, 1, 1, 0],  # the second timestep is repeated: five fractions
}


@pytest.mark.one_in(4)
@pytest.mark.filterwarnings("ignore::segkern.integrations.diffusers.GuidanceWarning")
@pytest.mark.parametrize("task", ["text", "image"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_fractions_are_of_the_steps_that_run(name: str, task: str) -> None:
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    pipe = tiny_pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(dict(pipe.scheduler.config), **options)
    if task == "image":
        image = quiet(diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components))
        given = {"image": torch.rand(1, 3, 32, 32), "strength": 0.5, "num_inference_steps": 8, "output_type": "latent"}
        assert fired(image, SEG(3.0, 1.0, **MIDDLE), lambda **more: image("a fox", **given, **more)) == SCHEDULERS[name]
    else:
        draw = {"latents": noise(), "num_inference_steps": 4}
        assert fired(pipe, SEG(3.0, 1.0, **MIDDLE), lambda **more: run(pipe, **draw, **more)) == SCHEDULERS[name]


@pytest.mark.filterwarnings("ignore::segkern.integrations.diffusers.GuidanceWarning")
def test_a_base_and_a_refiner_have_fractions_of_their_own() -> None:
    pipe, spec = tiny_pipeline(), SEG(3.0, 1.0, **MIDDLE)
    refiner = quiet(diffusers.StableDiffusionXLImg2ImgPipeline(**pipe.components))
    base = {"latents": noise(), "num_inference_steps": 8, "denoising_end": 0.5}
    assert fired(pipe, spec, lambda **more: run(pipe, **base, **more)) == [0, 1, 1, 0]
    rest = {"image": noise(), "num_inference_steps": 8, "denoising_start": 0.5, "output_type": "latent"}
    assert fired(refiner, spec, lambda **more: refiner("a fox", **rest, **more)) == [0, 1, 1, 0]
    custom = {"latents": noise(), "timesteps": [900, 700, 400, 100]}
    assert fired(pipe, spec, lambda **more: run(pipe, **custom, **more)) == [0, 1, 1, 0]


@pytest.mark.filterwarnings("ignore::segkern.integrations.diffusers.GuidanceWarning")
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_timesteps_that_are_equal_in_bfloat16(name: str) -> None:
    model, steps = MODELS[name], 40
    pipe = model.build().to(torch.bfloat16)
    given = {
        key: value.to(torch.bfloat16) for key, value in model.call(6, 4, 1, False).items() if torch.is_tensor(value)
    }
    spec = SEG(3.0, 1.0, layers=model.layers, stop=0.5)
    draw = {**given, "num_inference_steps": steps, "cfg": False}
    calls = fired(pipe, spec, lambda **more: run_transformer(model, pipe, **draw, **more))
    assert calls == [1] * (steps // 2) + [0] * (steps // 2)


class NewTimesteps(diffusers.DDIMScheduler):
    """A scheduler whose timesteps are a property that returns a new tensor, or list, each time."""

    listed = False

    @property
    def timesteps(self) -> Any:
        kept: torch.Tensor = vars(self)["kept"]
        return list(kept) if self.listed else kept.clone()

    @timesteps.setter
    def timesteps(self, value: torch.Tensor) -> None:
        vars(self)["kept"] = value


class ListedTimesteps(NewTimesteps):
    listed = True


@pytest.mark.parametrize("kind", [NewTimesteps, ListedTimesteps])
def test_timesteps_that_are_a_property(kind: Any) -> None:
    spec, pipe = SEG(3.0, 1.0, start=0.25, stop=0.75), tiny_sd()
    expected = looped_run(pipe, [spec], latents=noise(), num_inference_steps=4)
    pipe = tiny_sd(scheduler=kind.from_config(pipe.scheduler.config))
    with guide(pipe, spec):
        assert relative(run(pipe, latents=noise(), num_inference_steps=4), expected) < PIPELINE_TOLERANCE


def test_one_step_is_the_first() -> None:
    pipe = tiny_sd()
    expected = looped_run(pipe, [SEG(3.0, 1.0)], latents=noise(), num_inference_steps=1)
    with guide(pipe, SEG(3.0, 1.0, stop=0.1)):
        assert relative(run(pipe, latents=noise(), num_inference_steps=1), expected) < PIPELINE_TOLERANCE


def test_a_timestep_that_is_none_of_the_runs() -> None:
    """It is refused if guidance depends on the step, and guided if guidance is constant."""
    pipe = tiny_sd()
    text = torch.randn(1, 7, pipe.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    guidance = guide(pipe.unet, SEG(3.0, 1.0, stop=0.5), cfg="none")
    with guidance.run([900.0, 500.0]), pytest.raises(ValueError, match="timestep 700, which is none of the 2"):
        pipe.unet(noise(), 700, text)
    with pytest.warns(GuidanceWarning, match="fired in none"):
        guidance.remove()
    with guide(pipe.unet, SEG(3.0, 1.0), cfg="none") as guidance:
        with guidance.run([900.0, 500.0]):
            moved = pipe.unet(noise(), 700, text).sample
        with guidance.run([700.0]):
            assert torch.equal(pipe.unet(noise(), 700, text).sample, moved)


@pytest.mark.parametrize("name", ["sdxl-adapter", "sdxl-controlnet"])
def test_halves_of_a_run_that_ends_early(name: str) -> None:
    """Covers pipelines that cut the scheduler's timesteps without indicating it."""
    case = IMAGES[name]
    pipe = case.build(case)
    for spec in (SEG(sigma=1.5, stop=0.5, layers="down"), SEG(sigma=1.5, start=0.5, layers="down")):
        with guide(pipe, spec) as guidance:
            unet_cases.run(case, pipe, True, num_inference_steps=8, denoising_end=0.5)
        report = guidance.report()
        assert (report.layers[0].fired, report.forwards) == (2, 4)

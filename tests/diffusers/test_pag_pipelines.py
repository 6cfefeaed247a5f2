# SPDX-License-Identifier: Apache-2.0
"""``guide(pipe, PAG(...))`` on the pipeline of a task equals diffusers' own PAG pipeline for that task.

``test_pag.py`` covers text to image with Stable Diffusion 1 and XL, and the meaning of the arguments.
"""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest

from segkern.integrations.diffusers import PAG, guide
from tests.compatibility import proves
from tests.diffusers import transformer_cases, unet_cases
from tests.diffusers.proven_cells import of_transformer, of_unet
from tests.diffusers.small_pipelines import PIPELINE_TOLERANCE, relative
from tests.diffusers.transformer_task_cases import TASKS
from tests.diffusers.unet_image_cases import IMAGES
from tests.diffusers.unet_video_cases import MOTION

UNETS = {
    "sd1-image": "StableDiffusionPAGImg2ImgPipeline",
    "sd1-inpaint-4": "StableDiffusionPAGInpaintPipeline",
    "sd1-inpaint-9": "StableDiffusionPAGInpaintPipeline",
    "sd1-ip-adapter": "StableDiffusionPAGPipeline",
    "sd1-controlnet": "StableDiffusionControlNetPAGPipeline",
    "sd1-controlnets": "StableDiffusionControlNetPAGPipeline",
    "sd1-controlnet-inpaint": "StableDiffusionControlNetPAGInpaintPipeline",
    "sd2": "StableDiffusionPAGPipeline",
    "sdxl-image": "StableDiffusionXLPAGImg2ImgPipeline",
    "sdxl-refiner": "StableDiffusionXLPAGImg2ImgPipeline",
    "sdxl-inpaint-9": "StableDiffusionXLPAGInpaintPipeline",
    "sdxl-controlnet": "StableDiffusionXLControlNetPAGPipeline",
    "sdxl-controlnet-image": "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    "kolors": "KolorsPAGPipeline",
    "animatediff": "AnimateDiffPAGPipeline",
}

TRANSFORMERS = {
    "sd3": "StableDiffusion3PAGPipeline",
    "pixart-sigma": "PixArtSigmaPAGPipeline",
    "hunyuan-dit": "HunyuanDiTPAGPipeline",
}

CASES = {**IMAGES, **MOTION}
UNET_RUNS = [(name, cfg) for name in UNETS for cfg in (True, False) if CASES[name].scales[0 if cfg else 1] is not None]

# Without text guidance, diffusers' pipeline for Hunyuan-DiT itself fails.
TRANSFORMER_RUNS = [(name, cfg) for name in TRANSFORMERS for cfg in (True, False) if cfg or name != "hunyuan-dit"]

CFG_OR_NOT = pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no-cfg"])


def other(kind: Any, pipe: Any, layers: str | list[str], **more: Any) -> Any:
    """Return a pipeline of another class with the components of this one."""
    taken = inspect.signature(kind.__init__).parameters
    given = {name: part for name, part in {**pipe.config, **pipe.components, **more}.items() if name in taken}
    made = kind(**given, **({} if layers == "" else {"pag_applied_layers": layers}))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.one_in(5)
@proves(guidance="PAG")
@pytest.mark.parametrize(
    ("name", "cfg"), [pytest.param(*case, marks=of_unet(case[0], UNETS[case[0]])) for case in UNET_RUNS]
)
def test_unets(name: str, cfg: bool) -> None:
    """Compares with latents of diffusers' own PAG pipeline for the task."""
    case, where = CASES[name], "mid" if cfg else "up"
    pipe = case.build(case)
    plain = unet_cases.run(case, pipe, cfg)
    with guide(pipe, PAG(scale=2.5, layers=where)):
        ours = unet_cases.run(case, pipe, cfg)
    # Their patterns match substrings of names, and "mid_block" alone also matches motion modules.
    theirs = other(unet_cases.kind_of(UNETS[name]), pipe, f"{where}_block.*attentions")
    expected = unet_cases.run(case, theirs, cfg, pag_scale=2.5)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE
    assert relative(ours, expected) < PIPELINE_TOLERANCE


@proves(guidance="PAG")
@pytest.mark.parametrize(
    ("name", "cfg"), [pytest.param(*case, marks=of_transformer(case[0])) for case in TRANSFORMER_RUNS]
)
def test_transformers(name: str, cfg: bool) -> None:
    """Compares with latents of diffusers' own PAG pipeline for the model."""
    model = transformer_cases.MODELS[name]
    pipe = model.build()
    plain = transformer_cases.run(model, pipe, samples=2, cfg=cfg)
    with guide(pipe, PAG(scale=2.5, layers=[1, 3])):
        ours = transformer_cases.run(model, pipe, samples=2, cfg=cfg)
    theirs = other(getattr(diffusers, TRANSFORMERS[name]), pipe, ["blocks.1", "blocks.3"])
    expected = transformer_cases.run(model, theirs, samples=2, cfg=cfg, pag_scale=2.5)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE
    assert relative(ours, expected) < PIPELINE_TOLERANCE


@proves(group="Transformers", model="Stable Diffusion 3", task="image to image", guidance="PAG")
@CFG_OR_NOT
def test_stable_diffusion_3_from_an_image(cfg: bool) -> None:
    """Compares with latents of diffusers' own PAG pipeline for the task."""
    model = TASKS["sd3 img2img"]
    pipe = model.build()
    given = {"samples": 2, "cfg": cfg, "strength": 0.7}
    plain = transformer_cases.run(model, pipe, **given)
    with guide(pipe, PAG(scale=2.5, layers=2)):
        ours = transformer_cases.run(model, pipe, **given)
    theirs = other(diffusers.StableDiffusion3PAGImg2ImgPipeline, pipe, "blocks.2")
    expected = transformer_cases.run(model, theirs, **given, pag_scale=2.5)
    assert relative(plain, expected) > 10 * PIPELINE_TOLERANCE
    assert relative(ours, expected) < PIPELINE_TOLERANCE

# SPDX-License-Identifier: Apache-2.0
"""Smoothed Energy Guidance and related guidance methods for unmodified diffusers pipelines.

``guide`` enables guidance on a pipeline for any task and disables it on exit:

    with guide(pipe, SEG(scale=3.0, sigma=math.inf, layers="mid")) as guidance:
        image = pipe("a red fox", guidance_scale=5.0).images[0]
    print(guidance.report())

``SEGGuider``, ``PAGGuider``, ``SAGGuider``, ``SLGGuider`` and ``TPGGuider`` are guiders for modular pipelines.

``record_energy`` records the energy of a pipeline's self-attention; see :mod:`segkern.energy`.
"""

from importlib.util import find_spec

if find_spec("diffusers") is None:
    raise ModuleNotFoundError(
        'segkern.integrations.diffusers needs diffusers; pip install "segkern[diffusers]"', name="diffusers"
    )

from segkern.integrations.diffusers.guiders import PAGGuider, SAGGuider, SEGGuider, SLGGuider, TPGGuider
from segkern.integrations.diffusers.models.layers import LayerInfo, list_layers
from segkern.integrations.diffusers.pipelines import StableDiffusionXLSEGPipeline
from segkern.integrations.diffusers.runtime.energy_recorder import EnergyRecorder, LayerEnergy, record_energy
from segkern.integrations.diffusers.runtime.guidance import Guidance, guide
from segkern.integrations.diffusers.runtime.processor import SEGAttnProcessor
from segkern.integrations.diffusers.runtime.report import GuidanceWarning, LayerReport, Report
from segkern.integrations.specs import CFG, PAG, SAG, SEG, SLG, TPG

__all__ = [
    "CFG",
    "PAG",
    "SAG",
    "SEG",
    "SLG",
    "TPG",
    "EnergyRecorder",
    "Guidance",
    "GuidanceWarning",
    "LayerEnergy",
    "LayerInfo",
    "LayerReport",
    "PAGGuider",
    "Report",
    "SAGGuider",
    "SEGAttnProcessor",
    "SEGGuider",
    "SLGGuider",
    "StableDiffusionXLSEGPipeline",
    "TPGGuider",
    "guide",
    "list_layers",
    "record_energy",
]

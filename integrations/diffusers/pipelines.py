# SPDX-License-Identifier: Apache-2.0
"""The official implementation's arguments on diffusers' own pipeline."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from diffusers import StableDiffusionXLPipeline

from segkern.integrations.diffusers.runtime.guidance import guide
from segkern.integrations.diffusers.runtime.pipeline_class import call_in_run
from segkern.integrations.specs import SEG

_LARGEST_FINITE_SIGMA = 9999.0  # the official implementation takes any larger sigma for infinity


def _adds_to(stock: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a call the stock parameters in its signature, in front of its own keyword-only ones."""

    def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(stock).parameters.values())
        own = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        merged = inspect.Signature([*parameters[:at], *own, *parameters[at:]])
        call.__signature__ = merged  # type: ignore[attr-defined]
        return call

    return decorate


class StableDiffusionXLSEGPipeline(StableDiffusionXLPipeline):
    """diffusers' ``StableDiffusionXLPipeline`` with the official implementation's SEG arguments.

    Scripts written for the official pipeline run unchanged; :func:`~segkern.integrations.diffusers.guide`
    does the work and offers more.

    Source: the arguments of the official implementation of SEG (arXiv 2408.00760).

    Example:
        >>> pipe = StableDiffusionXLSEGPipeline.from_pretrained("path/to/checkpoint")  # doctest: +SKIP
        >>> image = pipe("a red fox", guidance_scale=3.0, seg_scale=3.0, seg_blur_sigma=10.0,
        ...     seg_applied_layers=["mid"]).images[0]  # doctest: +SKIP
    """

    @_adds_to(StableDiffusionXLPipeline.__call__)
    def __call__(
        self,
        *args: Any,
        seg_scale: float = 3.0,
        seg_blur_sigma: float = 9999999.0,
        seg_applied_layers: str | Sequence[str] | None = ("mid",),
        seg_applied_layers_index: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the pipeline with Smoothed Energy Guidance.

        Args:
            *args: of ``StableDiffusionXLPipeline.__call__``.
            seg_scale: guidance scale; 0 or less is a plain run.
            seg_blur_sigma: standard deviation of the blur in tokens; anything above 9999 is infinite.
            seg_applied_layers: of ``"down"``, ``"mid"``, ``"up"``; none is a plain run.
            seg_applied_layers_index: layers such as ``["d4", "m0", "u29"]``; if there are any, they take the
                place of ``seg_applied_layers``.
            **kwargs: of ``StableDiffusionXLPipeline.__call__``.

        Returns:
            What ``StableDiffusionXLPipeline.__call__`` returns.

        Raises:
            ValueError: when a value does not fit; the message quotes it.
        """
        layers = seg_applied_layers_index or seg_applied_layers or ()
        if seg_scale <= 0.0 or not layers:
            return super().__call__(*args, **kwargs)
        sigma = math.inf if seg_blur_sigma > _LARGEST_FINITE_SIGMA else seg_blur_sigma
        with guide(self, SEG(scale=seg_scale, sigma=sigma, layers=layers)):
            return call_in_run(StableDiffusionXLPipeline.__call__, self, *args, **kwargs)

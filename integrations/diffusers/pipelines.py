# SPDX-License-Identifier: Apache-2.0
"""diffusers' Stable Diffusion XL pipeline with the arguments of the official SEG implementation."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

from diffusers import StableDiffusionXLPipeline

from segkern.integrations.diffusers.runtime.guidance import guide
from segkern.integrations.diffusers.runtime.pipeline_class import call_in_run
from segkern.integrations.specs import SEG

_LARGEST_FINITE_SIGMA = 9999.0  # the official implementation treats any larger sigma as infinite


def _adds_to(stock: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Merge the parameters of ``stock`` into a signature, before its own keyword-only parameters."""

    def decorate(call: Callable[..., Any]) -> Callable[..., Any]:
        parameters = list(inspect.signature(stock).parameters.values())
        own = [p for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
        at = len(parameters) - (parameters[-1].kind is inspect.Parameter.VAR_KEYWORD)
        merged = inspect.Signature([*parameters[:at], *own, *parameters[at:]])
        call.__signature__ = merged  # type: ignore[attr-defined]
        return call

    return decorate


class StableDiffusionXLSEGPipeline(StableDiffusionXLPipeline):
    """diffusers' ``StableDiffusionXLPipeline`` with the arguments of the official SEG implementation.

    Scripts written for the official pipeline run unchanged. The implementation uses
    :func:`~segkern.integrations.diffusers.guide`, which has more options.

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
            *args: Arguments of ``StableDiffusionXLPipeline.__call__``.
            seg_scale: Guidance scale. 0 or less turns guidance off.
            seg_blur_sigma: Standard deviation of the blur, in tokens. Values above 9999 mean infinity.
            seg_applied_layers: Any of ``"down"``, ``"mid"``, ``"up"``. An empty value turns guidance off.
            seg_applied_layers_index: Layer names such as ``["d4", "m0", "u29"]``. Overrides ``seg_applied_layers`` if
                not empty.
            **kwargs: Keyword arguments of ``StableDiffusionXLPipeline.__call__``.

        Returns:
            The output of ``StableDiffusionXLPipeline.__call__``.

        Raises:
            ValueError: If an argument is invalid. The message quotes it.
        """
        layers = seg_applied_layers_index or seg_applied_layers or ()
        if seg_scale <= 0.0 or not layers:
            return super().__call__(*args, **kwargs)
        sigma = math.inf if seg_blur_sigma > _LARGEST_FINITE_SIGMA else seg_blur_sigma
        with guide(self, SEG(scale=seg_scale, sigma=sigma, layers=layers)):
            return call_in_run(StableDiffusionXLPipeline.__call__, self, *args, **kwargs)

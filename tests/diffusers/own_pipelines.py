# SPDX-License-Identifier: Apache-2.0
"""Custom pipelines: subclasses of diffusers' pipelines, reduced to the loop, with many kinds of calls in a step.

Each computes the same as the stock pipeline, so one slow computation is the reference for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

from tests.diffusers.transformer_cases import MODELS

FLUX = MODELS["flux"]


class FluxCalls:
    """Inputs of one step of a Flux pipeline: the texts, and a function that computes the denoiser's prediction."""

    def __init__(self, pipe: Any, ids: torch.Tensor, guidance: float, texts: list[torch.Tensor]) -> None:
        self._pipe, self._ids, self._guidance = pipe, ids, guidance
        self.c, self.u, self.pooled_c, self.pooled_u = texts
        self.scale, self.step = 1.0, 0
        self.x, self.t = texts[0], texts[0]

    def predict(self, x: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return self._pipe.transformer(
            hidden_states=x,
            timestep=self.t.expand(len(x)) / 1000,
            guidance=torch.full([len(x)], self._guidance),
            pooled_projections=pooled,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3),
            img_ids=self._ids,
        ).sample

    def combined(self, c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return u + self.scale * (c - u)


Denoise = Callable[[FluxCalls], torch.Tensor]


class OwnFlux(diffusers.FluxPipeline):
    """Flux with a custom step. ``negative`` holds the negative embeddings, under a non-standard name."""

    denoise: Denoise

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Any = None,
        pooled_prompt_embeds: Any = None,
        negative: Any = None,
        pooled_negative: Any = None,
        negative_prompt_embeds: Any = None,
        negative_pooled_prompt_embeds: Any = None,
        guidance_scale: float = 3.5,
        cfg: float = 4.0,
        true_cfg_scale: Any = None,
        height: int = 0,
        width: int = 0,
        num_inference_steps: int = 3,
        generator: Any = None,
        callback_on_step_end: Any = None,
        **_: Any,
    ) -> Any:
        u = negative if negative_prompt_embeds is None else negative_prompt_embeds
        pooled_u = pooled_negative if negative_prompt_embeds is None else negative_pooled_prompt_embeds
        c, pooled_c, _ids = self.encode_prompt(
            None, None, prompt_embeds=prompt_embeds, pooled_prompt_embeds=pooled_prompt_embeds
        )
        x, ids = self.prepare_latents(len(c), 4, height, width, c.dtype, c.device, generator)
        calls = FluxCalls(self, ids, guidance_scale, [c, u, pooled_c, pooled_u])
        calls.scale = cfg if true_cfg_scale is None else true_cfg_scale
        count = num_inference_steps
        self.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count))
        with self.progress_bar(total=count):
            for i, t in enumerate(self.scheduler.timesteps):
                calls.x, calls.t, calls.step = x, t, i
                x = self.scheduler.step(type(self).denoise(calls), t, x, return_dict=False)[0]
        return diffusers.pipelines.flux.FluxPipelineOutput(images=x)


def _separate(s: FluxCalls) -> torch.Tensor:
    c = s.predict(s.x, s.c, s.pooled_c)
    return s.combined(c, s.predict(s.x, s.u, s.pooled_u))


def _cloned(s: FluxCalls) -> torch.Tensor:
    c = s.predict(s.x.clone(), s.c.clone(), s.pooled_c)
    return s.combined(c, s.predict(s.x.clone(), s.u.clone(), s.pooled_u))


def _cast(s: FluxCalls) -> torch.Tensor:
    c = s.predict(s.x, s.c.double().float(), s.pooled_c)
    return s.combined(c, s.predict(s.x, s.u.double().float(), s.pooled_u))


def _padded(s: FluxCalls) -> torch.Tensor:
    """Pass the texts as views of one tensor."""
    texts = torch.stack([s.u, s.c])
    c = s.predict(s.x, texts[1], s.pooled_c)
    return s.combined(c, s.predict(s.x, texts[0], s.pooled_u))


def _negative_first(s: FluxCalls) -> torch.Tensor:
    u = s.predict(s.x, s.u, s.pooled_u)
    return s.combined(s.predict(s.x, s.c, s.pooled_c), u)


def _negative_first_cloned(s: FluxCalls) -> torch.Tensor:
    u = s.predict(s.x.clone(), s.u.clone(), s.pooled_u)
    return s.combined(s.predict(s.x.clone(), s.c.clone(), s.pooled_c), u)


def _batch(s: FluxCalls) -> torch.Tensor:
    u, c = s.predict(torch.cat([s.x] * 2), torch.cat([s.u, s.c]), torch.cat([s.pooled_u, s.pooled_c])).chunk(2)
    return s.combined(c, u)


def _batch_flipped(s: FluxCalls) -> torch.Tensor:
    c, u = s.predict(torch.cat([s.x] * 2), torch.cat([s.c, s.u]), torch.cat([s.pooled_c, s.pooled_u])).chunk(2)
    return s.combined(c, u)


def _interleaved(s: FluxCalls) -> torch.Tensor:
    x, text, pooled = (
        torch.stack(pair, 1).flatten(0, 1) for pair in ((s.x, s.x), (s.u, s.c), (s.pooled_u, s.pooled_c))
    )
    both = s.predict(x, text, pooled)
    return s.combined(both[1::2], both[0::2])


def _three(s: FluxCalls) -> torch.Tensor:
    x, text = torch.cat([s.x] * 3), torch.cat([s.u, s.c, s.c])
    u, c, _ = s.predict(x, text, torch.cat([s.pooled_u, s.pooled_c, s.pooled_c])).chunk(3)
    return s.combined(c, u)


def _one_by_one(s: FluxCalls) -> torch.Tensor:
    c = torch.cat([s.predict(*(x[i : i + 1] for x in (s.x, s.c, s.pooled_c))) for i in range(len(s.x))])
    u = torch.cat([s.predict(*(x[i : i + 1] for x in (s.x, s.u, s.pooled_u))) for i in range(len(s.x))])
    return s.combined(c, u)


def _image_by_image(s: FluxCalls) -> torch.Tensor:
    images = []
    for i in range(len(s.x)):
        c = s.predict(*(x[i : i + 1] for x in (s.x, s.c, s.pooled_c)))
        images.append(s.combined(c, s.predict(*(x[i : i + 1] for x in (s.x, s.u, s.pooled_u)))))
    return torch.cat(images)


STEPS: dict[str, Denoise] = {
    "separate": _separate,
    "cloned": _cloned,
    "cast": _cast,
    "views": _padded,
    "negative first": _negative_first,
    "negative first, cloned": _negative_first_cloned,
    "batch": _batch,
    "batch, flipped": _batch_flipped,
    "interleaved": _interleaved,
    "three parts": _three,
    "one by one": _one_by_one,
    "image by image": _image_by_image,
}


def own_flux(step: str) -> Any:
    """Return a Flux pipeline with one of these steps."""
    pipe = FLUX.build()
    pipe.__class__ = type("Mine", (OwnFlux,), {"denoise": staticmethod(STEPS[step]), "__module__": __name__})
    return pipe

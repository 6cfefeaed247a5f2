# SPDX-License-Identifier: Apache-2.0
"""Embeddings of the negative prompt for ``CFG`` specs, in pipelines without their own classifier-free guidance."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from segkern.integrations.diffusers.runtime.branches import Arguments, DenoiserArguments
from segkern.integrations.specs import CFG


@dataclass(frozen=True)
class NegativeText:
    """Embeddings of the negative prompt.

    Attributes:
        embeds: ``[1 or samples, tokens, channels]``.
        pooled: ``[1 or samples, channels]``; None if the model uses no pooled embedding.
    """

    embeds: torch.Tensor
    pooled: torch.Tensor | None

    def put(
        self, arguments: DenoiserArguments, args: tuple[Any, ...], kwargs: dict[str, Any], samples: slice
    ) -> Arguments:
        """Return the denoiser's arguments with this text for some samples.

        Raises:
            ValueError: If the shape does not match the positive text.
        """
        states = arguments.get("encoder_hidden_states", args, kwargs)
        values = {"encoder_hidden_states": _replaced("negative_prompt_embeds", states, self.embeds, samples)}
        added = arguments.get("added_cond_kwargs", args, kwargs)
        if self.pooled is not None and added is not None and "text_embeds" in added:
            pooled = _replaced("negative_pooled_prompt_embeds", added["text_embeds"], self.pooled, samples)
            values["added_cond_kwargs"] = added | {"text_embeds": pooled}
        return arguments.put(args, kwargs, **values)


def _replaced(name: str, x: torch.Tensor, own: torch.Tensor, samples: slice) -> torch.Tensor:
    count = samples.stop - samples.start
    if own.shape[1:] != x.shape[1:] or own.shape[0] not in (1, count):
        raise ValueError(f"CFG.{name} of shape {tuple(own.shape)} does not match the prompt's {(count, *x.shape[1:])}")
    x = x.clone()
    x[samples] = own.to(x.device, x.dtype)
    return x


def negative_text(pipe: Any, spec: CFG) -> NegativeText:
    """Return the embeddings of a spec, or those that the pipeline computes from its negative prompt.

    Raises:
        ValueError: If the pipeline cannot encode text, or if an embedding is missing.
    """
    takes_pooled = pipe.unet.config.get("addition_embed_type") == "text_time"
    embeds, pooled = spec.negative_prompt_embeds, spec.negative_pooled_prompt_embeds
    if embeds is None and pooled is None:
        embeds, pooled = _encoded(pipe, spec.negative_prompt)
    if embeds is None or (takes_pooled and pooled is None):
        missing = "negative_prompt_embeds" if embeds is None else "negative_pooled_prompt_embeds"
        raise ValueError(f"CFG also needs {missing} for a {type(pipe).__name__}, whose model uses both")
    return NegativeText(embeds, pooled if takes_pooled else None)


@torch.no_grad()
def _encoded(pipe: Any, prompt: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Encode the prompt like the pipeline does. Pipelines treat an empty negative prompt as none."""
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2")]
    if not hasattr(pipe, "encode_prompt") or all(encoder is None for encoder in encoders):
        raise ValueError(
            f"CFG cannot encode its negative_prompt {prompt!r} with this {type(pipe).__name__}, which has no text "
            f"encoder; pass negative_prompt_embeds"
        )
    options = {
        "prompt": "",
        "device": pipe._execution_device,
        "num_images_per_prompt": 1,
        "do_classifier_free_guidance": True,
        "negative_prompt": prompt or None,
    }
    taken = inspect.signature(pipe.encode_prompt).parameters
    embeds = pipe.encode_prompt(**{name: value for name, value in options.items() if name in taken})
    return embeds[1], embeds[3] if len(embeds) > 3 else None

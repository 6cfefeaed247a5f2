# SPDX-License-Identifier: Apache-2.0
"""A slow, independent way to guide a transformer: one more forward for each guidance, logits blurred in float64.

The pipeline itself runs as it is. Every call of its model is repeated with dense attention in the perturbed layers, and
what the scheduler is given is replaced by the sum the method asks for. Nothing of the adapter is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from tests.diffusers.diffusers_tools import dense_blur
from tests.diffusers.transformer_models import Model

_SDPA = F.scaled_dot_product_attention


@dataclass
class Perturbed:
    """A guidance of the slow way: SEG at ``sigma``, one or one per sample, or PAG where that is None."""

    scale: float
    sigma: float | tuple[float, ...] | None
    modules: Sequence[str]


class Dense:
    """Attention over all tokens in float64, with the logits of the image's tokens perturbed."""

    def __init__(self, frames: int, height: int, width: int, start: int) -> None:
        self.start, self.tokens = start, frames * height * width
        self.frames, self.height, self.width = frames, height, width

    def __call__(
        self, sigma: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, **options: Any
    ) -> torch.Tensor:
        if isinstance(sigma, tuple):
            one = [slice(i, i + 1) for i in range(len(query))]
            masks = [attn_mask if attn_mask is None or len(attn_mask) == 1 else attn_mask[i] for i in one]
            parts = [(query[i], key[i], value[i], mask) for i, mask in zip(one, masks, strict=True)]
            return torch.cat([self(sigma[i % len(sigma)], *part, **options) for i, part in enumerate(parts)])
        scale = options.get("scale") or query.shape[-1] ** -0.5
        logits = (query.double() @ key.double().transpose(-2, -1)) * scale
        image = slice(self.start, self.start + self.tokens)
        if sigma is None:
            alone = torch.full((self.tokens, self.tokens), float("-inf"), dtype=torch.float64).fill_diagonal_(0.0)
            logits[..., image, image] += alone
        elif sigma:
            blur = torch.block_diag(*[dense_blur(self.height, self.width, sigma)] * self.frames)
            logits[..., image, :] = blur @ logits[..., image, :]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            logits = logits + attn_mask
        return (logits.softmax(dim=-1) @ value.double()).to(query.dtype)


@contextmanager
def perturbing(model: torch.nn.Module, modules: Sequence[str], sigma: Any, dense: Dense) -> Iterator[None]:
    """Inside, the first self-attention of each module is dense."""
    open_modules: list[str] = []

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if open_modules and query.shape[2] == key.shape[2] and query.shape[2] >= dense.tokens:
            open_modules.clear()
            return dense(sigma, query, key, value, attn_mask, **kwargs)
        return _SDPA(query, key, value, attn_mask, *args, **kwargs)

    handles = []
    for name in modules:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: open_modules.append(name)))
        handles.append(module.register_forward_hook(lambda *_: open_modules.clear()))
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def slow_run(
    model: Model, pipe: Any, guidances: Sequence[Perturbed], run: Any, rows: int, columns: int, cfg: bool, samples: int
) -> torch.Tensor:
    """What ``run()`` must return under guidance."""
    dense = Dense(model.frames, rows, columns, model.start)
    calls: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # predictions and perturbed ones since the last step

    def repeating(transformer: torch.nn.Module) -> Any:
        forward = type(transformer).forward

        def repeated(*args: Any, **kwargs: Any) -> Any:
            output = forward(transformer, *copied(args), **copied(kwargs))
            perturbed = []
            for guidance in guidances:
                with perturbing(transformer, guidance.modules, guidance.sigma, dense):
                    perturbed.append(_tensor(forward(transformer, *copied(args), **copied(kwargs))[0]))
            calls.append((_tensor(output[0]), perturbed))
            return output

        repeated.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
        return repeated

    step = type(pipe.scheduler).step

    def corrected(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        prediction, perturbed = calls[0]  # the call for the prompt comes first
        if len(calls) == 1 and cfg:  # both halves in one
            half = slice(0, samples) if model.name == "ZImagePipeline" else slice(samples, None)
            prediction, perturbed = prediction[half], [each[half] for each in perturbed]
        shift = sum(g.scale * (prediction - each) for g, each in zip(guidances, perturbed, strict=True))
        if model.name.startswith("QwenImage") and cfg:
            negative = calls[1][0]
            combined = negative + 4.0 * (prediction - negative) + shift
            model_output = combined * (prediction.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))
        elif model.name == "ZImagePipeline":
            model_output = model_output - shift.squeeze(2)
        else:
            if model.name in ("PixArtSigmaPipeline", "PixArtAlphaPipeline", "HunyuanDiTPipeline"):
                shift = shift.chunk(2, dim=1)[0]
            model_output = model_output + shift[:, : model_output.shape[1]]  # without the tokens of other pictures
        calls.clear()
        return step(pipe.scheduler, model_output, *args, **kwargs)

    corrected.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    with ExitStack() as patches:
        for each in (pipe.transformer, getattr(pipe, "transformer_2", None)):
            if each is not None:
                patches.enter_context(mock.patch.object(each, "forward", repeating(each)))
        patches.enter_context(mock.patch.object(pipe.scheduler, "step", corrected))
        return run()


def copied(value: Any) -> Any:
    """Containers of a call's arguments, since models take them apart."""
    if isinstance(value, dict):
        return {name: copied(each) for name, each in value.items()}
    return type(value)(copied(each) for each in value) if type(value) in (list, tuple) else value


def _tensor(output: Any) -> torch.Tensor:
    return torch.stack(output) if isinstance(output, list) else output

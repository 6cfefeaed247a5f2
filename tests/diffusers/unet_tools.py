# SPDX-License-Identifier: Apache-2.0
"""A slow, independent way to guide a UNet: one more forward for each guidance, logits blurred in float64.

The pipeline itself runs as it is. Every call of its UNet is repeated with dense attention in the perturbed layers, and
what the scheduler is given is replaced by the sum the method asks for. Nothing of the adapter is used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from tests.diffusers.transformer_tools import Dense, Perturbed, copied

_SDPA = F.scaled_dot_product_attention


def self_attentions(unet: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules in which an image attends to itself and which a pattern matches."""
    names = [name for name, _ in unet.named_modules() if name.endswith(".attn1") and ".attentions." in name]
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of so many tokens: each level has half of the one before, rounded up."""
    height, width = size
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    assert height * width == tokens
    return height, width


@contextmanager
def _perturbed(unet: torch.nn.Module, guidance: Perturbed, size: tuple[int, int]) -> Iterator[None]:
    """Inside, the first attention of each of the guidance's modules is dense."""
    inside: list[str] = []
    met: set[str] = set()

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not inside:
            return _SDPA(query, key, value, attn_mask, *args, **kwargs)
        met.add(inside.pop())
        dense = Dense(1, *_grid(query.shape[2], size), 0)
        return dense(guidance.sigma, query, key, value, attn_mask, **kwargs)

    handles = []
    for name in guidance.modules:
        module = unet.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
    assert met == set(guidance.modules)


def slow_run(
    pipe: Any, guidances: Sequence[Perturbed], run: Callable[[], torch.Tensor], size: tuple[int, int], cfg: bool
) -> torch.Tensor:
    """What ``run()`` must return under guidance, of images or frames of that size in latents."""
    unet = pipe.unet
    forward = type(unet).forward
    shifts: list[torch.Tensor] = []  # of the call since the last step

    def repeated(*args: Any, **kwargs: Any) -> Any:
        output = forward(unet, *copied(args), **copied(kwargs))
        own = output[0]
        conditional = slice(len(own) // 2 if cfg else 0, None)
        shift = torch.zeros_like(own[conditional])
        for guidance in guidances:
            with _perturbed(unet, guidance, size):
                other = forward(unet, *copied(args), **copied(kwargs))[0]
            shift += guidance.scale * (own[conditional] - other[conditional])
        shifts.append(shift)
        return output

    repeated.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    step = type(pipe.scheduler).step

    def corrected(model_output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return step(pipe.scheduler, model_output + shifts.pop(), *args, **kwargs)

    corrected.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    with mock.patch.object(unet, "forward", repeated), mock.patch.object(pipe.scheduler, "step", corrected):
        return run()

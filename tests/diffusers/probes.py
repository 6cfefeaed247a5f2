# SPDX-License-Identifier: Apache-2.0
"""Probes for tests: inputs of a denoiser's parts, leftover hooks, and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from segkern.integrations.diffusers import GuidanceWarning


def hooks_of(model: torch.nn.Module) -> int:
    """Return the number of hooks on a denoiser and its parts."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def batches_seen(pipe: Any, act: Callable[[], Any]) -> dict[str, set[int]]:
    """Return the batch sizes with which each block of a UNet runs during ``act``."""
    seen: dict[str, set[int]] = {}
    handles = []
    for name, module in pipe.unet.named_modules():
        if name.count(".") <= 1 and name.startswith(("conv_", "down_blocks.", "mid_block", "up_blocks.")):

            def note(module: Any, args: Any, output: Any, name: str = name) -> None:
                out = output[0] if isinstance(output, tuple) else output
                seen.setdefault(name, set()).add(len(out))

            handles.append(module.register_forward_hook(note))
    try:
        act()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def shapes_seen(attn: torch.nn.Module) -> Iterator[dict[str, list[tuple[int, ...]]]]:
    """Collect the shapes of the inputs of a layer's linear projections and of PyTorch's attention.

    It uses no hooks on the projections, because a layer cannot distinguish them from hooks that change something.
    """
    seen: dict[str, list[tuple[int, ...]]] = {"attention": [], "keys": []}
    seen |= {name: [] for name in ("to_q", "to_k", "to_v", "to_out.0")}
    names = {id(attn.get_submodule(name).weight): name for name in seen if name.startswith("to_")}
    attend = F.scaled_dot_product_attention

    def attended(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen["attention"].append(tuple(query.shape))
        seen["keys"].append(tuple(key.shape))
        return attend(query, key, *args, **kwargs)

    class Projections(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.linear and id(args[1]) in names:
                seen[names[id(args[1])]].append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with pytest.MonkeyPatch.context() as patch, Projections():
        patch.setattr(F, "scaled_dot_product_attention", attended)
        yield seen


@contextmanager
def problems_warned() -> Iterator[list[warnings.WarningMessage]]:
    """Collect the adapter's warnings inside this context."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=GuidanceWarning)
        yield caught

# SPDX-License-Identifier: Apache-2.0
"""Slow guidance without the node pack: a third full forward pass with dense matrices in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.samplers
import torch

STAGES = {
    "flux": ("double_blocks", "single_blocks"),
    "sd3": ("joint_blocks",),
    "qwen": ("transformer_blocks",),
    "wan": ("blocks",),
    "lumina": ("layers",),
}


@dataclass
class Independent:
    """One guidance method.

    Attributes:
        layers: Blocks of a UNet, such as ``("middle", 0, 0)``; block numbers of a transformer.
        sigma: Standard deviation of the blur; None for the identity.
        scale: Guidance scale.
        window: Start and end percent.
        rescale: Rescale factor of the result.
        text: Number of tokens before the image in a transformer's first attention.
        moved: For each attention, the relative changes of its output.
        guided: Guided predictions, one per evaluation.
        conditional: Latents and their conditional prediction; None if a guider does not pass it.
    """

    layers: Sequence[Any]
    sigma: float | None
    scale: float = 2.0
    window: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    text: int = 0
    moved: list[list[float]] = field(default_factory=list)
    guided: list[torch.Tensor] = field(default_factory=list)
    conditional: tuple[torch.Tensor, torch.Tensor] | None = None

    def on(self, model: Any, name: str) -> Any:
        """Return a clone of a small model with this guidance."""
        guided = model.clone()
        others = guided.model_options.get("sampler_pre_cfg_function", [])
        guided.model_options["sampler_pre_cfg_function"] = [self._pre_cfg, *others]
        guided.set_model_sampler_post_cfg_function(lambda arguments: self._post_cfg(arguments, name))
        return guided

    def _pre_cfg(self, arguments: dict[str, Any]) -> list[torch.Tensor]:
        """Keep the model's own conditional prediction, before other nodes change it."""
        self.conditional = arguments["input"], arguments["conds_out"][0].clone()
        return arguments["conds_out"]

    def _post_cfg(self, arguments: dict[str, Any], name: str) -> torch.Tensor:
        sampling = arguments["model"].model_sampling
        sigma, (start, stop) = float(arguments["sigma"][0]), self.window
        begun = start <= 0.0 or sigma <= sampling.percent_to_sigma(start)
        over = stop < 1.0 and sigma <= sampling.percent_to_sigma(stop)
        guided = arguments["denoised"]
        if begun and not over:
            options = comfy.model_patcher.create_model_options_clone(arguments["model_options"])
            part = options.setdefault("transformer_options", {})
            model = arguments["model"].diffusion_model
            with self._in_transformer(part, model, name) if name in STAGES else self._in_unet(part):
                (p,) = comfy.samplers.calc_cond_batch(
                    arguments["model"], [arguments["cond"]], arguments["input"], arguments["sigma"], options
                )
            c, kept = arguments["cond_denoised"], self.conditional
            c = kept[1] if kept is not None and kept[0] is arguments["input"] else c
            guided = guided + self.scale * (c - p)
            if self.rescale:
                dims = tuple(range(1, c.ndim))
                ratio = c.std(dim=dims, keepdim=True) / guided.std(dim=dims, keepdim=True)
                guided = self.rescale * ratio * guided + (1 - self.rescale) * guided
        self.guided.append(guided)
        return guided

    @contextmanager
    def _in_unet(self, options: dict[str, Any]) -> Iterator[None]:
        replaced = options.setdefault("patches_replace", {}).setdefault("attn1", {})
        for block in self.layers:
            before = replaced.get(block, replaced.get(block[:2]))
            replaced[block] = lambda q, k, v, extra, before=before: self._unet_attention(q, k, v, extra, before)
        yield

    def _unet_attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra: dict[str, Any], before: Any
    ) -> torch.Tensor:
        if before is not None:  # another node's attention with blurred queries, which is equivalent
            if self.sigma is None:
                return v
            return before(self.blur(self.sigma, *extra["activations_shape"][2:]).to(q) @ q, k, v, extra)
        heads = extra["n_heads"]
        split = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
        height, width = extra["activations_shape"][2:]
        return self.attention(*split, (1, height, width), 0).transpose(1, 2).flatten(2)

    @contextmanager
    def _in_transformer(self, options: dict[str, Any], model: Any, name: str) -> Iterator[None]:
        blocks = [block for stage in STAGES[name] for block in getattr(model, stage)]
        inside: list[int] = []  # the current chosen block, and the number of attentions it has computed

        def enter(module: Any, given: Any) -> None:
            inside[:] = [0]

        def leave(module: Any, given: Any, output: Any) -> None:
            inside.clear()

        grid = [1, 0, 0]  # frames, height and width in patches, of the current forward pass

        def measure(module: Any, given: Any) -> None:
            frames, height, width = (1, *given[0].shape[2:])[-3:]
            grid[:] = [frames, -(-height // 2), -(-width // 2)]

        before = options.get("optimized_attention_override")

        def override(
            function: Callable[..., torch.Tensor],
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            heads: int,
            mask: torch.Tensor | None = None,
            skip_reshape: bool = False,
            skip_output_reshape: bool = False,
            **keywords: Any,
        ) -> torch.Tensor:
            if inside and inside[0] < (2 if name == "sd3" and hasattr_attn2(chosen[0]) else 1):
                start = self.text if inside[0] == 0 else 0
                inside[0] += 1
                if not skip_reshape:
                    q, k, v = (x.reshape(*x.shape[:2], heads, -1).transpose(1, 2) for x in (q, k, v))
                out = self.attention(q, k, v, (grid[0], grid[1], grid[2]), start, mask)
                return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
            layout = {"skip_reshape": skip_reshape, "skip_output_reshape": skip_output_reshape}
            if before is not None:
                return before(function, q, k, v, heads, mask=mask, **layout, **keywords)
            return function(q, k, v, heads, mask=mask, **layout, **keywords)

        options["optimized_attention_override"] = override
        chosen = [blocks[number] for number in self.layers]
        handles = [model.register_forward_pre_hook(measure)]
        handles += [block.register_forward_pre_hook(enter) for block in chosen]
        handles += [block.register_forward_hook(leave) for block in chosen]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        grid: tuple[int, int, int],
        start: int,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return perturbed attention ``[batch, heads, tokens, head_dim]`` by its definition."""
        dtype = q.dtype
        q, k, v = q.double(), k.double(), v.double()
        logits = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
        mask = mask.unsqueeze(1) if mask is not None and mask.ndim == 3 else mask
        tokens, image = math.prod(grid), slice(start, start + math.prod(grid))
        weights = (logits if mask is None else logits + mask).softmax(dim=3)
        own = weights @ v
        if self.sigma is None:
            weights = weights.clone()
            weights[:, :, image] = torch.eye(q.shape[2], k.shape[2], dtype=torch.float64)[image]
        else:
            dense = torch.eye(q.shape[2], dtype=torch.float64)
            dense[image, image] = self.blur(self.sigma, *grid[1:], frames=grid[0])
            assert dense[image, image].shape == (tokens, tokens)
            logits = dense @ logits
            weights = (logits if mask is None else logits + mask).softmax(dim=3)
        out = weights @ v
        self.moved.append([float((out - own).norm() / own.norm())])
        return out.to(dtype)

    @staticmethod
    def blur(sigma: float, height: int, width: int, frames: int = 1) -> torch.Tensor:
        """Return the blur over the queries of a grid, ``[tokens, tokens]``."""
        one = torch.kron(_axis(height, sigma), _axis(width, sigma))
        return torch.block_diag(*[one] * frames)


def hasattr_attn2(block: Any) -> bool:
    """Return True if an SD3 block has a second attention over image tokens only."""
    return bool(block.x_block.x_block_self_attn)


def _axis(length: int, sigma: float) -> torch.Tensor:
    """Return Gaussian weights along an axis with reflected ends, summed tap by tap."""
    if math.isinf(sigma):
        return torch.full((length, length), 1.0 / length, dtype=torch.float64)
    radius = min(math.ceil(6 * sigma) // 2, length // 2)
    taps = [math.exp(-0.5 * (t / sigma) ** 2) for t in range(-radius, radius + 1)]
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for row in range(length):
        for t, tap in zip(range(-radius, radius + 1), taps, strict=True):
            column = abs(row + t)
            column = column if column < length else 2 * (length - 1) - column
            matrix[row, column] += tap / sum(taps)
    return matrix

# SPDX-License-Identifier: Apache-2.0
"""What stands beside a UNet in the cases of ``unet_models.py``: images, ControlNets, adapters, low-rank layers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, MultiAdapter, T2IAdapter

IMAGE_EMBEDS = 8  # numbers of an image embedding


def image(case: Any, samples: int, cfg: bool, size: tuple[int, int] | None = None, seed: int = 3) -> torch.Tensor:
    """One image for each sample, of the case's size in pixels unless another is given."""
    return torch.rand(samples, 3, *(size or case.pixels), generator=torch.Generator().manual_seed(seed))


def controls(case: Any, samples: int, cfg: bool) -> list[torch.Tensor]:
    """Two kinds of image."""
    return [image(case, samples, cfg), image(case, samples, cfg, seed=4)]


def mask(case: Any, samples: int, cfg: bool) -> torch.Tensor:
    """A part of each image that is made anew."""
    drawn = torch.zeros(samples, 1, *case.pixels)
    drawn[:, :, 4:12, 4:16] = 1.0
    return drawn


def depth(case: Any, samples: int, cfg: bool) -> torch.Tensor:
    return image(case, samples, cfg)[:, 0]


def controlnet(unet: Any, count: int = 1) -> dict[str, Any]:
    """One or several ControlNets whose residuals are not zero."""
    made = []
    for _ in range(count):
        net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8), conditioning_channels=3)
        if unet.config.in_channels != 4:  # it gets the latents alone
            net.conv_in = torch.nn.Conv2d(4, unet.config.block_out_channels[0], 3, padding=1)
        made.append(seen(net))
    return {"controlnet": made if count > 1 else made[0]}


def controlnet_union(unet: Any) -> dict[str, Any]:
    first = unet.config.block_out_channels[0]
    own = {"num_trans_channel": first, "num_trans_head": 2, "num_proj_channel": first}
    given = {**unet.config, "conditioning_embedding_out_channels": (8, 8), "conditioning_channels": 3, **own}
    taken = inspect.signature(ControlNetUnionModel.__init__).parameters
    return {"controlnet": seen(ControlNetUnionModel(**{name: given[name] for name in taken if name in given}))}


def seen(net: Any) -> Any:
    """A new ControlNet's residuals are zero."""
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return net.eval().requires_grad_(False)


def adapter(unet: Any, count: int = 1) -> dict[str, Any]:
    """One or several T2I-Adapters with a residual for each level."""
    channels = list(unet.config.block_out_channels)
    made = [T2IAdapter(3, channels, 1, downscale_factor=2, adapter_type="full_adapter").eval() for _ in range(count)]
    return {"adapter": MultiAdapter(made) if count > 1 else made[0]}


def adapter_xl(unet: Any) -> dict[str, Any]:
    """One of Stable Diffusion XL's kind, whose first residual is added after the first block, at half the size."""
    channels = [*unet.config.block_out_channels, unet.config.block_out_channels[-1]]
    return {"adapter": T2IAdapter(3, channels, 1, downscale_factor=4, adapter_type="full_adapter_xl").eval()}


def ip_adapter(pipe: Any) -> None:
    """Load a random IP-Adapter."""
    pipe.unet._load_ip_adapter_weights([ip_adapter_weights(pipe.unet)])


def ip_adapter_weights(unet: Any) -> dict[str, Any]:
    """A random IP-Adapter for image embeddings of 8 numbers and 4 image tokens."""
    generator = torch.Generator().manual_seed(0)
    text, weights = unet.config.cross_attention_dim, {}
    cross = [name for name in unet.attn_processors if "attn2" in name and "motion_modules" not in name]
    for index, name in enumerate(cross):
        channels = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for part in ("k", "v"):
            weights[f"{2 * index + 1}.to_{part}_ip.weight"] = torch.randn(channels, text, generator=generator) * 0.5
    proj = {
        "proj.weight": torch.randn(4 * text, IMAGE_EMBEDS, generator=generator),
        "proj.bias": torch.zeros(4 * text),
        "norm.weight": torch.ones(text),
        "norm.bias": torch.zeros(text),
    }
    return {"image_proj": proj, "ip_adapter": weights}


def image_embeds(case: Any, samples: int, cfg: bool, images: int = 1) -> list[torch.Tensor]:
    """Of the images that a loaded IP-Adapter is given, for all samples; with those of no image first."""
    shape = (2 if cfg else 1, images, IMAGE_EMBEDS)
    return [torch.randn(shape, generator=torch.Generator().manual_seed(1))]


def two_image_embeds(case: Any, samples: int, cfg: bool) -> list[torch.Tensor]:
    return image_embeds(case, samples, cfg, 2)


def image_masks(case: Any, samples: int, cfg: bool) -> dict[str, Any]:
    """Where each of two images is to be seen: on the left, and on the right."""
    halves = torch.zeros(1, 2, *case.pixels)
    halves[:, 0, :, : case.pixels[1] // 2] = 1.0
    halves[:, 1] = 1.0 - halves[:, 0]
    return {"ip_adapter_masks": [halves]}


class LowRank(torch.nn.Module):
    """A linear layer with a low-rank one beside it, as PEFT puts it in the layer's place."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = torch.nn.Linear(base.in_features, 2, bias=False)
        self.up = torch.nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + 0.7 * self.up(self.down(x))


def low_rank(pipe: Any) -> None:
    """Put such a layer into every projection of every attention."""
    for name, module in list(pipe.unet.named_modules()):
        if name.endswith(("attn1", "attn2")):
            module.to_q, module.to_k, module.to_v = (LowRank(each) for each in (module.to_q, module.to_k, module.to_v))
            module.to_out[0] = LowRank(module.to_out[0])
    pipe.unet.requires_grad_(False)

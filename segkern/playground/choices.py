# SPDX-License-Identifier: Apache-2.0
"""Sizes, layers and guidance methods that the page offers for a model, and the sigmas of its slider."""

from __future__ import annotations

import math
from typing import Any

from segkern.generation.options import GUIDANCES
from segkern.generation.sizes import image_size

# Width and height that Stable Diffusion XL was trained on; the first is its default.
_BUCKETS = (
    (1024, 1024),
    (1152, 896),
    (896, 1152),
    (1216, 832),
    (832, 1216),
    (1344, 768),
    (768, 1344),
    (1536, 640),
    (640, 1536),
)
_BUCKET_STEP = 64

_FINEST, _COARSEST = -2, 6  # powers of two: sigma 0.25 to 64
_IN_AN_OCTAVE = 4
LAST = (_COARSEST - _FINEST) * _IN_AN_OCTAVE + 1  # the slider's last position is infinity

CONTRAST = 4  # of the difference image, in which small differences are hard to see


def sigma_at(position: float) -> float:
    """Return the sigma at a position of the slider, 0 to ``LAST``: four per octave, infinity at the end.

    Example:
        >>> [sigma_at(position) for position in (0, 8, 9, LAST)]
        [0.25, 1.0, 1.19, inf]
    """
    if position >= LAST:
        return math.inf
    return float(f"{2.0 ** (_FINEST + max(0.0, position) / _IN_AN_OCTAVE):.3g}")


def position_of(sigma: float) -> int:
    """Return the position of the slider that is nearest to a sigma above 0.

    Example:
        >>> [position_of(sigma) for sigma in (0.01, 1.0, 5.0, 1e9, math.inf)]
        [0, 8, 17, 32, 33]
    """
    if math.isinf(sigma):
        return LAST
    position = round((math.log2(sigma) - _FINEST) * _IN_AN_OCTAVE)
    return min(max(position, 0), LAST - 1)


def has_unet(pipe: Any) -> bool:
    """Return whether a pipeline's denoiser is a UNet, not a transformer."""
    return getattr(pipe, "unet", None) is not None


def guidances(pipe: Any) -> list[str]:
    """Return the names of the guidance methods for a model: transformers do not support SAG."""
    return [name.upper() for name in GUIDANCES if name != "sag" or has_unet(pipe)]


def sizes(pipe: Any) -> list[str]:
    """Return sizes in pixels: the model's default first, then sizes of similar area in the shapes of SDXL's buckets."""
    if has_unet(pipe):
        multiple = max(8, pipe.vae_scale_factor)
    else:
        from segkern.integrations.diffusers.models.layers import pixels as pixels_of

        multiple = pixels_of(pipe)[1]
    own_width, own_height = image_size(pipe, None, None)
    side = math.sqrt(own_width * own_height)
    unit = max(1, round(side * _BUCKET_STEP / _BUCKETS[0][0] / multiple)) * multiple
    offered = [f"{own_width} x {own_height}"]
    for bucket in _BUCKETS:
        width, height = (max(1, round(pixels * side / _BUCKETS[0][0] / unit)) * unit for pixels in bucket)
        offered.append(f"{width} x {height}")
    return list(dict.fromkeys(offered))


def layers(pipe: Any) -> list[tuple[str, str]]:
    """Return labels and names of the layers to choose from: the parts of the model, then every layer."""
    from segkern.integrations.diffusers import list_layers

    available = list_layers(pipe)
    parts: dict[str, list[str]] = {}
    for layer in available:
        parts.setdefault(layer.part, []).append(layer.name)
    labels = []
    for part, names in parts.items():
        ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        labels.append((f"{part} ({ends})", part))
    return [*labels, *((layer.name, layer.name) for layer in available)]

# SPDX-License-Identifier: Apache-2.0
"""The guidances one can ask for: their numbers, where they act and when. No diffusers in here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from segkern.core.coarse_queries import check_query_stride
from segkern.core.dispatch import check_backend
from segkern.core.gaussian import check_boundary
from segkern.integrations.specs.base import AttentionSpec, Layers, Spec
from segkern.integrations.specs.schedules import Schedule, is_number
from segkern.integrations.specs.sigmas import GivenSigmas, LayerSigmas, checked_sigma, largest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False)
class SEG(AttentionSpec):
    """Smoothed Energy Guidance: away from the prediction with blurred queries in some self-attention layers.

    Adds ``scale * (c - p)`` to the prediction, where ``c`` is the conditional prediction and ``p`` the same
    with blurred queries: ``c + s (c - p)`` without classifier-free guidance, ``u + g (c - u) + s (c - p)``
    with it.

    Args:
        scale: ``s``, the method's ``gamma - 1``; any finite number. 0 turns the guidance off.
        sigma: standard deviation of the blur in tokens; ``math.inf`` (the method's default) replaces every
            query by the mean query, 0 turns the guidance off. Also a sequence with one sigma per image of the batch,
            or with a sequence of one per head for each image (``[[...]]`` for all of them); or a mapping from names as
            ``layers`` has them to any of these, which must name every layer once.
        layers: of a UNet ``"down"``, ``"mid"``, ``"up"``, an official index such as ``"d4"``, ``"m0"``, ``"u29"`` or
            a range ``"u0-29"``, or a name of ComfyUI's nodes such as ``"u0.4"``; of a transformer a block's number,
            ``7``, ``"4-9"`` or ``range(4, 10)``, or its short name such as ``"s3"``; of both a module name or a dotted
            prefix of one; a glob; or several of those. See
            :func:`~segkern.integrations.diffusers.list_layers`. None stands for the names in a mapping of sigmas, else
            for a UNet's ``"mid"`` or a transformer's own default, which ``segkern layers`` tells.
        start: fraction of the run's steps at which it begins to act.
        stop: fraction of the run's steps from which it no longer acts. A step outside ``[start, stop)`` is
            the plain step and costs nothing extra. Where a scheduler calls the denoiser twice in a step (Heun),
            both calls are that step.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`segkern.gaussian_blur`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`segkern.seg_attention`.
        query_stride: 1 computes every query row. With more, or a pair for height and width, layers compute a finite
            sigma's rows at points so many tokens apart at most and interpolate between them; see
            :func:`segkern.seg_attention`. An approximation, which says nothing where sigma is 0 or infinite; it needs
            one number as sigma.
        reuse: 1 computes the perturbed branch in every step. With more, an approximation, it is computed in every
            ``reuse``-th step in which the guidance acts, and the others, which cost what a plain step costs, take
            its last difference ``c - p``. A run begins with a computed one. A step in which the scheduler calls the
            denoiser twice (Heun) computes it twice or not at all.
        schedule: of the scale: ``"constant"``; ``"linear"`` or ``"cosine"``, which fall from it at ``start`` to 0 at
            ``stop``; or a function from the fraction of the run done to a factor. Where that is 0 a step is plain.
        blend: 1 is attention with blurred queries; less mixes the layer's output with that of its own attention,
            ``blend * blurred + (1 - blend) * own``. 0 turns the guidance off.

    Raises:
        ValueError: when a value does not fit; the message quotes it.

    Source: SEG (arXiv 2408.00760), Proposition 3.1, and its official implementation for the defaults.

    Example:
        >>> SEG(sigma=4.0, layers=["mid", "u0-5"], stop=0.6).active(fraction=0.7)
        False
        >>> SEG(schedule="linear").strength(fraction=0.5)
        1.5
    """

    scale: float = 3.0
    sigma: GivenSigmas | Mapping[str, GivenSigmas] = math.inf
    layers: Layers | None = None
    start: float = 0.0
    stop: float = 1.0
    boundary: str = "reflect"
    backend: str = "auto"
    query_stride: int | tuple[int, int] = 1
    reuse: int = 1
    schedule: Schedule = "constant"
    blend: float = 1.0

    def __post_init__(self) -> None:
        self._check_common()
        sigma = checked_sigma("SEG", self.sigma)
        object.__setattr__(self, "sigma", sigma)
        self._check_attention()
        check_boundary(self.boundary)
        check_backend(self.backend)
        object.__setattr__(self, "query_stride", _stride(self.query_stride))
        if self.query_stride not in (1, (1, 1)) and not isinstance(sigma, float):
            raise ValueError(f"SEG.query_stride={self.query_stride!r} needs one number as sigma, got {self.sigma!r}")

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of its layers; those of a mapping of sigmas where no others are given."""
        if self.layers is None and isinstance(self.sigma, LayerSigmas):
            return tuple(self.sigma)
        return super().layer_names

    def perturbs(self) -> bool:
        """True if any sigma blurs."""
        return largest(self.sigma) > 0.0  # type: ignore[arg-type]


@dataclass(frozen=True, repr=False)
class PAG(AttentionSpec):
    """Perturbed-Attention Guidance: away from the prediction with identity attention in some self-attention layers.

    The same two sums as :class:`SEG` with another ``p``: in the layers every token attends to itself alone, so that
    their output is the projected values, which needs neither queries nor keys nor a softmax.

    Args:
        scale: ``s``; any finite number. 0 turns the guidance off.
        layers: as :class:`SEG` takes them.
        start: fraction of the run's steps at which it begins to act.
        stop: fraction of the run's steps from which it no longer acts.
        adaptive_scale: the scale falls by so much with each of the scheduler's timesteps below 1000,
            ``max(0, scale - adaptive_scale * (1000 - t))``. Reading ``t`` waits for a GPU that holds it.
        reuse: as :class:`SEG` takes it.
        schedule: as :class:`SEG` takes it; multiplies what ``adaptive_scale`` left.
        blend: 1 is identity attention; less mixes in the layer's own, 0 turns the guidance off.

    Raises:
        ValueError: when a value does not fit; the message quotes it.

    Source: PAG (arXiv 2403.17377), equations 15 and 16; ``adaptive_scale`` from diffusers' pipelines with PAG.

    Example:
        >>> PAG(scale=3.0, adaptive_scale=0.005).strength(fraction=0.5, timestep=500.0)
        0.5
    """

    scale: float = 3.0
    layers: Layers | None = None
    start: float = 0.0
    stop: float = 1.0
    adaptive_scale: float = 0.0
    reuse: int = 1
    schedule: Schedule = "constant"
    blend: float = 1.0

    def __post_init__(self) -> None:
        self._check_common()
        self._check_attention()
        if not (is_number(self.adaptive_scale) and 0.0 <= self.adaptive_scale < math.inf):
            raise ValueError(f"PAG.adaptive_scale must be 0 or a positive number, got {self.adaptive_scale!r}")

    def perturbs(self) -> bool:
        """Always."""
        return True

    @property
    def depends_on_step(self) -> bool:
        """True if it does not act alike in all steps of a run."""
        return super().depends_on_step or self.adaptive_scale > 0.0

    def strength(self, fraction: float, timestep: float | None = None) -> float:
        """The scale at a fraction of the run and a timestep; without one as if ``adaptive_scale`` were 0."""
        full = super().strength(fraction)
        if timestep is None or not self.adaptive_scale or self.scale <= 0.0:
            return full
        return full * max(0.0, self.scale - self.adaptive_scale * (1000.0 - timestep)) / self.scale


@dataclass(frozen=True, repr=False)
class SAG(Spec):
    """Self-Attention Guidance: away from the prediction for an image blurred where a layer attends.

    After the forward a second one follows, on the same timestep: what the first predicts as the clean image is blurred
    in the places that a self-attention layer looks at most, and noised again with the predicted noise. Under
    classifier-free guidance all of it is unconditional: ``u + g (c - u) + s (u - u')``; without it ``c + s (c - c')``.
    The second forward has another image from its first convolution on: it can share nothing with the first. Guided
    steps wait for a GPU that holds the timestep.

    Args:
        scale: ``s``; any finite number. 0 turns the guidance off.
        layer: whose attention makes the mask; one layer, as ``SEG.layers`` names them.
        start: fraction of the run's steps at which it begins to act.
        stop: fraction of the run's steps from which it no longer acts.
        threshold: tokens are blurred that receive more attention than this, summed over queries and averaged over
            heads; the mean over all tokens is 1.
        sigma: of the blur of the predicted clean image, in its own pixels.
        kernel_size: taps of that blur, odd.
        reuse: as :class:`SEG` takes it.
        schedule: as :class:`SEG` takes it.

    Raises:
        ValueError: when a value does not fit; the message quotes it.

    Source: SAG (arXiv 2210.00939), equations 16 and 25; diffusers' pipeline for the defaults.

    Example:
        >>> SAG(stop=0.5).active(fraction=0.25)
        True
    """

    scale: float = 0.75
    layer: str = "m0"
    start: float = 0.0
    stop: float = 1.0
    threshold: float = 1.0
    sigma: float = 1.0
    kernel_size: int = 9
    reuse: int = 1
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        self._check_common()
        if not isinstance(self.layer, str):
            raise ValueError(f"SAG.layer must be the name of one layer, such as 'm0', got {self.layer!r}")
        if not (is_number(self.threshold) and math.isfinite(self.threshold)):
            raise ValueError(f"SAG.threshold must be a finite number, got {self.threshold!r}")
        if not (is_number(self.sigma) and 0.0 < self.sigma < math.inf):
            raise ValueError(f"SAG.sigma must be a positive number of pixels, got {self.sigma!r}")
        size = self.kernel_size
        if not isinstance(size, int) or isinstance(size, bool) or size < 3 or size % 2 == 0:
            raise ValueError(f"SAG.kernel_size must be an odd integer of at least 3, got {size!r}")


@dataclass(frozen=True, repr=False, eq=False)
class CFG(Spec):
    """Classifier-free guidance for runs in which the pipeline does none.

    Adds ``scale * (c - u)``, where ``u`` is the prediction for a negative prompt; with ``scale = guidance_scale - 1``
    that is the pipeline's own ``u + g (c - u)``. Call the pipeline with its ``guidance_scale`` at 1 or 0, or with
    prompts alone where it has none. Text is what is negated: an image prompt (IP-Adapter), a ControlNet's residuals and
    Stable Diffusion XL's sizes stay on both sides. ``SAG`` beside it degrades the negative prediction.

    Args:
        scale: ``guidance_scale - 1``; any finite number. 0 turns the guidance off.
        negative_prompt: encoded by the pipeline when ``guide`` is called.
        negative_prompt_embeds: instead of it, ``[1 or samples, tokens, channels]``.
        negative_pooled_prompt_embeds: beside them where the model takes a pooled embedding (Stable Diffusion XL),
            ``[1 or samples, channels]``.
        start: fraction of the run's steps at which it begins to act.
        stop: fraction of the run's steps from which it no longer acts.
        reuse: as :class:`SEG` takes it.
        schedule: as :class:`SEG` takes it.

    Raises:
        ValueError: when a value does not fit; the message quotes it.

    Source: classifier-free guidance (arXiv 2207.12598), equation 6.

    Example:
        >>> CFG(scale=4.0, negative_prompt="blurry").strength(fraction=0.5)
        4.0
    """

    scale: float = 4.0
    negative_prompt: str = ""
    negative_prompt_embeds: torch.Tensor | None = field(default=None, repr=False)
    negative_pooled_prompt_embeds: torch.Tensor | None = field(default=None, repr=False)
    start: float = 0.0
    stop: float = 1.0
    reuse: int = 1
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        self._check_common()
        if not isinstance(self.negative_prompt, str):
            raise ValueError(f"CFG.negative_prompt must be a text, got {self.negative_prompt!r}")
        for name, dims in (("negative_prompt_embeds", 3), ("negative_pooled_prompt_embeds", 2)):
            embeds = getattr(self, name)
            if embeds is not None and getattr(embeds, "ndim", None) != dims:
                raise ValueError(
                    f"CFG.{name} must be a tensor of {dims} dimensions, got {tuple(getattr(embeds, 'shape', ()))}"
                    f"{'' if hasattr(embeds, 'shape') else ' ' + type(embeds).__name__}"
                )

    def __eq__(self, other: object) -> bool:
        """True if all values are the same, embeddings by their numbers."""
        if not isinstance(other, CFG):
            return NotImplemented
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return all(_same(*pair) for pair in pairs)

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().values()))


def _same(a: Any, b: Any) -> bool:
    if hasattr(a, "dtype") and hasattr(b, "dtype"):
        return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.device == b.device and bool((a == b).all()))
    return bool(a == b)


def _stride(value: int | tuple[int, int]) -> int | tuple[int, int]:
    """The stride as it was given, a list of two as a pair."""
    try:
        pair = check_query_stride(value)
    except ValueError as error:
        raise ValueError(f"SEG.{error}") from None
    return pair if isinstance(value, (list, tuple)) else pair[0]

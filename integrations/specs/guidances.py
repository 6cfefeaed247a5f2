# SPDX-License-Identifier: Apache-2.0
"""Guidance specs: scale, layers and range of steps of each guidance method. This module does not import diffusers."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from segkern.core.coarse_queries import check_query_stride
from segkern.core.dispatch import check_backend
from segkern.core.gaussian import check_boundary
from segkern.integrations.specs.base import AttentionSpec, BlockSpec, Layers, Spec
from segkern.integrations.specs.schedules import Schedule, is_number
from segkern.integrations.specs.sigmas import GivenSigmas, LayerSigmas, checked_sigma, largest

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, repr=False)
class SEG(AttentionSpec):
    """Smoothed Energy Guidance (SEG): guide away from a prediction with blurred attention queries.

    Adds ``scale * (c - p)`` to the prediction. ``c`` is the conditional prediction and ``p`` is the same prediction
    with blurred queries in the chosen self-attention layers. The result is ``c + s (c - p)`` without classifier-free
    guidance and ``u + g (c - u) + s (c - p)`` with it.

    Args:
        scale: Guidance scale ``s``, which is ``gamma - 1`` in the paper. Any finite number; 0 turns guidance off.
        sigma: Standard deviation of the blur, in tokens. ``math.inf`` (the default of the method) replaces every query
            by the mean query; 0 turns guidance off. Also accepts a sequence with one sigma per image of the batch, a
            sequence with a list of one sigma per head for each image (``[[...]]`` applies to all images), or a mapping
            from layer names, as in ``layers``, to any of these. A mapping must name every layer exactly once.
        layers: Layers to blur, as one name or a list of names. UNet: ``"down"``, ``"mid"``, ``"up"``, an official index
            such as ``"d4"``, ``"m0"`` or ``"u29"``, a range such as ``"u0-29"``, or a name as in ComfyUI nodes such as
            ``"u0.4"``. Transformer: a block number or range such as ``7``, ``"4-9"`` or ``range(4, 10)``, or a short
            name such as ``"s3"``. Both: a module name, a dotted prefix of one, or a glob. See
            :func:`~segkern.integrations.diffusers.list_layers`. None uses the names of a sigma mapping if there is
            one, otherwise ``"mid"`` for a UNet or the model's default for a transformer, which ``segkern layers``
            shows.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops. Steps outside ``[start, stop)`` are not guided
            and cost nothing extra. If the scheduler calls the denoiser twice in a step (Heun), both calls count as
            that step.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`segkern.gaussian_blur`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`segkern.seg_attention`.
        query_stride: 1 computes every query row. A larger number, or a pair for height and width, is an approximation:
            with a finite sigma, layers compute query rows at most this many tokens apart and interpolate between them;
            see :func:`segkern.seg_attention`. It has no effect if sigma is 0 or infinite, and requires sigma to be a
            single number.
        reuse: 1 computes the perturbed branch in every step. A larger number is an approximation: the branch is
            computed in every ``reuse``-th guided step, and the guided steps between reuse its last difference
            ``c - p`` at the cost of an unguided step. The first guided step of a run always computes it. If the
            scheduler calls the denoiser twice in a step (Heun), both calls compute the branch or both reuse it.
        schedule: How the scale changes over the steps: ``"constant"``, ``"linear"`` or ``"cosine"``, or a function
            that maps the completed fraction of the steps to a factor. ``"linear"`` and ``"cosine"`` fall from the full
            scale at ``start`` to 0 at ``stop``. Steps with a factor of 0 are not guided.
        blend: Share of the blurred attention in a layer's output, ``blend * blurred + (1 - blend) * own``. 1 uses the
            blurred attention only; 0 turns guidance off.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

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
        """Names of the blurred layers. If ``layers`` is None, these are the names of a sigma mapping."""
        if self.layers is None and isinstance(self.sigma, LayerSigmas):
            return tuple(self.sigma)
        return super().layer_names

    def perturbs(self) -> bool:
        """Return True if any sigma is greater than 0."""
        return largest(self.sigma) > 0.0  # type: ignore[arg-type]


@dataclass(frozen=True, repr=False)
class PAG(AttentionSpec):
    """Perturbed-Attention Guidance (PAG): guide away from a prediction with identity attention.

    Uses the formulas of :class:`SEG` with another ``p``: in the chosen layers, every token attends only to itself. The
    output of such a layer is its projected values, so it needs no queries, keys or softmax.

    Args:
        scale: Guidance scale ``s``. Any finite number; 0 turns guidance off.
        layers: Layers to perturb, in the form that :class:`SEG` accepts.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops.
        adaptive_scale: Decrease of the scale per scheduler timestep below 1000,
            ``max(0, scale - adaptive_scale * (1000 - t))``. If ``t`` is on a GPU, reading it synchronises.
        reuse: See :class:`SEG`.
        schedule: See :class:`SEG`. Multiplies the scale after ``adaptive_scale`` is applied.
        blend: Share of the identity attention in a layer's output. 1 uses identity attention only; 0 turns guidance
            off.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

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
        """Return True: identity attention changes every layer."""
        return True

    @property
    def depends_on_step(self) -> bool:
        """True if guidance differs between steps."""
        return super().depends_on_step or self.adaptive_scale > 0.0

    def strength(self, fraction: float, timestep: float | None = None) -> float:
        """Return the scale at a fraction of the steps and a timestep; None ignores ``adaptive_scale``."""
        full = super().strength(fraction)
        if timestep is None or not self.adaptive_scale or self.scale <= 0.0:
            return full
        return full * max(0.0, self.scale - self.adaptive_scale * (1000.0 - timestep)) / self.scale


@dataclass(frozen=True, repr=False)
class SLG(BlockSpec):
    """Skip-layer guidance (SLG): guide away from a prediction without some transformer blocks.

    Uses the formulas of :class:`SEG` with another ``p``: the chosen blocks return their inputs unchanged.

    Args:
        scale: Guidance scale ``s``. Any finite number; 0 turns guidance off.
        layers: Layers in the form that :class:`SEG` accepts. The transformer blocks that contain them are skipped. None
            uses the model's default layers, which ``segkern layers`` shows.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops. With the default range, a run of fewer than 6
            steps has no guided step.
        count: Number of blocks to skip in each step, drawn at random from those of ``layers``; None skips all of them.
        seed: Seed of the draw, which depends only on the seed and the number of the step.
        reuse: See :class:`SEG`.
        schedule: See :class:`SEG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: diffusers' ``SkipLayerGuidance`` and its pipeline for Stable Diffusion 3, for the formula and the defaults;
        S^2-Guidance (arXiv 2508.12880) for blocks that are drawn at random.

    Example:
        >>> SLG(layers=range(7, 10)).active(fraction=0.5)
        False
    """

    scale: float = 2.8
    layers: Layers | None = None
    start: float = 0.01
    stop: float = 0.2
    count: int | None = None
    seed: int = 0
    reuse: int = 1
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        self._check_common()
        self._check_layers()
        if self.count is not None and not (_is_integer(self.count) and self.count > 0):
            raise ValueError(f"SLG.count must be None or a positive number of blocks, got {self.count!r}")
        _check_seed("SLG", self.seed)

    @property
    def depends_on_step(self) -> bool:
        """True if guidance differs between steps."""
        return super().depends_on_step or self.count is not None

    def chosen(self, step: int, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the layers whose blocks are skipped in a step."""
        if self.count is None or self.count >= len(layers):
            return tuple(layers)
        names = random.Random(f"{self.seed}/{step}").sample(sorted(layers), self.count)
        return tuple(layer for layer in layers if layer in names)


@dataclass(frozen=True, repr=False)
class TPG(BlockSpec):
    """Token perturbation guidance (TPG): guide away from a prediction with shuffled tokens.

    Uses the formulas of :class:`SEG` with another ``p``: the image tokens are shuffled before each of the chosen
    transformer blocks. As in the official implementation, they are not put back in order after the block. (A block
    without positional information treats all orders alike, so shuffling and putting back would have no effect.)

    All samples of a batch use the same order. It depends only on the seed, the number of the step, the block and the
    number of tokens; see :meth:`order`.

    Args:
        scale: Guidance scale ``s``. Any finite number; 0 turns guidance off.
        layers: Layers in the form that :class:`SEG` accepts. The tokens are shuffled before the transformer blocks that
            contain them. None uses ``"d6-23"`` for a Stable Diffusion XL UNet, as the official implementation, and
            otherwise the model's default layers, which ``segkern layers`` shows.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops.
        seed: Seed of the orders.
        reuse: See :class:`SEG`.
        schedule: See :class:`SEG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

    Source: TPG (arXiv 2506.10036) and its official implementation.

    Example:
        >>> TPG(seed=1).order(0, "d6", 4).tolist() == TPG(seed=1).order(0, "d6", 4).tolist()
        True
    """

    scale: float = 3.0
    layers: Layers | None = None
    start: float = 0.0
    stop: float = 1.0
    seed: int = 0
    reuse: int = 1
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        self._check_common()
        self._check_layers()
        _check_seed("TPG", self.seed)

    @property
    def depends_on_step(self) -> bool:
        """True: each step has its own order of the tokens."""
        return True

    def order(self, step: int, layer: str, tokens: int) -> torch.Tensor:
        """Return the order of the tokens in a block.

        Args:
            step: Number of the inference step, from 0.
            layer: Short name of the first self-attention layer in the block, such as ``"d6"`` or ``"b7"``.
            tokens: Number of image tokens.

        Returns:
            int64 tensor ``[tokens]`` on the CPU. Token ``i`` of the block's input is token ``order[i]`` of the tensor
            before it.
        """
        import torch

        seed = random.Random(f"{self.seed}/{step}/{layer}").getrandbits(63)
        return torch.randperm(tokens, generator=torch.Generator("cpu").manual_seed(seed))


@dataclass(frozen=True, repr=False)
class SAG(Spec):
    """Self-Attention Guidance (SAG): guide away from the prediction for an image that is blurred where a layer attends.

    Each guided step calls the denoiser a second time at the same timestep. The clean image predicted by the first call
    is blurred where a self-attention layer attends most, then noised again with the predicted noise. With
    classifier-free guidance, these steps use the unconditional prediction: ``u + g (c - u) + s (u - u')``; without it,
    the result is ``c + s (c - c')``. The second call has a different input, so it shares no work with the first. If the
    timestep is on a GPU, guided steps synchronise to read it.

    Args:
        scale: Guidance scale ``s``. Any finite number; 0 turns guidance off.
        layer: The one layer whose attention defines the mask, named as in ``SEG.layers``.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops.
        threshold: Tokens that receive more attention than this are blurred. Attention is summed over queries and
            averaged over heads; its mean over all tokens is 1.
        sigma: Standard deviation of the blur of the predicted clean image, in its own pixels.
        kernel_size: Number of taps of the blur; odd.
        reuse: See :class:`SEG`.
        schedule: See :class:`SEG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

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
    """Classifier-free guidance (CFG) for runs in which the pipeline does not apply it.

    Adds ``scale * (c - u)``, where ``u`` is the prediction for a negative prompt. With ``scale = guidance_scale - 1``,
    this equals the pipeline's ``u + g (c - u)``. Call the pipeline with a ``guidance_scale`` of 1 or 0. If it has no
    such argument, pass positive prompts only. Only the text is negated: an image prompt (IP-Adapter), ControlNet
    residuals and the size conditioning of Stable Diffusion XL are the same for both predictions. If ``SAG`` is also
    active, it degrades the negative prediction.

    Args:
        scale: ``guidance_scale - 1``. Any finite number; 0 turns guidance off.
        negative_prompt: Negative prompt. The pipeline encodes it when ``guide`` is called.
        negative_prompt_embeds: Embeddings to use instead of ``negative_prompt``, ``[1 or samples, tokens, channels]``.
        negative_pooled_prompt_embeds: Pooled embeddings that go with ``negative_prompt_embeds`` if the model uses them
            (Stable Diffusion XL), ``[1 or samples, channels]``.
        start: Fraction of the inference steps at which guidance starts.
        stop: Fraction of the inference steps at which guidance stops.
        reuse: See :class:`SEG`.
        schedule: See :class:`SEG`.

    Raises:
        ValueError: If an argument is invalid. The message quotes it.

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
            raise ValueError(f"CFG.negative_prompt must be a string, got {self.negative_prompt!r}")
        for name, dims in (("negative_prompt_embeds", 3), ("negative_pooled_prompt_embeds", 2)):
            embeds = getattr(self, name)
            if embeds is not None and getattr(embeds, "ndim", None) != dims:
                raise ValueError(
                    f"CFG.{name} must be a tensor of {dims} dimensions, got {tuple(getattr(embeds, 'shape', ()))}"
                    f"{'' if hasattr(embeds, 'shape') else ' ' + type(embeds).__name__}"
                )

    def __eq__(self, other: object) -> bool:
        """Return True if all values are equal; embeddings are compared element by element."""
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


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_seed(owner: str, seed: object) -> None:
    if not _is_integer(seed):
        raise ValueError(f"{owner}.seed must be an integer, got {seed!r}")


def _stride(value: int | tuple[int, int]) -> int | tuple[int, int]:
    """Return the checked stride in the form it was given; a list of two becomes a pair."""
    try:
        pair = check_query_stride(value)
    except ValueError as error:
        raise ValueError(f"SEG.{error}") from None
    return pair if isinstance(value, (list, tuple)) else pair[0]

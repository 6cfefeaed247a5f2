# SPDX-License-Identifier: Apache-2.0
"""What a guidance is asked to do: its numbers, where it acts and when. No diffusers in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from segkern.blur import check_boundary
from segkern.coarse import check_query_stride
from segkern.dispatch import check_backend


@dataclass(frozen=True)
class SEG:
    """Smoothed Energy Guidance: away from the prediction with blurred queries in some self-attention layers.

    Adds ``scale * (c - p)`` to the prediction, where ``c`` is the conditional prediction and ``p`` the same
    with blurred queries: ``c + s (c - p)`` without classifier-free guidance, ``u + g (c - u) + s (c - p)``
    with it.

    Args:
        scale: ``s``, the method's ``gamma - 1``; any finite number. 0 turns the guidance off.
        sigma: standard deviation of the blur in tokens; ``math.inf`` (the method's default) replaces every
            query by the mean query, 0 turns the guidance off.
        layers: ``"down"``, ``"mid"``, ``"up"``; an official index such as ``"d4"``, ``"m0"``, ``"u29"`` or a
            range ``"u0-29"``; a module name or a dotted prefix of one; a glob; or several of those. See
            :func:`~segkern.integrations.diffusers.list_layers`.
        start: fraction of the run's steps at which it begins to act.
        stop: fraction of the run's steps from which it no longer acts. A step outside ``[start, stop)`` is
            the plain step and costs nothing extra. Where a scheduler calls the denoiser twice in a step (Heun),
            both calls are that step.
        boundary: ``"reflect"``, ``"symmetric"`` or ``"circular"``; see :func:`segkern.gaussian_blur`.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``; see :func:`segkern.seg_attention`.
        query_stride: 1 computes every query row. With more, or a pair for height and width, layers compute a finite
            sigma's rows at points so many tokens apart at most and interpolate between them; see
            :func:`segkern.seg_attention`. ``"auto"`` lets each layer try strides of 2 to 8, none above three quarters
            of sigma, in the first three guided forwards at an image size, in which it computes every row, and keep the
            widest that holds the tolerance, or every row. The choice stays, with a margin for logits that swing more
            later in a run. The report gives strides and their errors, which those forwards estimate. No blur and the
            mean query take no notice.
        tolerance: of ``"auto"``: the error that a layer's attention output may have, relative to it, as root mean
            square; 4 times the estimate must not be above it. By default it is bfloat16's rounding, 2^-8 or 4e-3, so
            that leaving out rows costs no more than that type does; float16 rounds to 5e-4.

        reuse: 1 computes the perturbed branch in every step. With more, an approximation, it is computed in every
            ``reuse``-th step in which the guidance acts, and the others, which cost what a plain step costs, take
            its last difference ``c - p``. A run begins with a computed one. A step in which the scheduler calls the
            denoiser twice (Heun) computes it twice or not at all.

    Raises:
        ValueError: when a value does not fit; the message quotes it.

    Source: SEG (arXiv 2408.00760), Proposition 3.1, and its official implementation for the defaults.

    Example:
        >>> SEG(sigma=4.0, layers=["mid", "u0-5"], stop=0.6).active(fraction=0.7)
        False
    """

    scale: float = 3.0
    sigma: float = math.inf
    layers: str | Sequence[str] = "mid"
    start: float = 0.0
    stop: float = 1.0
    boundary: str = "reflect"
    backend: str = "auto"
    query_stride: int | tuple[int, int] | Literal["auto"] = 1
    tolerance: float = 2.0**-8
    reuse: int = 1

    def __post_init__(self) -> None:
        if not (_is_number(self.scale) and math.isfinite(self.scale)):
            raise ValueError(f"SEG.scale must be a finite number, got {self.scale!r}")
        if not (_is_number(self.sigma) and self.sigma >= 0.0):  # false for NaN as well
            raise ValueError(f"SEG.sigma must be 0 (no blur), positive, or math.inf (mean query), got {self.sigma!r}")
        if not (_is_number(self.start) and _is_number(self.stop) and 0.0 <= self.start < self.stop <= 1.0):
            raise ValueError(
                f"SEG.start and SEG.stop must be fractions of the run with 0 <= start < stop <= 1, "
                f"got start={self.start!r}, stop={self.stop!r}"
            )
        check_boundary(self.boundary)
        check_backend(self.backend)
        if self.query_stride != "auto":
            object.__setattr__(self, "query_stride", _stride(self.query_stride))
        if not (_is_number(self.tolerance) and 0.0 < self.tolerance < math.inf):
            raise ValueError(f"SEG.tolerance must be a positive number, got {self.tolerance!r}")
        if not isinstance(self.reuse, int) or isinstance(self.reuse, bool) or self.reuse < 1:
            raise ValueError(
                f"SEG.reuse must be an integer of at least 1 (1 computes every branch), got {self.reuse!r}"
            )
        layers = self.layers if isinstance(self.layers, str) else _names(self.layers)
        object.__setattr__(self, "layers", layers)

    def active(self, fraction: float) -> bool:
        """Whether it acts at this fraction of the run, ``step / steps``."""
        return self.scale != 0.0 and self.sigma != 0.0 and self.start <= fraction < self.stop

    def leaves_out_rows(self) -> bool:
        """Whether a stride of query rows is asked for and means something: sigma is neither 0 nor infinite."""
        return self.query_stride not in (1, (1, 1)) and 0.0 < self.sigma < math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _stride(value: int | tuple[int, int] | str) -> int | tuple[int, int]:
    """The stride as it was given, a list of two as a pair."""
    try:
        pair = check_query_stride(value)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"SEG.query_stride must be 'auto' or a stride: {error}") from None
    return pair if isinstance(value, (list, tuple)) else pair[0]


def _names(layers: Sequence[str]) -> tuple[str, ...]:
    """Several layer names as a tuple, so that a spec stays what it was when its caller's list changes."""
    names = tuple(layers) if isinstance(layers, (list, tuple, set, frozenset)) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"SEG.layers must be a layer name such as 'mid', 'd4', 'u0-29', or a list of them, got {layers!r}"
        )
    return names

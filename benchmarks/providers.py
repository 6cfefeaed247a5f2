# SPDX-License-Identifier: Apache-2.0
"""The ways to compute one layer's attention in a guided step, as closures over the same inputs.

``PROVIDERS`` lists all of them. A new entry appears in every suite, table and plot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import segkern
from benchmarks.cases import Case, Inputs, select
from benchmarks.official import official_blur
from segkern.core.dispatch import why_not_triton
from segkern.core.gaussian import blur_matrix
from segkern.ops.attention import fused_attention
from segkern.ops.torch_attention import attend_by

Call = Callable[[], torch.Tensor]
Blur = Callable[[torch.Tensor], torch.Tensor]  # image tokens of the blurred samples [third, heads, tokens, dim]


@dataclass(frozen=True)
class Provider:
    """One way to compute attention.

    Attributes:
        name: Name in rows, tables and legends.
        make: Function that returns the closure for inputs and a sigma, with everything precomputed that can be.
        suites: Suites that measure it.
        kind: The computation: attention without blur, attention with blurred queries, the blur alone, or key masses.
        exact: False for an approximation. Its error is reported but not checked against the contract.
        why_not: Function that returns the reason why it cannot run, or None.
        scratch: Bytes allocated beyond inputs and outputs, if many.
        no_graph: Reason why it cannot be captured in a CUDA graph, or None.
    """

    name: str
    make: Callable[[Inputs, float], Call]
    suites: tuple[str, ...]
    kind: Literal["plain", "attention", "blur", "mass"] = "attention"
    exact: bool = True
    why_not: Callable[[Inputs, float], str | None] = lambda inputs, sigma: None
    scratch: Callable[[Case], float] = lambda case: 0.0
    no_graph: str | None = None


def _sdpa(backend: SDPBackend | None, inputs: Inputs, sigma: float) -> Call:
    query, key, value = inputs.query, inputs.key, inputs.value
    if backend is None:
        return lambda: F.scaled_dot_product_attention(query, key, value)

    def run() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value)

    return run


def _ours(inputs: Inputs, sigma: float, backend: str = "auto", stride: int = 1) -> Call:
    query, key, value, grid = inputs.query, inputs.key, inputs.value, inputs.case.grid
    sigmas = inputs.case.sigmas(sigma)

    def run() -> torch.Tensor:
        result = segkern.seg_attention(query, key, value, grid, sigmas, query_stride=stride, backend=backend)
        assert isinstance(result, torch.Tensor)
        return result

    return run


def _blurring(how: str, inputs: Inputs, sigma: float) -> Call:
    """Call the Triton kernels with the queries blurred in the place given by ``BLURS``."""
    from segkern.kernels import _routes

    query, key, value, grid = inputs.query, inputs.key, inputs.value, inputs.case.grid
    sigmas, scale, place = inputs.case.sigmas(sigma), inputs.case.head_dim**-0.5, _routes.BlurPlace[how]
    return lambda: fused_attention(query, key, value, None, grid, sigmas, scale, "reflect", False, place)[0]


def _our_blur(inputs: Inputs, sigma: float, backend: str = "auto") -> Call:
    query, grid, sigmas = inputs.query, inputs.case.grid, inputs.case.sigmas(sigma)
    return lambda: segkern.gaussian_blur(query, grid, sigmas, backend=backend)


def _mass(inputs: Inputs, sigma: float, backend: str = "auto") -> Call:
    query, key = inputs.query, inputs.key
    return lambda: segkern.attention_mass(query, key, backend=backend)


def _naive_mass(inputs: Inputs, sigma: float) -> Call:
    query, key, scale = inputs.query, inputs.key, inputs.case.head_dim**-0.5
    return lambda: torch.softmax(torch.matmul(query, key.transpose(-2, -1)) * scale, dim=-1).sum(dim=-2).float()


def _no_blurring(inputs: Inputs, sigma: float) -> str | None:
    reason = _no_triton(inputs, sigma)
    if reason is None and math.isinf(sigma):
        return "the mean is computed by other kernels"
    return reason


def _no_triton(inputs: Inputs, sigma: float) -> str | None:
    if inputs.device.type == "cpu":
        return "Triton has no CPU target"
    return why_not_triton(inputs.device, inputs.case.dtype, inputs.case.head_dim)


def _official(inputs: Inputs, sigma: float) -> Blur:
    """Return a depthwise 2-D convolution whose kernel is built on the host at every call."""
    return lambda image: official_blur(image, inputs.case.grid, sigma)


def _axis_matrices(inputs: Inputs, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
    grid, make = inputs.case.grid, partial(blur_matrix, dtype=inputs.case.dtype, device=inputs.device)
    return make(grid.height, sigma), make(grid.width, sigma)


def _separable(inputs: Inputs, sigma: float) -> Blur:
    rows, columns = _axis_matrices(inputs, sigma)
    grid = inputs.case.grid

    def blurred(image: torch.Tensor) -> torch.Tensor:
        image = torch.einsum("jl,bnild->bnijd", columns, image.unflatten(2, (grid.height, grid.width)))
        return torch.einsum("ik,bnkjd->bnijd", rows, image).flatten(2, 3)

    return blurred


def _dense(inputs: Inputs, sigma: float) -> Blur:
    matrix = torch.kron(*_axis_matrices(inputs, sigma))
    return lambda image: torch.matmul(matrix, image)


def _blur_only(make: Callable[[Inputs, float], Blur], inputs: Inputs, sigma: float) -> Call:
    """Return a call that blurs the grid of the last third of the batch in the queries of the whole batch."""
    query, grid, plain = inputs.query, inputs.case.grid, inputs.case.batch - inputs.case.third
    blurred, only_image = make(inputs, sigma), inputs.case.tokens == grid.tokens

    def run() -> torch.Tensor:
        last = query[plain:]
        image = blurred(last[:, :, grid.start : grid.stop])
        if not only_image:
            image = torch.cat([last[:, :, : grid.start], image, last[:, :, grid.stop :]], dim=2)
        return torch.cat([query[:plain], image])

    return run


def _then_sdpa(make: Callable[[Inputs, float], Call], inputs: Inputs, sigma: float, backend: str = "default") -> Call:
    blur, key, value, scale = make(inputs, sigma), inputs.key, inputs.value, inputs.case.head_dim**-0.5
    if backend == "default":
        return lambda: F.scaled_dot_product_attention(blur(), key, value)
    return lambda: attend_by(backend, blur(), key, value, scale)


@lru_cache(maxsize=1)
def _compiled_flex(case: Case, device: torch.device) -> Callable[..., torch.Tensor]:
    """Return FlexAttention compiled for one shape. Drops earlier compilations to stay below the recompile limit."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _flex(inputs: Inputs, sigma: float) -> Call:
    blur, key, value = _our_blur(inputs, sigma), inputs.key, inputs.value
    attend = _compiled_flex(inputs.case, inputs.device)
    return lambda: attend(blur(), key, value)


def _no_gpu_backend(inputs: Inputs, sigma: float) -> str | None:
    return "runs on CUDA only" if inputs.device.type == "cpu" else None


def _dense_scratch(case: Case) -> float:
    return 2.0 * case.grid.tokens**2 * case.dtype.itemsize


def _scores_scratch(case: Case) -> float:
    return 2.0 * case.batch * case.heads * case.tokens**2 * max(4, case.dtype.itemsize)


HOST_COPY = "it copies a kernel from the host at every call"
_GUIDED = ("attention", "infinite")
_ALL = (*_GUIDED, "coarse", "blur")

BLURS = {"triton prologue": "PROLOGUE", "triton before": "BEFORE"}  # where the queries are blurred
_ALL_PROVIDERS = (
    # PyTorch's attention without a blur, with its own choice of backend and with each backend.
    Provider("sdpa", partial(_sdpa, None), (*_ALL, "mass"), "plain"),
    Provider("sdpa math", partial(_sdpa, SDPBackend.MATH), _GUIDED, "plain", scratch=_scores_scratch),
    Provider("sdpa flash", partial(_sdpa, SDPBackend.FLASH_ATTENTION), _ALL, "plain"),
    Provider("sdpa efficient", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION), _ALL, "plain", why_not=_no_gpu_backend),
    Provider("sdpa cudnn", partial(_sdpa, SDPBackend.CUDNN_ATTENTION), _ALL, "plain", why_not=_no_gpu_backend),
    # A blur, then PyTorch's attention: the official 2-D convolution, two products, one product; then FlexAttention.
    Provider("official", partial(_then_sdpa, partial(_blur_only, _official)), _GUIDED, no_graph=HOST_COPY),
    Provider("separable", partial(_then_sdpa, partial(_blur_only, _separable)), _GUIDED),
    Provider("dense", partial(_then_sdpa, partial(_blur_only, _dense)), _GUIDED, scratch=_dense_scratch),
    Provider("flex", _flex, _GUIDED),
    # segkern: its own choice, each backend, each place to blur, its blur before PyTorch's attention, coarse queries.
    Provider("auto", _ours, (*_GUIDED, "coarse")),
    Provider("torch", partial(_ours, backend="torch"), _GUIDED),
    Provider("triton", partial(_ours, backend="triton"), _GUIDED, why_not=_no_triton),
    *(Provider(name, partial(_blurring, how), ("attention",), why_not=_no_blurring) for name, how in BLURS.items()),
    Provider("blur + sdpa", partial(_then_sdpa, _our_blur), _GUIDED),
    *(
        Provider(
            f"blur + sdpa {name}", partial(_then_sdpa, _our_blur, backend=name), ("attention",), why_not=_no_triton
        )
        for name in ("flash", "cudnn")
    ),
    *(Provider(f"stride {n}", partial(_ours, stride=n), ("attention", "coarse"), exact=False) for n in (2, 4)),
    *(Provider(f"stride {n}", partial(_ours, stride=n), ("coarse",), exact=False) for n in (3, 8)),
    # The blur alone, including the copy of the batch that follows it, except for segkern's blur.
    Provider("blur official", partial(_blur_only, _official), ("blur",), "blur", no_graph=HOST_COPY),
    Provider("blur separable", partial(_blur_only, _separable), ("blur",), "blur"),
    Provider("blur dense", partial(_blur_only, _dense), ("blur",), "blur", scratch=_dense_scratch),
    Provider("blur torch", partial(_our_blur, backend="torch"), ("blur",), "blur"),
    Provider("blur triton", partial(_our_blur, backend="triton"), ("blur",), "blur", why_not=_no_triton),
    # Masses of keys: a softmax of all scores followed by a sum; and segkern's.
    Provider("mass naive", _naive_mass, ("mass",), "mass", scratch=_scores_scratch),
    Provider("mass auto", _mass, ("mass",), "mass"),
    Provider("mass torch", partial(_mass, backend="torch"), ("mass",), "mass"),
    Provider("mass triton", partial(_mass, backend="triton"), ("mass",), "mass", why_not=_no_triton),
)
PROVIDERS = {provider.name: provider for provider in _ALL_PROVIDERS}
# The sigmas of the blurred third in each suite. Providers name the suites they belong to.
SUITES: dict[str, tuple[float, ...]] = {
    "attention": (0.5, 1.0, 3.0, 10.0, 30.0, math.inf),  # a layer's attention, a third of the batch blurred
    "infinite": (math.inf,),  # cost of that attention when the blurred third has one query row
    "coarse": (1.0, 3.0, 10.0, 30.0),  # time saved by computing every few blurred rows, and the error
    "blur": (0.5, 1.0, 3.0, 10.0, 30.0, math.inf),  # the blur alone, compared with the attention that follows it
    "mass": (0.0,),  # masses of all keys, compared with a forward of attention
}


def find_providers(suite: str, patterns: Sequence[str] = ()) -> tuple[Provider, ...]:
    """Return the providers of a suite whose names match a glob, or all of them without globs.

    Raises:
        ValueError: If the suite is unknown or a glob matches nothing. The message lists the names.
    """
    if suite not in SUITES:
        raise ValueError(f"--suite must be one of {', '.join(SUITES)}, step, got {suite!r}")
    names = [provider.name for provider in PROVIDERS.values() if suite in provider.suites]
    return tuple(PROVIDERS[name] for name in select("--providers", patterns, names))

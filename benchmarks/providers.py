# SPDX-License-Identifier: Apache-2.0
"""The ways to compute one layer's attention in a guided step, as closures over the same inputs.

``PROVIDERS`` is the whole list: another way is one more entry, and every suite, table and plot has it.
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

Call = Callable[[], torch.Tensor]
Blur = Callable[[torch.Tensor], torch.Tensor]  # image tokens of the blurred samples [third, heads, tokens, dim]


@dataclass(frozen=True)
class Provider:
    """One way to compute.

    Attributes:
        name: in rows, tables and legends.
        what: in words.
        make: the closure for inputs and a sigma; what can be made once is made here.
        suites: that measure it.
        kind: what it computes: attention without any blur, with blurred queries, the blur alone, or masses of keys.
        exact: False for an approximation, whose error is reported and not held to the contract.
        why_not: the reason why it cannot run there, or None.
        scratch: bytes that it allocates beyond inputs and outputs, where they are many.
        no_graph: why a CUDA graph cannot hold it, or None.
    """

    name: str
    what: str
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
    """The Triton kernels with the queries blurred where ``BLURS`` says, whatever segkern would choose."""
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
        return "the mean has kernels of its own"
    return reason


def _no_triton(inputs: Inputs, sigma: float) -> str | None:
    if inputs.device.type == "cpu":
        return "Triton has no CPU target"
    return why_not_triton(inputs.device, inputs.case.dtype, inputs.case.head_dim)


def _official(inputs: Inputs, sigma: float) -> Blur:
    """A depthwise 2-D convolution, its kernel built on the host at every call."""
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
    """The queries of the whole batch with the grid of the last third blurred."""
    query, grid, plain = inputs.query, inputs.case.grid, inputs.case.batch - inputs.case.third
    blurred, only_image = make(inputs, sigma), inputs.case.tokens == grid.tokens

    def run() -> torch.Tensor:
        last = query[plain:]
        image = blurred(last[:, :, grid.start : grid.stop])
        if not only_image:
            image = torch.cat([last[:, :, : grid.start], image, last[:, :, grid.stop :]], dim=2)
        return torch.cat([query[:plain], image])

    return run


def _then_sdpa(make: Callable[[Inputs, float], Call], inputs: Inputs, sigma: float) -> Call:
    blur, key, value = make(inputs, sigma), inputs.key, inputs.value
    return lambda: F.scaled_dot_product_attention(blur(), key, value)


@lru_cache(maxsize=1)
def _compiled_flex(case: Case, device: torch.device) -> Callable[..., torch.Tensor]:
    """FlexAttention compiled for one shape; what was compiled before is forgotten, or a limit would stop it."""
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


_HOST_COPY = "it copies a kernel from the host at every call"
_GUIDED = ("attention", "infinite")
_ALL = (*_GUIDED, "coarse", "blur")

_BASELINES = (
    Provider("sdpa", "PyTorch's attention, its own choice of backend, no blur", partial(_sdpa, None),
             (*_ALL, "mass"), "plain"),
    Provider("sdpa math", "the same, products and softmax one by one", partial(_sdpa, SDPBackend.MATH),
             _GUIDED, "plain", scratch=_scores_scratch),
    Provider("sdpa flash", "the same, FlashAttention", partial(_sdpa, SDPBackend.FLASH_ATTENTION), _ALL, "plain"),
    Provider("sdpa efficient", "the same, memory-efficient kernels", partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION),
             _ALL, "plain", why_not=_no_gpu_backend),
    Provider("sdpa cudnn", "the same, cuDNN", partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
             _ALL, "plain", why_not=_no_gpu_backend),
)  # fmt: skip
_OTHERS = (
    Provider("official", "the official algorithm: 2-D convolution, copy of the batch, attention",
             partial(_then_sdpa, partial(_blur_only, _official)), _GUIDED, no_graph=_HOST_COPY),
    Provider("separable", "two products with a matrix per axis in PyTorch, then its attention",
             partial(_then_sdpa, partial(_blur_only, _separable)), _GUIDED),
    Provider("dense", "one product with the whole grid's blur matrix, then PyTorch's attention",
             partial(_then_sdpa, partial(_blur_only, _dense)), _GUIDED, scratch=_dense_scratch),
    Provider("flex", "our blur, then FlexAttention, compiled", _flex, _GUIDED),
)  # fmt: skip
BLURS = {"triton prologue": "PROLOGUE", "triton before": "BEFORE"}  # where the queries are blurred
_OURS = (
    Provider("auto", "segkern, its own choice", _ours, (*_GUIDED, "coarse")),
    Provider("torch", "segkern in PyTorch", partial(_ours, backend="torch"), _GUIDED),
    Provider("triton", "segkern's Triton kernels", partial(_ours, backend="triton"), _GUIDED, why_not=_no_triton),
    Provider("triton prologue", "the same, queries blurred in the prologue of each tile",
             partial(_blurring, BLURS["triton prologue"]), ("attention",), why_not=_no_blurring),
    Provider("triton before", "the same, queries blurred in launches before",
             partial(_blurring, BLURS["triton before"]), ("attention",), why_not=_no_blurring),
    Provider("blur + sdpa", "segkern's blur, then PyTorch's attention", partial(_then_sdpa, _our_blur), _GUIDED),
    *(
        Provider(f"stride {stride}", f"segkern, blurred rows {stride} tokens apart, an approximation",
                 partial(_ours, stride=stride), suites, exact=False)
        for stride, suites in ((2, ("attention", "coarse")), (3, ("coarse",)), (4, ("attention", "coarse")),
                               (8, ("coarse",)))
    ),
)  # fmt: skip
_BLURS = (
    Provider("blur official", "the official 2-D convolution and copy of the batch", partial(_blur_only, _official),
             ("blur",), "blur", no_graph=_HOST_COPY),
    Provider("blur separable", "two products with a matrix per axis in PyTorch", partial(_blur_only, _separable),
             ("blur",), "blur"),
    Provider("blur dense", "one product with the whole grid's blur matrix", partial(_blur_only, _dense),
             ("blur",), "blur", scratch=_dense_scratch),
    Provider("blur torch", "segkern's blur in PyTorch", partial(_our_blur, backend="torch"), ("blur",), "blur"),
    Provider("blur triton", "segkern's blur, Triton kernel", partial(_our_blur, backend="triton"),
             ("blur",), "blur", why_not=_no_triton),
)  # fmt: skip
_MASSES = (
    Provider("mass naive", "softmax of all scores, then their sum over the queries", _naive_mass,
             ("mass",), "mass", scratch=_scores_scratch),
    Provider("mass auto", "segkern's masses, its own choice", _mass, ("mass",), "mass"),
    Provider("mass torch", "segkern's masses in PyTorch, block by block", partial(_mass, backend="torch"),
             ("mass",), "mass"),
    Provider("mass triton", "segkern's masses, Triton kernels", partial(_mass, backend="triton"),
             ("mass",), "mass", why_not=_no_triton),
)  # fmt: skip
PROVIDERS = {provider.name: provider for provider in (*_BASELINES, *_OTHERS, *_OURS, *_BLURS, *_MASSES)}
# Each suite's sigmas of the blurred third; its providers name it.
SUITES: dict[str, tuple[float, ...]] = {
    "attention": (0.5, 1.0, 3.0, 10.0, 30.0, math.inf),  # a layer's attention, a third of the batch blurred
    "infinite": (math.inf,),  # what is left of it when the blurred third has one query row
    "coarse": (1.0, 3.0, 10.0, 30.0),  # what blurred rows at every few tokens save, and how wrong they are
    "blur": (0.5, 1.0, 3.0, 10.0, 30.0, math.inf),  # the blur alone, beside the attention that it comes before
    "mass": (0.0,),  # masses of all keys, beside a forward of attention
}


def find_providers(suite: str, patterns: Sequence[str] = ()) -> tuple[Provider, ...]:
    """The providers of a suite whose names fit a glob, all of them for none.

    Raises:
        ValueError: for an unknown suite, and for a glob that fits none; the message lists them.
    """
    if suite not in SUITES:
        raise ValueError(f"--suite takes {', '.join(SUITES)}, step, got {suite!r}")
    names = [provider.name for provider in PROVIDERS.values() if suite in provider.suites]
    return tuple(PROVIDERS[name] for name in select("--providers", patterns, names))

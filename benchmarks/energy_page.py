# SPDX-License-Identifier: Apache-2.0
"""``docs/energy.md`` and its pictures: what energy is, what a blur does to it, and where the statements fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.tables import markdown
from segkern import Grid
from segkern.analysis import energy, plots
from segkern.analysis.curvature import log_determinant, log_diagonal
from segkern.analysis.report import named
from segkern.core.gaussian import blur_matrix

PICTURES = ("energy-maps.png", "energy-over-sigma.png", "energy-over-steps.png")

_INTRODUCTION = """\
# Energy of attention

`python -m benchmarks.readme` writes this page, from `benchmarks/results/energy/`, which `python -m benchmarks energy`
measures, and from small cases that it computes; no number here is typed by hand.

With logits `A = scale * Q K^T`, the energy of a vector `a` of them is `-lse(a)`, minus the logarithm of the sum of
exponentials, and the energy of a layer is the sum over its vectors. The paper
([SEG](https://arxiv.org/abs/2408.00760), Definition 2.1) sums over the **keys**: a vector is a column of `A`, the
logits of one key at all queries, and the blur `B` over the query grid acts within it. The softmax that attention takes,
and so a map of energies over the picture, goes by the **queries**: a vector is a row, and the blur mixes rows; the
paper's appendix B calls this the dual. `segkern.energy` has both (`over="queries"` and `over="keys"`, after what the
sum of exponentials runs over), and all below is true of both unless it says otherwise.

    segkern energy demo "a large red ring above a small blue square" --out FOLDER    # or any other MODEL

draws a picture with the stock pipeline and records the energy of its self-attention on the way: maps, curves over sigma
and over steps, and JSON. In Python:

```python
import math
from segkern.integrations.diffusers import record_energy

with record_energy(pipe, layers="mid", sigmas=(2.0, math.inf), at_steps=(0, -1)) as recorder:
    image = pipe("a red fox").images[0]  # the same picture, bit for bit
recorder.records[0].map(sigma=2.0)  # [samples, heads, height, width], nats
```"""

_STATEMENTS = """\
## What the paper states, and what holds

Each is tested on random and structured logits in float64, beside cases in which it fails
([tests/core/test_theory.py](../tests/core/test_theory.py),
[tests/core/test_theory_curvature.py](../tests/core/test_theory_curvature.py)).
A boundary **keeps the mean** when the columns of `B` add up to 1, as its rows always do: `symmetric` and `circular` do.
The official `reflect` does not."""

_STATED = (
    (
        "Proposition 3.1: blurred logits are the logits of blurred queries",
        "exactly",
        "a blur after everything that depends on the position (rotary embedding), and before the softmax",
    ),
    (
        "Lemma 3.1: the mean is kept",
        "exactly; under reflect it drifts by at most `rms(c - 1)` standard deviations, with the column sums `c`",
        "a boundary that keeps the mean",
    ),
    (
        "Lemma 3.1: the variance falls",
        "it does not rise, exactly; under reflect it grows by a factor of at most `max c`",
        "a boundary that keeps the mean and weights that are not negative, which need not be a Gaussian's",
    ),
    (
        "remark: it falls more for a larger sigma",
        "**no**: taps are cut off at three sigma and clamped to the grid, so that a wider blur is not a narrower one "
        "blurred again. True of a blur that is applied again, of none against any, and of any against infinity",
        "a kernel that is a semigroup, such as heat flow",
    ),
    (
        "Lemma 3.2: energy rises",
        "it does not fall, exactly, for logits of any size and without the proof's Taylor series; of logits with one "
        "mean the uniform ones have the largest. The lemma's words have the log-sum-exp rise; it falls, as in its "
        "proof",
        "a boundary that keeps the mean; by queries the sum over them, as a query's own energy may fall",
    ),
    (
        "Theorem 3.1: the determinant of the Hessian of `-lse` falls",
        "**not in general**, see below; a bound on the curvature does",
        "logits that are not too peaked",
    ),
)

_THEOREM = """\
## Theorem 3.1

The Hessian of `-lse` is `-(diag(p) - p p^T)` with the softmax `p`, and its determinant is 0: a number added to all
logits changes nothing. The proof drops `p p^T`, which leaves `prod p_i`; that happens to be exactly the determinant
with any one logit held fixed, so there is a sound quantity. But `log prod p_i = sum(a) + n * energy`: the blur keeps
the sum and raises the energy, so the product **rises**. The proof says the opposite in its second inequality (22),
where a denominator that gets smaller is taken to make the fraction smaller.

The blur has a factor of its own: the proof multiplies the product by `prod b_ii`, from a Hessian whose entries are
multiplied by those of `B`; the chain rule gives `B^T H B`, and `det(B)^2`. With either, and a boundary that keeps the
mean, the determinant falls if and only if the energies of the vectors rise, on average, by less than minus the
logarithm of that factor for each logit, in nats. For the paper's vectors, by key, that is the table; by query, where
each row has a logit held fixed, the threshold of `det(B)^2` is less by one part in the number of keys:"""

_PEAKS = """\
It does when each key's logits have a range `r` with `r^2 / 8` below that number; peaked logits break it. What holds at
any logits and for any boundary: in no direction and nowhere in the landscape of one key does the curvature exceed
`max_ij |B_i - B_j|^2 / 4` with the rows of `B` (the last column; `segkern.energy.largest_curvature`), which is one half
without a blur, never more with one, and 0 for the mean query. And where logits are uniform, a boundary that keeps the
mean raises no eigenvalue of the Hessian."""


def cases() -> list[list[str]]:
    """Small logits for which a statement fails without its assumption: what is dropped, the case, before and after."""
    bump = torch.zeros(3, 2, dtype=torch.float64)
    bump[1] = 0.2
    ring = torch.tensor([3.0, -3.0, 3.0, -3.0], dtype=torch.float64)
    between = torch.zeros(3, 4, dtype=torch.float64)
    between[0, 0] = between[2, 0] = 9.0
    peaks = 40.0 * torch.eye(16, dtype=torch.float64)
    worst = _worst(39, 1.0)

    def layer(logits: torch.Tensor, width: int, boundary: str, *sigmas: float) -> list[float]:
        return [energy.layer_energy(*_inputs(logits), Grid(1, width), s, **_options(boundary)).item() for s in sigmas]

    def moments(sigma: float) -> float:
        return energy.logit_moments(*_inputs(worst), Grid(1, 39), sigma, **_options("reflect")).variance.item()

    def own(sigma: float) -> float:
        return energy.energies(*_inputs(between), Grid(1, 3), sigma, **_options("circular"))[0, 0, 1].item()

    def determinant(sigma: float) -> float:
        return energy.log_curvature(*_inputs(peaks), Grid(4, 4), sigma, **_options("circular")).item() / peaks.numel()

    reflected = layer(bump, 3, "reflect", 0.0, 1.0)
    clamped = layer(torch.stack([ring, -ring], dim=1), 4, "circular", 1.0, 100.0)
    rows = (
        ("the variance does not rise", "reflect", "its worst direction on a line of 39, sigma 1", _both(moments), 5),
        ("a layer's energy does not fall", "reflect", "0, 0.2, 0 on a line of 3, sigma 1", reflected, 3),
        ("energy grows with sigma", "taps clamped", "3, -3, 3, -3 around a ring, sigma 1 and then 100", clamped, 3),
        ("energy does not fall", "one query, no sum", "flat logits between two rows with a 9, sigma 1", _both(own), 3),
        ("log det a logit falls, b_ii", "peaks", "40 on the diagonal of 16 x 16, sigma 1", _both(determinant), 2),
    )
    return [[*words, *(f"{value:.{digits}f}" for value in values)] for *words, values, digits in rows]


def _inputs(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys with these logits ``[queries, keys]`` at a scale of 1."""
    return logits[None, None], torch.eye(logits.shape[1], dtype=torch.float64)[None, None]


def _options(boundary: str) -> dict[str, Any]:
    return {"scale": 1.0, "boundary": boundary, "dtype": torch.float64}


def _both(function: Callable[[float], float]) -> list[float]:
    """Without a blur and with one of sigma 1."""
    return [function(0.0), function(1.0)]


def _worst(length: int, sigma: float) -> torch.Tensor:
    """The direction without a mean that reflect makes longest, ``[length, 1]``."""
    centre = torch.eye(length, dtype=torch.float64) - 1 / length
    blur = blur_matrix(length, sigma, "reflect", dtype=torch.float64)
    return torch.linalg.svd(centre @ blur @ centre).Vh[0][:, None]


def thresholds(sigmas: Sequence[float], boundary: str = "symmetric") -> list[list[str]]:
    """By sigma, how much energy may rise for the determinant to fall, and how large curvature can be, on a grid."""
    lines = []
    for grid in (Grid(16, 16), Grid(32, 32)):
        for sigma in sigmas:
            paper = -log_diagonal(grid, sigma, boundary) / grid.tokens
            chain = -2 * log_determinant(grid, sigma, boundary) / grid.tokens
            bound = energy.largest_curvature(grid, sigma, boundary)
            words = f"{chain:.2f}" if math.isfinite(chain) else "∞"
            lines.append([f"{grid.height}x{grid.width}", named(sigma), f"{paper:.2f}", words, f"{bound:.4f}"])
    return lines


_HOLDS = {
    "energy_by_query_rises": "energy by query rises",
    "rises_over_the_sigma_before": "and over the sigma before",
    "energy_by_key_rises": "energy by key rises",
    "a_querys_own_rises": "a query's own rises",
    "a_keys_own_rises": "a key's own rises",
}
_FALLS = {
    "determinant_none": "determinant falls, no factor",
    "determinant_paper": "determinant falls, b_ii",
    "determinant_chain": "determinant falls, det(B)²",
}
_CHANGES = {
    "energy_rise": "energy of a query, rise in nats",
    "variance_left": "variance of a key's logits, share left",
    "mean_drift": "largest drift of the mean, in deviations",
}


_LOGARITHMS = ("log det, no factor", "log det, b_ii", "log det, det(B)²")


def holds(found: dict[str, Any], boundary: str) -> list[list[str]]:
    """By sigma, in how many heads, queries or keys each statement holds."""
    here = found["boundaries"][boundary]
    return [
        [named(sigma), *(_percent(here[name][i]) for name in _HOLDS), *(_percent(here[n]["falls"][i]) for n in _FALLS)]
        for i, sigma in enumerate(found["sigmas"])
    ]


def changes(found: dict[str, Any], boundary: str) -> list[list[str]]:
    """By sigma, by how much energy, variance, mean and determinants change."""
    here = found["boundaries"][boundary]
    return [
        [
            named(sigma),
            *(f"{here[name][i]:.3f}" for name in _CHANGES),
            *(_signed(here[name]["change"][i]) for name in _FALLS),
        ]
        for i, sigma in enumerate(found["sigmas"])
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}" if 0.0 < share < 1.0 else f"{share:.0%}"


def _signed(change: float) -> str:
    return f"{change:+.2f}" if math.isfinite(change) else "-∞"


def page(found: dict[str, Any]) -> str:
    """The page, from the counts of ``benchmarks.energy``."""
    sigmas = found["sigmas"]
    prompts = ", ".join(f'"{prompt}"' if prompt else "no prompt" for prompt in found["prompts"])
    cells = found["boundaries"]["reflect"]["cells"]
    parts = [
        _INTRODUCTION,
        f"![Energy of each query over the picture]({PICTURES[0]})",
        f"![Energy over the steps of a run]({PICTURES[2]})",
        _STATEMENTS,
        markdown(("statement", "what holds", "what it needs"), _STATED, "---"),
        _THEOREM,
        markdown(("grid, symmetric", "sigma", "b_ii", "det(B)²", "largest curvature"), thresholds(sigmas)),
        _PEAKS,
        "## Where they fail",
        markdown(("statement", "what is dropped", "case", "before", "after"), cases()),
        "## In the bundled model",
        f"{cells} heads: every head of layers {', '.join(found['layers'])} of `{found['model']}`, in steps\n"
        f"{', '.join(map(str, found['at_steps']))} of {found['steps']}, seed {found['seed']}, guidance scale "
        f"{found['guidance_scale']:g}, with the prompts\n{prompts};\nanalysed in float64, commit "
        f"`{found['environment']['commit']}`. Shares are of heads, or of all their queries or keys; changes\n"
        f"are medians over heads, determinants for each logit.",
    ]
    for boundary in found["boundaries"]:
        official = ", the official one" if boundary == "reflect" else ""
        parts += [
            f"Boundary {boundary}{official}. How often it holds:",
            markdown(("sigma", *_HOLDS.values(), *_FALLS.values()), holds(found, boundary)),
            "How much it changes:",
            markdown(("sigma", *_CHANGES.values(), *_LOGARITHMS), changes(found, boundary)),
        ]
    parts.append(f"![Energy, variance and curvature over sigma]({PICTURES[1]})")
    return "\n\n".join(parts) + "\n"


def pictures(run: dict[str, Any], picture: Path, folder: Path) -> None:
    """Draw the committed run."""
    with Image.open(picture) as drawn:
        (sheet,) = plots.plot_maps(run, folder, drawn)
    sheet.replace(folder / PICTURES[0])
    plots.plot_over_sigma(run, folder / PICTURES[1])
    plots.plot_over_steps(run, folder / PICTURES[2])

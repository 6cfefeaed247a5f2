# SPDX-License-Identifier: Apache-2.0
"""A static estimate of attention's speed from its compiled code: what one pass over a block of keys costs at least.

A multiprocessor spends on one pass of one program, in clocks:

* products: 4 BLOCK_M BLOCK_N D operations, half of it without values, over the rate of the matrix units;
* exponentials: those in the loop times the program's threads, over the rate of the special function units;
* issue: the loop's instructions times the program's warps, over what the schedulers issue in a clock;
* bytes: keys and values of the block, from L2, over the multiprocessor's share of its bandwidth.

With two programs or more on a multiprocessor one's products hide behind another's exponentials, so the largest of the
four counts; a program alone waits for its products before its exponentials, so these two add up, but for what a
compiler overlaps inside it. It is a bound for ranking tiles, not a prediction: latencies, barriers and the blur are
not in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """What one device does in a clock, from its maker's data sheet.

    Attributes:
        name: of the device.
        multiprocessors: of it.
        gigahertz: its boost clock, which the data sheet's peak is for.
        products: operations of float16 products with float32 sums, per multiprocessor and clock.
        exponentials: per multiprocessor and clock.
        issued: instructions of a warp, per multiprocessor and clock.
        bytes: from L2, per multiprocessor and clock.
        registers: of 32 bits, per multiprocessor.
        shared: bytes, per multiprocessor.
        warp: threads.
        warps: resident at most.
    """

    name: str
    multiprocessors: int
    gigahertz: float
    products: int
    exponentials: int
    issued: int
    bytes: int
    registers: int
    shared: int
    warp: int = 32
    warps: int = 64

    @property
    def peak(self) -> float:
        """TFLOP/s of the matrix units."""
        return self.multiprocessors * self.gigahertz * self.products / 1e3


# Peaks of dense float16 with float32 sums: A100 312, RTX 3090 71, RTX 4090 165, H100 SXM 989, B200 2250, RTX 5090 210,
# MI300X 1307 TFLOP/s. Bytes from L2 are rounded from published microbenchmarks and matter least here.
RATES = {
    "sm_80": Rates("A100", 108, 1.41, 2048, 16, 4, 64, 65536, 164 * 1024),
    "sm_86": Rates("RTX 3090", 82, 1.695, 512, 16, 4, 32, 65536, 100 * 1024, warps=48),
    "sm_89": Rates("RTX 4090", 128, 2.52, 512, 16, 4, 32, 65536, 100 * 1024, warps=48),
    "sm_90": Rates("H100 SXM", 132, 1.83, 4096, 16, 4, 32, 65536, 228 * 1024),
    "sm_100": Rates("B200", 148, 1.85, 8192, 16, 4, 32, 65536, 228 * 1024),
    "sm_120": Rates("RTX 5090", 170, 2.407, 512, 16, 4, 32, 65536, 100 * 1024, warps=48),
    # A wave has 64 threads on 16 lanes: one instruction takes 4 clocks, on each of 4 units.
    "gfx942": Rates("MI300X", 304, 2.1, 2048, 16, 1, 64, 4 * 64 * 512, 64 * 1024, warp=64, warps=32),
}


_WITHOUT_VALUES = ("_attention_energy_kernel", "_attention_mass_kernel")


@dataclass(frozen=True)
class Estimate:
    """What bounds the loop over keys.

    Attributes:
        programs: at a time on a multiprocessor.
        clocks: of one pass of one program, by resource.
        tflops: the bound.
        limit: the resource that sets it; two joined by ``+`` where they add up.
    """

    programs: int
    clocks: dict[str, float]
    tflops: float
    limit: str


def estimate(record: Mapping[str, Any], rates: Rates | None = None) -> Estimate | None:
    """The bound for one of ``benchmarks.compiled``'s records in half precision, None for other kernels.

    Args:
        record: of a kernel with a loop over keys.
        rates: of the device; by the record's target if not given.

    Example:
        >>> tile = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 64, "BLOCK_R": 0, "num_warps": 8}
        >>> loop = {"instructions": 280, "matrix": 8, "exponentials": 34}
        >>> kernel = {"target": "sm_90", "dtype": "bf16", "registers": 184, "shared_bytes": 49152, "head_dim": 64}
        >>> found = estimate(kernel | {"tile": tile, "loop": loop})
        >>> found.programs, found.limit, round(found.tflops)
        (1, 'products + issue', 473)
    """
    if record["loop"] is None or record["dtype"] == "fp32":
        return None
    rates = rates or RATES[record["target"]]
    tile, loop = record["tile"], record["loop"]
    products = 1 if record.get("kernel") in _WITHOUT_VALUES else 2
    operations = 2 * products * tile["BLOCK_M"] * tile["BLOCK_N"] * record["head_dim"]
    padded = operations * (tile["BLOCK_D"] + tile["BLOCK_R"]) / record["head_dim"]
    clocks = {
        "products": padded / rates.products,
        "exponentials": loop["exponentials"] * tile["num_warps"] * rates.warp / rates.exponentials,
        "issue": loop["instructions"] * tile["num_warps"] / rates.issued,
        "bytes": products * tile["BLOCK_N"] * record["head_dim"] * 2 / rates.bytes,
    }
    programs = resident(record, rates)
    others = max(("exponentials", "issue"), key=lambda name: clocks[name])
    costs = dict(clocks)
    if programs == 1:
        costs[f"products + {others}"] = clocks["products"] + clocks[others]
    limit = max(costs, key=lambda name: costs[name])
    tflops = operations / costs[limit] * rates.multiprocessors * rates.gigahertz / 1e3
    return Estimate(programs, clocks, tflops, limit)


def resident(record: Mapping[str, Any], rates: Rates) -> int:
    """Programs of a kernel that fit a multiprocessor, by registers, shared memory and warps."""
    warps = record["tile"]["num_warps"]
    per_warp = -(-record["registers"] // 8) * 8 * rates.warp
    by_registers = rates.registers // (per_warp * warps)
    by_shared = rates.shared // max(record["shared_bytes"] + 1024, 1)
    return max(1, min(by_registers, by_shared, rates.warps // warps))

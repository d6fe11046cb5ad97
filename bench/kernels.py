"""Products with packed weights: microseconds, and shares of the machine's limits, beside torch's.

Each weight is multiplied from many copies in turn, more than the caches hold, since a model's
other weights would have passed through them too. Implementations take turns, in short rounds, and
a fast call counts, one of the fastest twentieth: other processes slow most calls down on a busy
machine, and the very fastest found its weights in a cache by luck. A call is made from Python,
its few microseconds included.

Formulas: GB/s = bytes of the weight / seconds, as a share of the read bandwidth measured by the
library in the same run; GFLOP/s = 2 M N K / seconds, as a share of the bf16 dot product's peak
(`vdpbf16ps` where the machine has it), measured too; both with the same threads. The share can
pass 100 %: products with bf16 weights use fp32 multiply-adds, and integer ones integers.

Run it as `python -m bench.kernels`.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import environment, print_environment, print_table, write_results
from minigpt.kernels import library
from minigpt.kernels.linear import (
    PackedWeight,
    linear,
    pack_bfloat16,
    pack_int4,
    pack_int8,
)
from minigpt.kernels.roofline import Arithmetic, peak, read_bandwidth
from minigpt.model.linear import quantize_groups, quantize_rows

# (N, K) of the 124M and the 429M model of bench.engine_throughput.
SHAPES = [
    (768, 768),
    (2048, 768),
    (768, 2048),
    (50257, 768),
    (1024, 1024),
    (4096, 1024),
    (1024, 4096),
]
ROWS = [1, 4, 16, 64, 256]
INT4_GROUP = 32
ROUNDS = 4

Product = Callable[[Tensor, Any], object]


@dataclass(frozen=True)
class Implementation:
    """One way to multiply: `product(inputs, copy)` for each of a weight's copies."""

    name: str
    product: Product
    copies: list[Any]
    nbytes: int


def implementations(out_features: int, in_features: int, cold: int) -> list[Implementation]:
    """Make every implementation's copies of one random weight, `cold` bytes of each kind."""
    weight = (torch.randn(out_features, in_features) / in_features**0.5).bfloat16()
    int8, scale8 = quantize_rows(weight)
    codes, scale4, zero = quantize_groups(weight, INT4_GROUP)
    ours = {
        "bf16": pack_bfloat16(weight),
        "int8": pack_int8(int8, scale8),
        "int4": pack_int4(codes, scale4, zero),
    }
    made = [
        *_torch_bf16(weight, cold),
        _copied("int8 torch", torch._weight_int8pack_mm, (int8, scale8), cold),
        *_torch_int4(codes, scale4, cold),
    ]
    for kind, packed in ours.items():
        copies = [_copy(packed) for _ in range(_count(packed.nbytes, cold))]
        for bits in (16,) if kind == "bf16" else (16, 8):
            name = "bf16 minigpt" if kind == "bf16" else f"{kind} minigpt a{bits}"
            made.append(Implementation(name, _ours(bits), copies, packed.nbytes))
    return sorted(made, key=lambda implementation: implementation.name)


def _ours(bits: int) -> Product:
    return lambda inputs, copy: linear(inputs, copy, bits)


def _torch_bf16(weight: Tensor, cold: int) -> list[Implementation]:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return []
    multiply = torch.ops.mkldnn._linear_pointwise
    copies = [
        torch.ops.mkldnn._reorder_linear_weight(weight, None)
        for _ in range(_count(weight.nbytes, cold))
    ]

    def product(inputs: Tensor, copy: Tensor) -> object:
        return multiply(inputs, copy, None, "none", [], "")

    return [Implementation("bf16 torch", product, copies, weight.nbytes)]


def _torch_int4(codes: Tensor, scale: Tensor, cold: int) -> list[Implementation]:
    if codes.shape[0] % 16:
        return []  # torch's kernel takes whole blocks of columns
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    # (G, N, 2): scale and offset, which is added to scale * (code - 8).
    scales = torch.stack((scale, torch.zeros_like(scale)), -1).transpose(0, 1).contiguous()

    def multiply(inputs: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        return torch._weight_int4pack_mm_for_cpu(inputs, weight, INT4_GROUP, scales)

    return [_copied("int4 torch", multiply, (packed, scales), cold)]


def _copied(
    name: str, multiply: Callable[..., object], parts: tuple[Tensor, ...], cold: int
) -> Implementation:
    nbytes = sum(part.nbytes for part in parts)
    copies = [tuple(part.clone() for part in parts) for _ in range(_count(nbytes, cold))]
    return Implementation(name, lambda inputs, copy: multiply(inputs, *copy), copies, nbytes)


def _copy(packed: PackedWeight) -> PackedWeight:
    data = torch.empty_like(packed.data)
    kernels = library.loaded()
    assert kernels is not None
    kernels.functions.mg_advise_huge(data.data_ptr(), data.nbytes)
    return dataclasses.replace(packed, data=data.copy_(packed.data))


def _count(nbytes: int, cold: int) -> int:
    return max(2, -(-cold // nbytes))


def fast_times(made: list[Implementation], inputs: Tensor, seconds: float) -> list[float]:
    """Return the seconds in which each implementation's fastest twentieth of calls ended."""
    taken: list[list[float]] = [[] for _ in made]
    for _ in range(ROUNDS):
        for i, implementation in enumerate(made):
            copies, product = implementation.copies, implementation.product
            end = time.perf_counter() + seconds / ROUNDS
            while True:
                copy = copies[len(taken[i]) % len(copies)]
                begun = time.perf_counter()
                product(inputs, copy)
                ended = time.perf_counter()
                taken[i].append(ended - begun)
                if ended > end:
                    break
    return [sorted(times)[len(times) // 20] for times in taken]


def measure(options: argparse.Namespace, bandwidth: float, flops: float) -> list[dict[str, Any]]:
    """Time every shape, row count and implementation."""
    results = []
    for out_features, in_features in options.shapes:
        made = implementations(out_features, in_features, options.cold << 20)
        for rows in options.rows:
            inputs = torch.randn(rows, in_features).bfloat16()
            times = fast_times(made, inputs, options.seconds)
            for implementation, taken in zip(made, times, strict=True):
                work = 2 * rows * out_features * in_features
                results.append(
                    {
                        "shape": f"{out_features} x {in_features}",
                        "rows": rows,
                        "name": implementation.name,
                        "us": taken * 1e6,
                        "gb_s": implementation.nbytes / taken / 1e9,
                        "bandwidth_share": implementation.nbytes / taken / bandwidth,
                        "gflop_s": work / taken / 1e9,
                        "peak_share": work / taken / flops,
                    }
                )
    return results


def table(results: list[dict[str, Any]]) -> list[list[object]]:
    """Lay out one line for each result."""
    return [
        [
            f"{r['shape']:>12}  M={r['rows']:<4}{r['name']}",
            f"{r['us']:.0f}",
            f"{r['gb_s']:.1f}",
            f"{r['bandwidth_share']:.0%}",
            f"{r['gflop_s']:.0f}",
            f"{r['peak_share']:.0%}",
        ]
        for r in results
    ]


def _shape(text: str) -> tuple[int, int]:
    out_features, _, in_features = text.partition("x")
    return int(out_features), int(in_features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, metavar="M")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4, help="for each number")
    parser.add_argument("--cold", type=int, default=512, help="MiB of copies of each weight")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kernels = library.loaded()
    if kernels is None:
        raise SystemExit(f"no kernels here: {library.find()}")
    described = environment()
    print_environment(described)
    bandwidth = read_bandwidth(kernels)
    limits = {arithmetic.name.lower(): peak(kernels, arithmetic) for arithmetic in Arithmetic}
    shown = ", ".join(f"{name} {value / 1e9:.0f} GFLOP/s" for name, value in limits.items())
    print(f"kernels  {kernels.level}, {options.threads} threads")
    print(f"limits   read {bandwidth / 1e9:.1f} GB/s, {shown}\n")
    results = measure(options, bandwidth, limits["bfloat16"])
    print_table(["product", "us", "GB/s", "of read", "GFLOP/s", "of bf16 peak"], table(results))
    write_results("kernels", described | {"bandwidth": bandwidth, **limits, "results": results})


if __name__ == "__main__":
    with torch.inference_mode():
        main()

"""Training throughput at equal architecture: minigpt, nanoGPT and the transformers Trainer.

All train a 13.8M-parameter decoder (6 layers, width 384, 6 heads, vocabulary 8192, tied
embeddings) on 16 x 256 tokens a step with AdamW and clipping, in bf16, two of them compiled.
minigpt's own arrangement is Qwen3's: RMSNorm, rotary positions, query-key norm, SwiGLU of
inner width 1024 (three matrices of 384 x 1024 are as many weights as two of 384 x 1536).

Run it as `python -m bench.train_throughput --nanogpt PATH-OF-ITS-CHECKOUT`.
"""

from __future__ import annotations

import argparse
import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench import train_peers
from bench.harness import (
    Peer,
    Timing,
    environment,
    measured_peak_flops,
    print_environment,
    print_table,
    ratio_interval,
    spread,
    time_in_turn,
    write_results,
)


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    peaks = [measured_peak_flops()]
    shape = {
        "vocab": arguments.vocab,
        "length": arguments.length,
        "batch": arguments.batch,
        "warmup": 3,
    }
    timings = time_in_turn(
        choose_peers(arguments, shape), rounds=arguments.rounds, steps=arguments.steps
    )
    peaks.append(measured_peak_flops())
    results = report(timings, arguments.batch * arguments.length, max(peaks))
    write_results(
        "train_throughput",
        {"environment": described, "shape": shape, "peak_flops": peaks, **results},
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, help="checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each peer (default 7)")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a turn (default 6)")
    parser.add_argument("--batch", type=int, default=16, help="rows a step (default 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default 256)")
    parser.add_argument("--vocab", type=int, default=8192, help="vocabulary (default 8192)")
    parser.add_argument("--peers", default="", help="comma-separated names; default all present")
    return parser.parse_args()


def choose_peers(
    arguments: argparse.Namespace, shape: dict[str, int]
) -> dict[str, tuple[Peer, dict[str, Any]]]:
    """Return the peers that are here; says which are not."""
    ours = {"optimizer": "adamw", "mlp": "swiglu"}
    peers: dict[str, tuple[Peer, dict[str, Any]]] = {
        "minigpt": (train_peers.minigpt, shape | ours),
        "minigpt GELU": (train_peers.minigpt, shape | ours | {"mlp": "gelu"}),
        "minigpt Muon": (train_peers.minigpt, shape | ours | {"optimizer": "muon"}),
    }
    if arguments.nanogpt and (arguments.nanogpt / "model.py").is_file():
        checkout = {"checkout": str(arguments.nanogpt)}
        peers["nanoGPT"] = (train_peers.nanogpt, shape | checkout)
    else:
        print("nanoGPT skipped: --nanogpt names no checkout")
    if find_spec("transformers") and find_spec("accelerate"):
        peers["Trainer"] = (train_peers.trainer, shape | {"compiled": False})
        peers["Trainer compiled"] = (train_peers.trainer, shape | {"compiled": True})
    else:
        print("Trainer skipped: transformers or accelerate is not installed")
    wanted = [name for name in arguments.peers.split(",") if name]
    return {name: peer for name, peer in peers.items() if not wanted or name in wanted}


def report(timings: list[Timing], tokens: int, peak: float) -> dict[str, Any]:
    """Print the table and the goal's ratio; return them for the results file."""
    rows, peers = [], {}
    for timing in timings:
        speeds = [tokens / seconds for seconds in timing.round_medians]
        utilization = statistics.median(speeds) * timing.facts["flops_per_token"] / peak
        peers[timing.name] = timing.facts | {
            "tokens_per_second": speeds,
            "share_of_peak": utilization,
        }
        rows.append(
            [
                timing.name,
                f"{timing.facts['parameters']:,}",
                f"{timing.facts['flops_per_token'] / 1e6:.1f}",
                spread(speeds),
                f"{utilization:.1%}",
                f"{timing.facts['warmup_seconds']:.0f}",
            ]
        )
    print(f"\nbf16 matrix peak, measured: {peak / 1e12:.2f} TFLOP/s")
    print("tokens/s: median of the rounds' medians (least-largest)\n")
    header = ("peer", "parameters", "MFLOP/token", "tokens/s", "of peak", "warm-up s")
    print_table(header, rows)
    results: dict[str, Any] = {"peers": peers}
    others = [t for t in timings if not t.name.startswith("minigpt")]
    if others and timings[0].name == "minigpt":
        best = min(others, key=lambda t: statistics.median(t.round_medians))
        ratio = ratio_interval(best.round_medians, timings[0].round_medians)
        results["ratio_to_best_peer"] = {"peer": best.name, "median_least_largest": ratio}
        low, high = ratio[1:]
        print(f"\nminigpt / {best.name}: {ratio[0]:.2f}x ({low:.2f}-{high:.2f}); goal 1.3x")
    return results


if __name__ == "__main__":
    main()

"""What bits that do not depend on the number of ranks cost: `mesh.reduce` = tree against DDP.

Two ranks, one thread each, over gloo; the two ways take turns, a few steps each. DDP overlaps its
all-reduce with the backward pass; the tree sums after it. Run as `python -m bench.elastic`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from bench.harness import (
    environment,
    print_environment,
    print_table,
    ratio_interval,
    spread,
    write_results,
)
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import MeshConfig, OptimizerConfig
from minigpt.train.mesh import Mesh
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import spread as lay_out
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch

_steps: dict[str, tuple[TrainStep, Mesh]] = {}  # of a rank, from one call to the next


def model_config(width: int, layers: int, length: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=8192,
        num_layers=layers,
        hidden_size=width,
        num_heads=width // 64,
        num_kv_heads=width // 64,
        head_dim=64,
        intermediate_size=8 * width // 3 // 32 * 32,
        context_length=length,
    )


def run_steps(
    reduce: str, model: ModelConfig, micro_batches: int, steps: int
) -> tuple[list[float], list[str]]:
    """Return each step's seconds and the bits of its loss."""
    if reduce not in _steps:
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        mesh = mesh_of(MeshConfig.model_validate({"dp": ranks, "reduce": reduce}))
        decoder = Decoder(model)
        decoder.init_weights(torch.Generator().manual_seed(0))
        laid = lay_out(decoder, mesh)
        optimizer = Optimizer(decoder, OptimizerConfig(kind="adamw", lr=1e-3, muon_lr=0.02))
        options = StepOptions(256, torch.float32, clip_norm=1.0)
        _steps[reduce] = TrainStep(decoder, optimizer, options, spread=laid), mesh
    step, mesh = _steps[reduce]
    batches = [make_batch(model, m) for m in mesh.micro_batches(micro_batches)]
    seconds, losses = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        result = step.run(batches, 1.0)
        assert result is not None
        seconds.append(time.perf_counter() - begin)
        losses.append(result.loss.hex())
    return seconds, losses


def main() -> None:
    arguments = parse_arguments()
    described = environment()
    print_environment(described)
    model = model_config(arguments.width, arguments.layers, arguments.length)
    rounds: dict[str, list[float]] = {"ring": [], "tree": []}
    bits: dict[str, list[str]] = {"ring": [], "tree": []}
    with Ranks(2) as ranks:
        for reduce in rounds:  # warm up
            bits[reduce] += ranks.run(run_steps, reduce, model, arguments.micro_batches, 2)[0][1]
        for _ in range(arguments.rounds):
            for reduce, medians in rounds.items():
                found = ranks.run(
                    run_steps, reduce, model, arguments.micro_batches, arguments.steps
                )[0]
                medians.append(statistics.median(found[0]))
                bits[reduce] += found[1]
    count = len(bits["tree"])
    with Ranks(1) as alone:
        equal = {
            reduce: alone.run(run_steps, reduce, model, arguments.micro_batches, count)[0][1]
            == bits[reduce]
            for reduce in bits
        }
    report(arguments, model, rounds, equal, count, described)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a turn (default 4)")
    parser.add_argument("--width", type=int, default=256, help="of the model (default 256)")
    parser.add_argument("--layers", type=int, default=6, help="of the model (default 6)")
    parser.add_argument("--length", type=int, default=256, help="tokens a row (default 256)")
    parser.add_argument("--micro-batches", type=int, default=8, help="a step (default 8)")
    return parser.parse_args()


def report(
    arguments: argparse.Namespace,
    model: ModelConfig,
    rounds: dict[str, list[float]],
    equal: dict[str, bool],
    steps: int,
    described: dict[str, Any],
) -> None:
    parameters = model.parameter_counts().total
    print(f"\n{parameters:,} parameters, {arguments.micro_batches} micro-batches a step, 2 ranks")
    print("ms a step: median of the rounds' medians (least-largest)\n")
    rows = [
        [
            {"ring": "DDP, all-reduce", "tree": "tree"}[reduce],
            spread([1000 * value for value in medians]),
            "yes" if equal[reduce] else "no",
        ]
        for reduce, medians in rounds.items()
    ]
    print_table(("reduce", "ms a step", f"bits of {steps} losses as 1 rank's"), rows)
    ratio = ratio_interval(rounds["tree"], rounds["ring"])
    print(f"\ntree / DDP: {ratio[0]:.3f}x ({ratio[1]:.3f}-{ratio[2]:.3f})")
    write_results(
        "elastic",
        {
            "environment": described,
            "parameters": parameters,
            "seconds": rounds,
            "bits_as_one_rank": equal,
            "tree_to_ring": ratio,
        },
    )


if __name__ == "__main__":
    main()

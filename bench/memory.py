"""The memory estimate against the measured peak of a step, over several shapes and meshes.

Measured are the allocations of torch's CPU allocator, each one as the profiler reports it, during
a step after the first two, on top of what the rank holds between steps. Run as
`python -m bench.memory`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from bench.harness import environment, print_environment, print_table, write_results
from minigpt.core.config import from_mapping
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.config import TrainConfig
from minigpt.train.memory import describe_workload, estimate_memory
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import spread
from minigpt.train.precision import product_dtype
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch

GOAL = 0.10

BASE: dict[str, Any] = {
    "layers": 4,
    "width": 256,
    "heads": 4,
    "kv": 4,
    "length": 256,
    "rows": 4,
    "micro": 1,
    "vocab": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "base, Muon": {},
    "AdamW": {"optimizer": {"kind": "adamw"}},
    "accumulation": {"micro": 4},
    "deep": {"layers": 12, "width": 192, "heads": 3, "kv": 3},
    "wide": {"layers": 2, "width": 512, "heads": 8, "kv": 8},
    "long": {"length": 1024, "rows": 2},
    "many rows": {"rows": 16},
    "grouped queries": {"kv": 1},
    "GPT-2 family": {
        "family": {
            "norm": "layernorm",
            "position": "learned",
            "mlp": "gelu",
            "qk_norm": False,
            "qkv_bias": True,
            "output_bias": True,
            "mlp_bias": True,
        }
    },
    "untied": {"family": {"tie_embeddings": False}},
    "large vocabulary": {"vocab": 32768, "layers": 2},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, many rows": {"precision": "bfloat16", "rows": 16},
    "checkpoint full": {"rows": 16, "memory": {"checkpoint": "full"}},
    "checkpoint selective": {"rows": 16, "memory": {"checkpoint": "selective"}},
    "dp 2": {"mesh": {"dp": 2}},
    "dp 2, tree": {"mesh": {"dp": 2, "reduce": "tree"}, "micro": 4},
    "fsdp 2, zero3": {"mesh": {"fsdp": 2}},
    "fsdp 2, zero2": {"mesh": {"fsdp": 2, "reshard": "zero2"}},
    "tp 2": {"mesh": {"tp": 2}, "rows": 8},
}


def configs(changes: dict[str, Any]) -> tuple[TrainConfig, ModelConfig]:
    shape = BASE | changes
    mesh = shape.get("mesh", {})
    ranks = mesh.get("dp", 1) * mesh.get("fsdp", 1)
    model = ModelConfig(
        vocab_size=shape["vocab"],
        num_layers=shape["layers"],
        hidden_size=shape["width"],
        num_heads=shape["heads"],
        num_kv_heads=shape["kv"],
        head_dim=64,
        intermediate_size=8 * shape["width"] // 3 // 32 * 32,
        context_length=shape["length"],
        **shape.get("family", {}),
    )
    tree = {
        "data": "none",
        "steps": 1,
        "batch": {
            "sequence_length": shape["length"],
            "micro_batch_size": shape["rows"],
            "tokens_per_step": shape["length"] * shape["rows"] * shape["micro"] * ranks,
            "loss_chunk_tokens": 512,
        },
        "optimizer": {"lr": 0.001, "muon_lr": 0.02} | shape.get("optimizer", {}),
        "mesh": mesh,
        "memory": shape.get("memory", {}),
        "device": "cpu",
        "precision": shape.get("precision", "float32"),
    }
    return from_mapping(TrainConfig, tree), model


def measure(config: TrainConfig, model: ModelConfig) -> tuple[int, int]:
    """Return (bytes held between steps, peak bytes during one)."""
    mesh = mesh_of(config.mesh)
    decoder = Decoder(model)
    decoder.init_weights(torch.Generator().manual_seed(0))
    dtype = product_dtype(config.precision)
    laid = spread(decoder, mesh, dtype=dtype)
    optimizer = Optimizer(decoder, config.optimizer)
    assert isinstance(config.batch.loss_chunk_tokens, int)
    assert isinstance(config.batch.tokens_per_step, int)
    assert isinstance(config.batch.micro_batch_size, int)
    options = StepOptions(config.batch.loss_chunk_tokens, dtype, 1.0, memory=config.memory)
    step = TrainStep(decoder, optimizer, options, spread=laid)
    rows = config.batch.tokens_per_step // model.context_length
    count = rows // config.batch.micro_batch_size
    batches = [
        make_batch(model, m, config.batch.micro_batch_size) for m in mesh.micro_batches(count)
    ]
    for _ in range(2):
        step.run(batches, 1.0)
    held = sum_bytes([*decoder.parameters(), *optimizer.state_dict().values()])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run(batches, 1.0)
    return held, held + highest_level(profiler)


def sum_bytes(tensors: Iterable[Tensor]) -> int:
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values()
    )


def highest_level(profiler: profile) -> int:
    """Return the most that was allocated at once beyond what was there before."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    changes = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    level = highest = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        level += change
        highest = max(highest, level)
    return highest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="comma-separated shapes; default all")
    wanted = [name for name in parser.parse_args().only.split(",") if name]
    described = environment()
    print_environment(described)
    rows, results = [], {}
    pools: dict[int, Ranks] = {}
    try:
        for name, changes in SHAPES.items():
            if wanted and name not in wanted:
                continue
            config, model = configs(changes)
            if config.mesh.size not in pools:
                pools[config.mesh.size] = Ranks(config.mesh.size)
            found = pools[config.mesh.size].run(measure, config, model)
            held, peak = max(found, key=lambda pair: pair[1])
            estimate = estimate_memory(describe_workload(config, model))
            error = estimate.peak / peak - 1
            results[name] = {"held": held, "measured": peak, "estimated": estimate, "error": error}
            mark = "" if abs(error) <= GOAL else " !"
            sizes = [f"{size / 1e6:.1f}" for size in (held, peak, estimate.peak)]
            rows.append([name, *sizes, f"{error:+.1%}{mark}"])
    finally:
        for pool in pools.values():
            pool.close()
    print("\nMB on the rank that needs most\n")
    print_table(("shape", "held", "peak", "estimate", "error"), rows)
    errors = [abs(result["error"]) for result in results.values()]
    within = sum(error <= GOAL for error in errors)
    print(f"\n{within} of {len(errors)} within {GOAL:.0%}; largest error {max(errors):.1%}")
    write_results("memory", {"environment": described, "shapes": results})


if __name__ == "__main__":
    main()

"""The memory estimate against the measured peak of a step, over several shapes and meshes.

The estimate was worked out on the shapes of `bench.memory_shapes.FITTED` and is judged by those
of `HELD_OUT`. Measured are the allocations of torch's CPU allocator, each one as the profiler
reports it, during a step after the first two, on top of what the rank holds between steps. Run
as `python -m bench.memory`.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from bench.harness import environment, print_environment, print_table, write_results
from bench.memory_shapes import BASE, FITTED, HELD_OUT
from minigpt.core.config import from_mapping
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.model.lora import add_adapters
from minigpt.model.weights import LoadedModel
from minigpt.train.config import TrainConfig
from minigpt.train.memory import estimate_memory
from minigpt.train.objective import Objective
from minigpt.train.objectives import make_objective
from minigpt.train.optimizer import Optimizer
from minigpt.train.parallelize import spread
from minigpt.train.precision import product_dtype
from minigpt.train.processes import Ranks, mesh_of
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch

GOAL = 0.10


def configs(changes: dict[str, Any]) -> tuple[TrainConfig, ModelConfig, ModelConfig | None]:
    """Return a run's config, its model and, where it has one, the teacher."""
    shape = BASE | changes
    mesh = shape.get("mesh", {})
    ranks = mesh.get("dp", 1) * mesh.get("fsdp", 1) * mesh.get("ep", 1)
    objective = shape.get("objective", {})
    tree = {
        "data": "none",
        "steps": 1,
        "initialize_from": "none" if "lora" in shape or objective.get("kind") == "dpo" else None,
        "objective": objective,
        "lora": shape.get("lora", {}),
        "batch": {
            "sequence_length": shape["length"],
            "micro_batch_size": shape["rows"],
            "tokens_per_step": shape["length"] * shape["rows"] * shape["micro"] * ranks,
            "loss_chunk_tokens": 256,
        },
        "optimizer": {"lr": 0.001, "muon_lr": 0.02} | shape.get("optimizer", {}),
        "mesh": mesh,
        "memory": shape.get("memory", {}),
        "device": "cpu",
        "precision": shape.get("precision", "float32"),
    }
    teacher = _model(shape | shape["teacher"]) if "teacher" in shape else None
    return from_mapping(TrainConfig, tree), _model(shape), teacher


def _model(shape: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
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


def measure(
    config: TrainConfig, model: ModelConfig, teacher: ModelConfig | None = None
) -> tuple[int, int]:
    """Return (bytes held between steps, peak bytes during one)."""
    mesh = mesh_of(config.mesh)
    decoder = _decoder(model)
    if config.lora.rank:
        add_adapters(decoder, config.lora, torch.Generator().manual_seed(0))
    teaching = None if teacher is None else _loaded(teacher)
    objective = make_objective(config, model, _loaded(model), teaching)
    dtype = product_dtype(config.precision)
    laid = spread(decoder, mesh, dtype=dtype)
    del decoder  # of a pipeline the other stages' layers go with it
    optimizer = Optimizer(laid.model, config.optimizer)
    assert isinstance(config.batch.loss_chunk_tokens, int)
    assert isinstance(config.batch.tokens_per_step, int)
    assert isinstance(config.batch.micro_batch_size, int)
    options = StepOptions(config.batch.loss_chunk_tokens, dtype, 1.0, memory=config.memory)
    step = TrainStep(laid.model, optimizer, options, objective, spread=laid)
    rows = config.batch.tokens_per_step // model.context_length
    count = rows // config.batch.micro_batch_size
    batches = [
        make_batch(model, m, config.batch.micro_batch_size) for m in mesh.micro_batches(count)
    ]
    # The optimizer's state comes into being; torch's DDP makes its buckets, and makes them anew.
    for _ in range(2):
        step.run(batches, 1.0)
    learning = [p for p in laid.model.parameters() if p.requires_grad]
    frozen = [p for part in _frozen_models(objective) for p in part.parameters()]
    held = sum_bytes([*laid.model.parameters(), *frozen, *optimizer.state_dict().values()])
    if isinstance(laid.call, DistributedDataParallel):
        held += sum_bytes(learning)  # the buckets, in which gradients lie
    gc.collect()  # or what earlier shapes left would go away in between
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step.run(batches, 1.0)
    return held, held + highest_level(profiler)


def _decoder(model: ModelConfig) -> Decoder:
    decoder = Decoder(model)
    decoder.init_weights(torch.Generator().manual_seed(0))
    return decoder


def _loaded(model: ModelConfig) -> LoadedModel:
    return LoadedModel(_decoder(model), model, Path("none"), "none")


def _frozen_models(objective: Objective) -> list[nn.Module]:
    owners = [objective, getattr(objective, "reference", None)]
    parts = [part for owner in owners if owner is not None for part in vars(owner).values()]
    return [part for part in parts if isinstance(part, nn.Module)]


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
    parser.add_argument("--only", default="", help="shapes, separated by semicolons")
    wanted = [name for name in parser.parse_args().only.split(";") if name]
    described = environment()
    print_environment(described)
    results: dict[str, Any] = {}
    pools: dict[int, Ranks] = {}
    try:
        for title, shapes in (("fitted", FITTED), ("held out", HELD_OUT)):
            results[title] = {
                name: _compare(name, changes, pools)
                for name, changes in shapes.items()
                if not wanted or name in wanted
            }
    finally:
        for pool in pools.values():
            pool.close()
    for title, found in results.items():
        if found:
            _print_results(title, found)
    write_results("memory", {"environment": described, "shapes": results})


def _compare(name: str, changes: dict[str, Any], pools: dict[int, Ranks]) -> dict[str, Any]:
    config, model, teacher = configs(changes)
    if config.mesh.size not in pools:
        pools[config.mesh.size] = Ranks(config.mesh.size)
    found = pools[config.mesh.size].run(measure, config, model, teacher)
    held, peak = max(found, key=lambda pair: pair[1])
    estimate = estimate_memory(config, model, teacher)
    error = estimate.peak / peak - 1
    print(name, f"{error:+.1%}", file=sys.stderr, flush=True)
    return {"held": held, "measured": peak, "estimated": estimate, "error": error}


def _print_results(title: str, found: dict[str, Any]) -> None:
    rows = []
    for name, one in found.items():
        sizes = [one["held"], one["measured"], one["estimated"].peak]
        mark = "" if abs(one["error"]) <= GOAL else " !"
        rows.append([name, *(f"{size / 1e6:.1f}" for size in sizes), f"{one['error']:+.1%}{mark}"])
    print(f"\n{title}: MB on the rank that needs most\n")
    print_table(("shape", "held", "peak", "estimate", "error"), rows)
    errors = [abs(one["error"]) for one in found.values()]
    within = sum(error <= GOAL for error in errors)
    print(f"\n{within} of {len(errors)} within {GOAL:.0%}; largest error {max(errors):.1%}")


if __name__ == "__main__":
    main()

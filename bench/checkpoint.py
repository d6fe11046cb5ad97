"""How long training stands still for a checkpoint, written at once or in the background.

`python -m bench.checkpoint` trains two shapes on 1 and on 2 ranks (FSDP2 over gloo) and saves by
turns both ways, a few plain steps before each:

- stall: seconds in the call, as a share of a plain step;
- drag: what the steps that ran during a background write took longer than plain ones, in all;
- write: the whole save, from the call to the rename.

Same machine, same process, same state; every save is a real one, synced to the disk and hashed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import environment, print_environment, print_table, spread, write_results
from minigpt.core.machine import usable_cores

# Layers (width is 64 times that), tokens a step and rank.
SHAPES = {"13.8M": (6, 4096), "54M": (10, 2048)}
VOCABULARY, SEQUENCE = 8192, 256
HEADER = (
    *("parameters, ranks", "step s", "at once: stall", "share"),
    *("background: stall", "share", "drag s", "write s"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4, help="saves of each kind")
    parser.add_argument("--steps", type=int, default=3, help="plain steps before each save")
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--ranks", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--directory", type=Path, default=None, help="where to save")
    options = parser.parse_args()
    described = environment()
    print_environment(described)
    runs: list[dict[str, Any]] = []
    rows = []
    for shape in options.shapes:
        for ranks in options.ranks:
            found = _measure(shape, ranks, options.rounds, options.steps, options.directory)
            runs.append(found)
            rows.append(_row(found))
    print()
    print_table(HEADER, rows)
    write_results("checkpoint", {"environment": described, "runs": runs})


def _row(found: dict[str, Any]) -> list[str]:
    step = statistics.median(found["plain"])

    def share(values: list[float]) -> str:
        return f"{100 * statistics.median(values) / step:.1f} %"

    return [
        f"{found['parameters'] / 1e6:.1f}M, {found['ranks']}",
        spread(found["plain"]),
        spread(found["at_once"]),
        share(found["at_once"]),
        spread(found["background"]),
        share(found["background"]),
        spread(found["drag"]),
        spread(found["write"]),
    ]


def _measure(
    shape: str, ranks: int, rounds: int, steps: int, directory: Path | None
) -> dict[str, Any]:
    """Run the ranks in processes of their own; return what rank 0 measured."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        ours, theirs = context.Pipe()
        processes = [
            context.Process(
                target=_rank, args=(theirs, rank, ranks, shape, rounds, steps, scratch), daemon=True
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        theirs.close()
        try:
            found: dict[str, Any] = ours.recv()
        finally:
            for process in processes:
                process.join(60)
                process.kill()
    return found


def _rank(
    pipe: Any, rank: int, ranks: int, shape: str, rounds: int, steps: int, scratch: str
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(max(1, usable_cores() // ranks))
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=ranks
        )
    found = _train(rank, ranks, shape, rounds, steps, f"{scratch}/checkpoints")
    if rank == 0:
        pipe.send(found)
    if ranks > 1:
        dist.destroy_process_group()


def _train(
    rank: int, ranks: int, shape: str, rounds: int, steps: int, directory: str
) -> dict[str, Any]:
    from minigpt.train.checkpoint import CheckpointStore, TrainState

    model, optimizer, step, parameters = _build(rank, ranks, shape)
    store = CheckpointStore(directory, keep=1)
    found: dict[str, Any] = {"parameters": parameters, "ranks": ranks}
    found |= {"plain": [], "at_once": [], "background": [], "drag": [], "write": []}

    def contents() -> dict[str, Any]:
        return {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "parents": [],
        }

    step(), step()  # the optimizer's state, the caches
    store.save_async(TrainState(step=0), **contents()).result()  # the buffers
    for number in range(1, rounds + 1):
        found["plain"] += [step() for _ in range(steps)]
        begin = time.perf_counter()
        store.save(TrainState(step=2 * number), **contents())
        found["at_once"].append(time.perf_counter() - begin)
        found["plain"] += [step() for _ in range(steps)]
        begin = time.perf_counter()
        pending = store.save_async(TrainState(step=2 * number + 1), **contents())
        found["background"].append(time.perf_counter() - begin)
        during = []
        while not _all_done(pending.done, ranks):
            during.append(step())
        pending.result()
        plain = statistics.median(found["plain"])
        found["drag"].append(sum(during) - len(during) * plain)
        found["write"].append(store.save_seconds[-1])
    store.close()
    return found


def _all_done(done: bool, ranks: int) -> bool:
    """Agree on whether the save is over, so that all ranks take the same steps."""
    import torch
    import torch.distributed as dist

    if ranks == 1:
        return done
    flag = torch.tensor(int(done))
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)


def _build(rank: int, ranks: int, shape: str) -> tuple[Any, Any, Callable[[], float], int]:
    import torch
    from torch import Tensor, nn
    from torch.distributed.fsdp import fully_shard
    from torch.nn import functional as F

    from minigpt.model.attention import CausalAttention
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.train.config import OptimizerConfig
    from minigpt.train.optimizer import Optimizer

    layers, tokens = SHAPES[shape]
    width = 64 * layers
    config = ModelConfig(
        vocab_size=VOCABULARY,
        num_layers=layers,
        hidden_size=width,
        num_heads=layers,
        num_kv_heads=layers,
        head_dim=64,
        intermediate_size=width * 8 // 3 // 64 * 64,
        context_length=SEQUENCE,
        tie_embeddings=True,
    )

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder(config)
            self.decoder.init_weights(torch.Generator().manual_seed(0))

        def forward(self, batch: Tensor, positions: Tensor) -> Tensor:
            hidden = self.decoder(batch, positions, CausalAttention())
            logits = self.decoder.logits(hidden[:, :-1]).flatten(0, 1)
            return F.cross_entropy(logits.float(), batch[:, 1:].flatten())

    model = Loss()
    if ranks > 1:
        for layer in model.decoder.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", lr=1e-4, muon_lr=1e-4))
    batch = torch.randint(
        VOCABULARY, (tokens // SEQUENCE, SEQUENCE), generator=torch.Generator().manual_seed(rank)
    )
    positions = torch.arange(SEQUENCE).expand_as(batch)

    def step() -> float:
        begin = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, positions)
        loss.backward()
        optimizer.step(1.0)
        optimizer.zero_grad()
        return time.perf_counter() - begin

    return model, optimizer, step, config.parameter_counts().total


if __name__ == "__main__":
    main()

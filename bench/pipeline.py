"""Idle time of pipeline schedules: counted in torch's own orders, and steps timed at 2 stages.

`python -m bench.pipeline --ranks 4 --micro-batches 8 --draw`

The count plays a schedule through with a forward pass of one unit a rank, a backward pass of two
(split: one for the input, one for the weights) and messages that take no time. The timing runs two
real processes; on a machine of 2 cores it shows the cost of a schedule's machinery, not overlap.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

from bench.harness import environment, print_environment, print_table, write_results

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1), ("zero-bubble", 2))
NAMES = {"interleaved": "Interleaved1F1B", "zero-bubble": "InterleavedZeroBubble"}
ROWS, LENGTH = 2, 128
_LENGTHS = {"F": 1, "B": 2, "I": 1, "W": 1}


@dataclass(frozen=True)
class Slot:
    """One action of a rank, played through."""

    kind: str
    """F, B (both gradients), I (the input's) or W (the weights')."""
    stage: int
    micro_batch: int
    start: Fraction
    stop: Fraction


def play(schedule: str, ranks: int, micro_batches: int, virtual: int) -> list[list[Slot]]:
    """Return each rank's slots, every action starting as soon as rank and inputs are free."""
    orders = [list(order) for order in torch_orders(schedule, ranks, micro_batches, virtual)]
    last = ranks * virtual - 1
    done: dict[tuple[str, int, int], Fraction] = {}
    slots: list[list[Slot]] = [[] for _ in orders]

    def inputs(kind: str, stage: int, batch: int) -> list[tuple[str, int, int]]:
        if kind == "F":
            return [("F", stage - 1, batch)] if stage else []
        if kind == "W":
            return [("I", stage, batch)]
        return [("F", stage, batch), *([("I", stage + 1, batch)] if stage < last else [])]

    while any(len(row) < len(order) for row, order in zip(slots, orders, strict=True)):
        moved = False
        for row, order in zip(slots, orders, strict=True):
            while len(row) < len(order):
                kind, stage, batch = order[len(row)]
                needs = inputs(kind, stage, batch)
                if not all(need in done for need in needs):
                    break
                free = row[-1].stop if row else Fraction(0)
                start = max([free, *(done[need] for need in needs)])
                row.append(
                    Slot(kind, stage, batch, start, start + Fraction(_LENGTHS[kind], virtual))
                )
                # A whole backward pass gives the input's gradient too.
                done["I" if kind == "B" else kind, stage, batch] = row[-1].stop
                moved = True
        assert moved, "the schedule waits for itself"
    return slots


def torch_orders(
    schedule: str, ranks: int, micro_batches: int, virtual: int
) -> Iterator[Iterator[tuple[str, int, int]]]:
    """Yield each rank's (kind, stage, micro-batch) as torch's schedules run them."""
    if schedule == "1f1b":
        # As its step does: torch's own listing numbers the last rank's micro-batches from 1.
        for rank in range(ranks):
            warm = min(micro_batches, ranks - rank)
            order = [("F", rank, batch) for batch in range(warm)]
            for batch in range(micro_batches):
                order.append(("B", rank, batch))
                if warm + batch < micro_batches:
                    order.append(("F", rank, warm + batch))
            yield iter(order)
        return
    from torch.distributed.pipelining.schedules import get_schedule_class

    kind: Any = get_schedule_class(NAMES.get(schedule, schedule))
    stage = SimpleNamespace(num_stages=ranks * virtual, group_size=ranks, group_rank=0, submod=None)
    listed = kind([stage] * virtual if schedule in NAMES else stage, micro_batches).pipeline_order
    for rank in range(ranks):
        yield (
            (action.computation_type.value, action.stage_index, action.microbatch_index)
            for action in listed[rank]
            if action is not None and action.computation_type.value in _LENGTHS
        )


def bubble(slots: list[list[Slot]]) -> Fraction:
    """Return the idle share of the time that a rank works."""
    work = sum((slot.stop - slot.start for slot in slots[0]), Fraction(0))
    makespan = max(row[-1].stop for row in slots)
    return (makespan - work) / work


def draw(slots: list[list[Slot]], virtual: int) -> str:
    """Draw a line a rank: micro-batch numbers, forward plain, backward in brackets, idle dots."""
    lines = []
    for rank, row in enumerate(slots):
        cells: list[str] = []
        for slot in row:
            cells += [" . "] * (int(slot.start * virtual) - len(cells))
            mark = {"F": " {} ", "B": "[{}]", "I": "({})", "W": "{{{}}}"}[slot.kind]
            count = int((slot.stop - slot.start) * virtual)
            cells += [mark.format(slot.micro_batch % 10)] * count
        lines.append(f"rank {rank} {''.join(cells)}")
    return "\n".join(lines)


def count_all(ranks: int, micro_batches: int, *, drawn: bool) -> dict[str, Any]:
    """Print the table of idle shares; return it."""
    rows, found = [], {}
    for schedule, virtual in SCHEDULES:
        slots = play(schedule, ranks, micro_batches, virtual)
        share = bubble(slots)
        formula = "-"
        if schedule != "zero-bubble":
            formula = str(Fraction(ranks - 1, virtual * micro_batches))
        name = f"{schedule}, {virtual} a rank"
        rows.append([name, str(share), f"{float(share):.1%}", formula])
        found[name] = float(share)
        if drawn:
            print(f"\n{name}: F n, whole backward [n], input (n), weights {{n}}, idle .")
            print(draw(slots, virtual))
    print(f"\n{ranks} ranks, {micro_batches} micro-batches: idle time over work\n")
    print_table(("schedule", "counted", "", "(p - 1) / (v m)"), rows)
    return found


def time_all(micro_batches: int, steps: int) -> dict[str, Any]:
    """Print steps' times at 2 stages against one process, all on this machine; return them."""
    from minigpt.train.processes import Ranks

    rows, found = [], {}
    for schedule, virtual in (("one process", 1), *SCHEDULES):
        world = 1 if schedule == "one process" else 2
        with Ranks(world) as ranks:
            seconds, *_ = ranks.run(_time, world, schedule, virtual, micro_batches, steps)
        name = f"{schedule}, {virtual} a rank" if world > 1 else schedule
        found[name] = seconds
        median = statistics.median(seconds)
        rows.append([name, f"{1000 * median:.0f}", f"{1000 * min(seconds):.0f}"])
    print(f"\n2 stages, {micro_batches} micro-batches of {ROWS} x {LENGTH}, one thread a rank\n")
    print_table(("schedule", "median ms", "least ms"), rows)
    return found


def _time(world: int, schedule: str, virtual: int, micro_batches: int, steps: int) -> list[float]:
    """Return the seconds of each of a rank's steps, after one that warms up."""
    import torch

    from minigpt.data.loader import Batch
    from minigpt.model.config import ModelConfig
    from minigpt.model.decoder import Decoder
    from minigpt.train.config import MeshConfig
    from minigpt.train.mesh import Mesh
    from minigpt.train.parallelize import spread
    from minigpt.train.step import StepOptions, make_passes

    shape = dict.fromkeys(("num_heads", "num_kv_heads"), 4) | {"vocab_size": 1024, "head_dim": 64}
    sizes = {"hidden_size": 256, "intermediate_size": 704, "context_length": LENGTH}
    model = Decoder(ModelConfig.model_validate(shape | sizes | {"num_layers": 8}))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 1024, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(ROWS, LENGTH)
    batch = Batch(tokens, tokens, positions, torch.zeros_like(tokens, dtype=torch.int32))
    batches, valid = [batch] * micro_batches, micro_batches * tokens.numel()
    config: dict[str, Any] = {}
    if world > 1:
        config = {"pp": world, "schedule": schedule, "virtual_stages": virtual}
    laid = spread(model, Mesh(MeshConfig(**config)))
    passes = make_passes(laid, StepOptions(128, torch.float32))
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        passes.run(batches, valid, lambda: False)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="pipeline ranks to count (default 4)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default 8)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; 0 times none")
    parser.add_argument("--draw", action="store_true", help="draw each schedule")
    arguments = parser.parse_args()
    described = environment()
    print_environment(described)
    idle = count_all(arguments.ranks, arguments.micro_batches, drawn=arguments.draw)
    results: dict[str, Any] = {"ranks": arguments.ranks, "idle": idle}
    if arguments.steps:
        results["seconds"] = time_all(arguments.micro_batches, arguments.steps)
    results["micro_batches"] = arguments.micro_batches
    write_results("pipeline", {"environment": described, **results})


if __name__ == "__main__":
    main()

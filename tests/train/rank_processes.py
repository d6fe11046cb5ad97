"""Real processes over gloo for tests, forked from a server that has imported torch once."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# All that a rank would import, torch._dynamo and structlog not least, which come on demand.
PRELOAD = ["torch._dynamo", "torch.distributed.fsdp", "minigpt.train.run", "structlog", "pytest"]
SECONDS = 150  # of patience with a busy machine


def launch(worker: Callable[..., Any], world: int, **arguments: Any) -> list[Any]:
    """Run `worker(rank, world, **arguments)` in `world` processes with a gloo group.

    Returns what each returned, as JSON gives it back, in the order of the ranks; None for one
    that was killed. A worker that raises fails the test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as scratch:
        processes = [
            context.Process(target=_run, args=(worker, rank, world, scratch, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(SECONDS)
            assert all(p.exitcode is not None for p in processes), "a rank hangs"
        finally:
            for process in processes:
                process.kill()
                process.join()
        failures = list(Path(scratch).glob("*.error"))
        assert not failures, failures[0].read_text()
        results = (Path(scratch, f"{rank}.json") for rank in range(world))
        return [json.loads(r.read_text()) if r.exists() else None for r in results]


def _run(
    worker: Callable[..., Any], rank: int, world: int, scratch: str, arguments: dict[str, Any]
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{scratch}/meeting", rank=rank, world_size=world
        )
        result = worker(rank, world, **arguments)
        Path(scratch, f"{rank}.json").write_text(json.dumps(result))
        dist.destroy_process_group()
    except BaseException:
        Path(scratch, f"{rank}.error").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise

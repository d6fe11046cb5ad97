"""What the engine finds on its machine: free memory, and what an answer's last bits depend on."""

from __future__ import annotations

from importlib.metadata import version

import torch

from minigpt.core.machine import describe_machine
from minigpt.engine.config import EngineConfig


def free_memory(config: EngineConfig) -> int:
    """Return the bytes that are free for each rank: of its GPU, or its share of the machine's."""
    ranks = config.tensor_parallel_size
    if config.device == "cuda":
        return min(int(torch.cuda.mem_get_info(rank)[0]) for rank in range(ranks))
    return describe_machine().memory_available // ranks


def environment() -> dict[str, str]:
    """Return what the last bits of an answer depend on besides weights and configuration."""
    machine = describe_machine()
    return {
        "minigpt": version("minigpt"),
        "torch": str(torch.__version__),
        "processor": machine.processor,
        "instruction_sets": " ".join(machine.instruction_sets),
    }

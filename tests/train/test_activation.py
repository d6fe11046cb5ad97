from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.decoder import Decoder
from minigpt.train.config import MemoryConfig, OptimizerConfig
from minigpt.train.optimizer import Optimizer
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts linear maps and attention's products."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.linear = self.batched = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.linear += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        self.batched += func is torch.ops.aten.bmm.default
        return func(*args, **(kwargs or {}))


def _run(model: Decoder, memory: dict[str, Any]) -> tuple[list[Tensor], int, int]:
    model.zero_grad()
    optimizer = Optimizer(model, OptimizerConfig(lr=0.01, muon_lr=0.02))
    config = from_mapping(MemoryConfig, memory)
    step = TrainStep(model, optimizer, StepOptions(32, torch.float64, memory=config))
    with _Products() as count:
        step.accumulate([make_batch(model.config, 0)])
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return gradients, count.linear, count.batched


def test_recomputed_layers_give_the_same_bits(small_decoder: Decoder) -> None:
    kept, linear, batched = _run(small_decoder, {})
    layers = small_decoder.config.num_layers
    for memory, again, scores_again in (
        ({"checkpoint": "full"}, layers * 7, layers),
        ({"checkpoint": "selective"}, 0, layers),
        ({"checkpoint": "budget", "budget_mb": 1, "checkpoint_layers": 1}, 7, 1),
        ({"checkpoint": "budget", "budget_mb": 1, "checkpoint_layers": 0}, 0, 0),
    ):
        found, found_linear, found_batched = _run(small_decoder, memory)
        assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True)), memory
        # The last products of a layer need not be done again: nothing reads them.
        assert linear + again - layers <= found_linear <= linear + again, memory
        assert batched + scores_again <= found_batched <= batched + 2 * scores_again, memory


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"checkpoint": "budget"}, "needs memory.budget_mb"),
        ({"budget_mb": 5}, "are for memory.checkpoint = budget"),
        ({"checkpoint": "some"}, "memory|checkpoint"),
    ],
)
def test_contradictions_are_refused(memory: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(MemoryConfig, memory)

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt.core.artifact import open_artifact
from minigpt.core.clock import SystemClock
from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.checkpoint import Checkpoint, CheckpointStore
from minigpt.train.config import OptimizerConfig, TrainConfig
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.low_bit import check_state_bits
from minigpt.train.optimizer import Optimizer
from minigpt.train.run import read_final, train
from minigpt.train.step import StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch

Tensors = dict[str, torch.Tensor]

MODEL = ModelConfig(
    vocab_size=64,
    num_layers=1,
    hidden_size=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=64,
    context_length=16,
)


def test_it_is_refused_without_a_compiler_and_on_shards() -> None:
    bits = {"data": "d", "optimizer": {"state_bits": 8}}
    with pytest.raises(ConfigError, match=r"needs torch\.compile"):
        check_state_bits(from_mapping(TrainConfig, bits), has_compiler=False)
    with pytest.raises(ConfigError, match=r"state_bits = 8 with mesh\.fsdp = 2"):
        check_state_bits(from_mapping(TrainConfig, bits | {"mesh": {"fsdp": 2}}), True)
    check_state_bits(from_mapping(TrainConfig, bits | {"mesh": {"dp": 2}}), True)
    check_state_bits(from_mapping(TrainConfig, {"data": "d", "mesh": {"fsdp": 2}}), False)


def _train(
    bits: int, steps: range, state: tuple[Tensors, Tensors] | None
) -> tuple[list[float], Tensors, Tensors]:
    model = Decoder(MODEL)
    model.init_weights(torch.Generator().manual_seed(0))
    rates = {"kind": "adamw", "lr": 0.01, "muon_lr": 0.02, "state_bits": bits}
    optimizer = Optimizer(model, OptimizerConfig.model_validate(rates))
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    step = TrainStep(model, optimizer, StepOptions(16, torch.float32))
    losses = []
    for number in steps:
        result = step.run([make_batch(MODEL, number)], 1.0)
        assert result is not None
        losses.append(result.loss)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return losses, weights, {n: t.clone() for n, t in optimizer.state_dict().items()}


@pytest.mark.soak
def test_bytes_train_nearly_as_well_and_resume_bit_for_bit() -> None:
    exact, _, wide = _train(32, range(6), None)
    losses, weights, state = _train(8, range(6), None)
    assert losses == pytest.approx(exact, rel=0.02) and losses != exact
    codes = [name for name in state if name.endswith(".codes")]
    assert codes and all(state[name].dtype == torch.uint8 for name in codes)
    assert all(type(tensor) is torch.Tensor for tensor in state.values())
    stored, before = (sum(t.numel() * t.itemsize for t in s.values()) for s in (state, wide))
    assert stored < 0.35 * before
    first, half, middle = _train(8, range(3), None)
    second, end, _ = _train(8, range(3, 6), (half, middle))
    assert first + second == losses
    assert all(torch.equal(end[name], weights[name]) for name in weights)


class _StopAfter(SystemClock):
    """Asks for a stop, as a preemption does, when a run has logged some steps."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        self._file, self._steps = run_dir / "metrics.jsonl", steps
        self._sent = False

    def monotonic(self) -> float:
        found = self._file.read_text().count("\n") if self._file.exists() else 0
        if found >= self._steps and not self._sent:
            self._sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().monotonic()


def _latest(run_dir: Path) -> Checkpoint:
    found = CheckpointStore(run_dir / "checkpoints", keep=2).load_latest()
    assert found is not None
    return found


@pytest.mark.soak
def test_a_run_with_bytes_goes_through_a_checkpoint_bit_for_bit(
    make_config: Callable[..., TrainConfig], tiny_dataset: Path, tmp_path: Path
) -> None:
    bytes_of_adamw = {"kind": "adamw", "state_bits": 8}
    config = make_config(steps=6, optimizer=bytes_of_adamw, model={"hidden_size": 64})
    dataset = open_artifact(tiny_dataset)
    train(config, dataset, tmp_path / "whole")
    with pytest.raises(TrainingInterruptedError):
        train(config, dataset, tmp_path / "run", clock=_StopAfter(tmp_path / "run", 3))
    saved = _latest(tmp_path / "run").optimizer
    codes = {name: tensor for name, tensor in saved.items() if name.endswith(".codes")}
    assert codes and all(tensor.dtype == torch.uint8 for tensor in codes.values())
    train(config, dataset, tmp_path / "run")
    whole, resumed = (read_final(tmp_path / name) for name in ("whole", "run"))
    assert resumed["weights_sha256"] == whole["weights_sha256"]
    expected, found = (_latest(tmp_path / name).optimizer for name in ("whole", "run"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.runs import dying_clock
from torch import nn

from minigpt.core.artifact import open_artifact
from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError
from minigpt.model.decoder import Decoder
from minigpt.train import build, precision
from minigpt.train.config import OptimizerConfig, TrainConfig
from minigpt.train.optimizer import Optimizer
from minigpt.train.precision import LossScale, check_offload, check_precision, product_dtype
from minigpt.train.run import read_final, train
from minigpt.train.step import NonFiniteError, StepOptions, TrainStep
from minigpt.train.verify_parallel import make_batch


def test_precisions_without_hardware_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"float16 on a CPU.*100 times slower"):
        check_precision("float16", "cpu")
    with pytest.raises(ConfigError, match=r"float8 needs an NVIDIA GPU.*Hopper"):
        check_precision("float8", "cpu")
    check_precision("bfloat16", "cpu")
    check_precision("float16", "cuda")
    assert product_dtype("float8") == torch.bfloat16
    assert product_dtype("float16") == torch.float16


def test_offload_to_the_cpu_is_refused_on_the_cpu_and_without_shards() -> None:
    for name in ("offload_activations", "offload_optimizer"):
        config = from_mapping(TrainConfig, {"data": "d", "memory": {name: True}})
        with pytest.raises(ConfigError, match=f"{name} = true on a CPU is meaningless"):
            check_offload(config, "cpu")
    with pytest.raises(ConfigError, match=r"needs mesh\.fsdp > 1"):
        check_offload(config, "cuda")
    sharded = {"data": "d", "memory": {"offload_optimizer": True}, "mesh": {"fsdp": 2}}
    check_offload(from_mapping(TrainConfig, sharded), "cuda")


@given(st.lists(st.booleans(), max_size=60))
def test_the_scale_stays_a_power_of_two_and_resumes(finite: list[bool]) -> None:
    scale, resumed = LossScale(), LossScale()
    for ok in finite:
        resumed.load_state(scale.state())
        for one in (scale, resumed):
            one.succeeded() if ok else one.lower()
        assert math.frexp(scale.scale)[0] == 0.5
        assert resumed.state() == scale.state()


def test_the_scale_grows_after_long_without_overflow_and_has_bounds() -> None:
    scale = LossScale(4.0)
    for _ in range(2000):
        scale.succeeded()
    assert scale.scale == 8.0
    assert [scale.lower() for _ in range(40)].count(True) < 40
    assert not scale.lower() and scale.scale > 0


def test_unscaling_is_exact() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([1.5, -3.0, 1e-3]) * 2**16
    LossScale().unscale([parameter])
    assert torch.equal(parameter.grad, torch.tensor([1.5, -3.0, 1e-3]))


def _float16_step(model: Decoder) -> TrainStep:
    optimizer = Optimizer(model, OptimizerConfig(kind="adamw", lr=0.01, muon_lr=0.02))
    return TrainStep(model, optimizer, StepOptions(16, torch.float16, clip_norm=1.0))


def test_an_overflow_lowers_the_scale_and_does_the_step_again(small_decoder: Decoder) -> None:
    model = small_decoder.float()
    exact = TrainStep(
        model,
        Optimizer(model, OptimizerConfig(kind="adamw", lr=0.01, muon_lr=0.02)),
        StepOptions(16, torch.float32),
    )
    batch = make_batch(model.config, 0)
    loss = exact.accumulate([batch])
    norm = exact.clip_gradients()
    model.zero_grad()
    step = _float16_step(model)
    assert step.loss_scale is not None
    step.loss_scale.scale = 2.0**24
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = step.run([batch], 1.0)
    assert result is not None
    assert step.loss_scale.scale < 2.0**24
    assert result.loss == pytest.approx(loss, rel=0.01)
    assert result.grad_norm == pytest.approx(norm, rel=0.05)
    assert any(not torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_nan_that_no_scale_mends_is_reported(small_decoder: Decoder) -> None:
    model = small_decoder.float()
    with torch.no_grad():
        model.output_weight[7, 3] = float("nan")
    with pytest.raises(NonFiniteError):
        _float16_step(model).run([make_batch(model.config, 0)], 1.0)


def test_a_float16_run_resumes_to_the_bit_with_its_loss_scale(
    make_config: Callable[..., TrainConfig],
    tiny_dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Refused on a CPU for its speed alone, which is enough here.
    monkeypatch.setattr(build, "check_precision", lambda precision, device: None)
    monkeypatch.setattr(precision, "_GROW_AFTER", 3)  # so that the scale moves by what it counts
    config = make_config(
        precision="float16",
        steps=5,
        batch={"sequence_length": 32, "tokens_per_step": 64, "micro_batch_size": 1},
        checkpoint={"every": 2},
    )
    dataset = open_artifact(tiny_dataset)
    train(config, dataset, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, dataset, tmp_path / "broken", clock=dying_clock(tmp_path / "broken", 3))
    saved = tmp_path / "broken/checkpoints/step-00000002/state.json"
    assert json.loads(saved.read_bytes())["state"]["loss_scale"] == {"scale": 2.0**16, "steps": 2}
    train(config, dataset, tmp_path / "broken")
    finals = [read_final(tmp_path / name) for name in ("whole", "broken")]
    for key in ("losses", "weights_sha256"):
        assert finals[0][key] == finals[1][key]
    last = "checkpoints/step-00000005/state.json"
    scales = [
        json.loads((tmp_path / name / last).read_bytes())["state"]["loss_scale"]
        for name in ("whole", "broken")
    ]
    # Forgotten, it would have grown in the last step.
    assert scales == [{"scale": 2.0**17, "steps": 2}] * 2

"""Whole runs: what they leave, what they refuse, and what changes no bit of them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.train.runs import exact_result, logged_steps, signal_when

from minigpt.core.artifact import Artifact, lineage
from minigpt.core.config import from_mapping
from minigpt.core.errors import ConfigError, TrainingError
from minigpt.data.shards import TokenDataset
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.weights import load_model, save_model
from minigpt.train.account import account_for
from minigpt.train.config import TrainConfig
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.metrics import read_metrics
from minigpt.train.run import find_finished, read_final, stored_config, train
from minigpt.train.validation import Validator

ConfigFactory = Callable[..., TrainConfig]


def test_a_run_leaves_what_it_promises(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    model = train(make_config(), dataset, tmp_path / "run")
    assert model.path == tmp_path / "run" / "model"
    final = read_final(tmp_path / "run")
    assert final["steps"] == 12 and final["tokens"] == 12 * 512
    assert final["losses"]["last"] < final["losses"]["first"]
    result = exact_result(tmp_path / "run")
    assert result["steps_logged"] == list(range(1, 13))
    assert [step for step, _ in result["bpb"]] == [4, 8, 12]
    lines = list(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert all(float.fromhex(x["loss_hex"]) == x["loss"] for x in lines)
    kinds = {parent.kind for parent in model.manifest.parents}
    assert kinds == {"dataset", "checkpoint"}
    assert all(node.artifact is not None for node in lineage(model).ancestors)
    loaded = load_model(model.path)
    validator = Validator(
        TokenDataset.open(dataset.path, "val"),
        Tokenizer.load(loaded.path),
        make_config().validation,
        context_length=64,
        dtype="float32",
        seed=0,
    )
    score = validator.score(loaded.model)
    assert score is not None
    assert score.bits_per_byte == pytest.approx(final["bits_per_byte"], rel=1e-5)


def test_a_finished_run_is_not_run_again(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config = make_config(steps=3)
    assert find_finished(config, tmp_path / "run") is None
    first = train(config, dataset, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns
    assert train(config, dataset, tmp_path / "run").id == first.id
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_mtime_ns == before


def test_a_run_killed_between_model_and_result_is_only_finished(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config, run = make_config(steps=3), tmp_path / "run"
    model = train(config, dataset, run)
    final = (run / "final.json").read_bytes()
    (run / "final.json").unlink()
    assert train(config, dataset, run).id == model.id
    assert (run / "final.json").read_bytes() == final


def test_validation_changes_no_loss(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    train(make_config(), dataset, tmp_path / "with")
    rare = make_config(validation={"every": 0, "sample_tokens": 0}, checkpoint={"every": 0})
    train(rare, dataset, tmp_path / "without")
    assert exact_result(tmp_path / "with")["hex"] == exact_result(tmp_path / "without")["hex"]


def test_another_config_is_refused_by_key(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    train(make_config(steps=2), dataset, tmp_path / "run")
    other = make_config(steps=3, optimizer={"lr": 0.5})
    with pytest.raises(ConfigError, match=r"steps \(2 in the run, 3 asked for\)") as caught:
        train(other, dataset, tmp_path / "run")
    assert "optimizer.lr" in str(caught.value) and "--run-dir" in str(caught.value)
    assert read_final(tmp_path / "run")["steps"] == 2


def test_the_resolved_config_resumes_too(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    first = train(make_config(steps=2), dataset, tmp_path / "run")
    resolved = stored_config(tmp_path / "run")
    assert resolved is not None and isinstance(resolved.optimizer.lr, float)
    assert train(resolved, dataset, tmp_path / "run").id == first.id


def test_two_processes_cannot_share_a_run(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    holder = os.open(run, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(TrainingError, match="another process"):
            train(make_config(), dataset, run)
    finally:
        os.close(holder)


def test_the_time_of_a_run_adds_up_through_a_stop(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config()
    with pytest.raises(TrainingInterruptedError):
        clock = signal_when(lambda: logged_steps(run) >= 6, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    train(config, dataset, run)
    account = account_for(run, price_per_device_hour=1.0)
    assert account["sessions"] == 2 and account["failures"] == 0
    assert abs(account["unaccounted"]) < 0.01
    assert account["seconds"]["lost_work"] == 0 and account["seconds"]["compute"] > 0
    assert account["cost"]["per_million_tokens"] > 0


def test_a_run_can_start_from_given_weights(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path, tiny_model: Path
) -> None:
    config = make_config(
        initialize_from=str(tiny_model), model={}, steps=3, optimizer={"lr": 1e-6, "muon_lr": 1e-6}
    )
    model = train(config, dataset, tmp_path / "run")
    start, end = load_model(tiny_model), load_model(model.path)
    assert end.config.num_kv_heads == start.config.num_kv_heads == 2
    assert torch.allclose(start.model.output_weight, end.model.output_weight, atol=1e-4)
    assert start.id in [parent.id for parent in model.manifest.parents]
    assert train(config, dataset, tmp_path / "run").id == model.id


def test_a_tokenizer_that_does_not_fit_the_weights_is_refused(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path, tiny_model: Path
) -> None:
    loaded = load_model(tiny_model)
    small = loaded.config.replace(vocab_size=200)
    state = {
        name: tensor[:200] if tensor.shape[0] == 257 else tensor
        for name, tensor in loaded.model.state_dict().items()
    }
    save_model(tmp_path / "small", state, small)
    config = make_config(initialize_from=str(tmp_path / "small"), model={})
    with pytest.raises(Exception, match="257 tokens") as caught:
        train(config, dataset, tmp_path / "run")
    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "run").exists()


def test_minutes_become_steps_and_measuring_leaves_no_trace(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    timed = make_config(steps="auto", minutes=0.02)
    train(timed, dataset, tmp_path / "timed")
    stored = stored_config(tmp_path / "timed")
    assert stored is not None and isinstance(stored.steps, int) and stored.minutes == 0.02
    tree = stored.model_dump() | {"minutes": None}
    train(from_mapping(TrainConfig, tree), dataset, tmp_path / "counted")
    assert exact_result(tmp_path / "timed") == exact_result(tmp_path / "counted")


def test_the_thread_count_is_the_runs_own(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config(threads="auto")
    with pytest.raises(TrainingInterruptedError):
        clock = signal_when(lambda: logged_steps(run) >= 2, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    stored = stored_config(run)
    assert stored is not None
    torch.set_num_threads(3)
    train(config, dataset, run)
    assert torch.get_num_threads() == stored.threads
    assert json.loads((run / "final.json").read_text())["steps"] == 12

"""Whole runs: started, stopped in every way, resumed, and the same to the last bit."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.core.artifact import Artifact, create_artifact, lineage, open_artifact
from minigpt.core.clock import SystemClock
from minigpt.core.config import from_mapping
from minigpt.core.errors import ArtifactError, ConfigError, StorageError, TrainingError
from minigpt.data.shards import TokenDataset
from minigpt.data.skip_list import SKIP_FILE, SkipList
from minigpt.data.tokenizer import Tokenizer
from minigpt.model.weights import load_model, save_model
from minigpt.train.account import account_for
from minigpt.train.checkpoint import CheckpointStore
from minigpt.train.config import TrainConfig
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.metrics import read_metrics
from minigpt.train.run import find_finished, read_final, stored_config, train
from minigpt.train.validation import Validator

ConfigFactory = Callable[..., TrainConfig]
EXACT = ("steps", "tokens", "loss_hex", "losses", "validation", "best_step", "weights_sha256")


class WatchingClock(SystemClock):
    """Runs an action at every reading: several times a step, in the middle of real work."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def monotonic(self) -> float:
        self._action()
        return super().monotonic()


@pytest.fixture
def dataset(tiny_dataset: Path) -> Artifact:
    return open_artifact(tiny_dataset, kind="dataset")


@pytest.fixture
def unlimited_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def _result(run_dir: Path) -> dict[str, Any]:
    final = read_final(run_dir)
    lines = list(read_metrics(run_dir / "metrics.jsonl"))
    exact = {key: final[key] for key in EXACT}
    exact["steps_logged"] = [line["step"] for line in lines]
    exact["hex"] = [line["loss_hex"] for line in lines]
    exact["norms"] = [line["grad_norm"] for line in lines]
    events = read_metrics(run_dir / "events.jsonl")
    exact["bpb"] = [
        (line["step"], line["bits_per_byte"]) for line in events if line["kind"] == "validation"
    ]
    return exact


def _events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run_dir / "events.jsonl") if line["kind"] == kind]


def _signal_when(condition: Callable[[], bool], signum: int) -> WatchingClock:
    sent: list[int] = []

    def action() -> None:
        if not sent and condition():
            sent.append(signum)
            os.kill(os.getpid(), signum)

    return WatchingClock(action)


def _has_checkpoint(run: Path, step: int) -> bool:
    """Tell whether a save is done, which in the background may take longer than some steps."""
    return (run / "checkpoints" / f"step-{step:08d}").exists()


def _logged_steps(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


def test_a_run_leaves_what_it_promises(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    model = train(make_config(), dataset, tmp_path / "run")
    assert model.path == tmp_path / "run" / "model"
    final = read_final(tmp_path / "run")
    assert final["steps"] == 12 and final["tokens"] == 12 * 512
    assert final["losses"]["last"] < final["losses"]["first"]
    result = _result(tmp_path / "run")
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


@pytest.mark.parametrize(
    ("signum", "code", "after", "precision"),
    [(signal.SIGTERM, 143, 6, "float32"), (signal.SIGINT, 130, 8, "bfloat16")],
)
def test_signals_save_and_the_resumed_run_is_the_same(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    signum: int,
    code: int,
    after: int,
    precision: str,
) -> None:
    config = make_config(precision=precision)
    train(config, dataset, tmp_path / "whole")
    run = tmp_path / "stopped"
    for goal in (after, after + 1):
        clock = _signal_when(lambda goal=goal: _logged_steps(run) >= goal, signum)  # type: ignore[misc]
        with pytest.raises(TrainingInterruptedError) as caught:
            train(config, dataset, run, clock=clock)
        assert caught.value.exit_code == code
        assert CheckpointStore(run / "checkpoints", keep=2).steps()[-1] == goal
    train(config, dataset, run)
    assert _result(run) == _result(tmp_path / "whole")


def test_a_validation_is_logged_once_though_its_step_was_resumed_twice(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config, run = make_config(), tmp_path / "run"
    train(config, dataset, tmp_path / "whole")
    readings: list[None] = []

    def at_the_end_of_step_8() -> bool:
        if _logged_steps(run) == 7:
            readings.append(None)
        return len(readings) == 2

    with pytest.raises(TrainingInterruptedError):  # saved at step 8, before its validation
        clock = _signal_when(at_the_end_of_step_8, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    assert '"validation", "step": 8' not in (run / "events.jsonl").read_text()

    def abort() -> None:
        if _logged_steps(run) >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # validated, and dead before the next save
        train(config, dataset, run, clock=WatchingClock(abort))
    train(config, dataset, run)
    assert _result(run) == _result(tmp_path / "whole")


def test_validation_changes_no_loss(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    train(make_config(), dataset, tmp_path / "with")
    rare = make_config(validation={"every": 0, "sample_tokens": 0}, checkpoint={"every": 0})
    train(rare, dataset, tmp_path / "without")
    assert _result(tmp_path / "with")["hex"] == _result(tmp_path / "without")["hex"]


def test_a_corrupt_checkpoint_costs_only_the_steps_since_the_one_before(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = make_config()
    train(config, dataset, tmp_path / "whole")
    run = tmp_path / "run"
    with pytest.raises(TrainingInterruptedError):
        clock = _signal_when(lambda: _logged_steps(run) >= 10, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    damaged = run / "checkpoints" / "step-00000010" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    train(config, dataset, run)
    captured = capfd.readouterr()
    assert str(damaged) in captured.out + captured.err
    assert _result(run) == _result(tmp_path / "whole")


@pytest.mark.usefixtures("unlimited_files")
@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_saves_but_not_the_run(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    background: bool,
) -> None:
    config = make_config(steps=16, checkpoint={"every": 4, "background": background})
    train(config, dataset, tmp_path / "whole")
    run = tmp_path / "run"

    def fill_and_free() -> None:
        full = _has_checkpoint(run, 4) and 5 <= _logged_steps(run) < 12
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if full else -1, -1))

    train(config, dataset, run, clock=WatchingClock(fill_and_free))
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("checkpoint not saved") == 1
    assert not list((run / "checkpoints").glob(".*"))
    assert _result(run) == _result(tmp_path / "whole")


@pytest.mark.usefixtures("unlimited_files")
def test_a_full_disk_at_the_end_is_an_error_and_the_last_good_checkpoint_stays(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config = make_config()
    run = tmp_path / "run"

    def fill() -> None:
        full = _has_checkpoint(run, 4) and _logged_steps(run) >= 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if full else -1, -1))

    with pytest.raises(StorageError) as caught:
        train(config, dataset, run, clock=WatchingClock(fill))
    assert caught.value.exit_code == 2
    assert CheckpointStore(run / "checkpoints", keep=2).steps() == [4]
    assert not (run / "final.json").exists()
    assert not (run / "model").exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    train(config, dataset, run)
    assert _result(run)["steps_logged"] == list(range(1, 13))


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


def test_another_dataset_is_refused(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(TrainingInterruptedError):
        clock = _signal_when(lambda: _logged_steps(run) >= 2, signal.SIGTERM)
        train(make_config(), dataset, run, clock=clock)
    with create_artifact(tmp_path / "other", kind="dataset") as draft:
        for file in dataset.path.rglob("*"):
            if file.is_file() and file.name != "manifest.json":
                target = draft.path / file.relative_to(dataset.path)
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(file.read_bytes())
        (draft.path / "more").write_text("x")
    assert draft.artifact is not None
    with pytest.raises(ArtifactError, match="not the dataset"):
        train(make_config(), draft.artifact, run)


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


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config(recovery={"on_anomaly": "stop"})
    with pytest.raises(TrainingInterruptedError):
        clock = _signal_when(lambda: _logged_steps(run) >= 6, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    store = CheckpointStore(run / "checkpoints", keep=2)
    found = store.load_latest()
    assert found is not None
    found.model["model.norm.weight"][0] = float("inf")
    store.path(6).rename(tmp_path / "before")
    store.save(found.state, model=found.model, optimizer=found.optimizer, parents=[dataset])
    with pytest.raises(TrainingError, match=r"step 7: loss is nan.*next_sample.*48"):
        train(config, dataset, run)
    assert store.steps() == [4, 6]
    assert _logged_steps(run) == 6


def test_a_fault_in_a_gradient_that_passes_leaves_no_trace(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train(make_config(), dataset, tmp_path / "whole")
    monkeypatch.setenv("MINIGPT_FAULTS", "nan:step=5,phase=reduce")
    train(make_config(), dataset, tmp_path / "run")
    assert _result(tmp_path / "run") == _result(tmp_path / "whole")
    assert [line["action"] for line in _events(tmp_path / "run", "anomaly")] == ["retry"]


def test_a_fault_that_stays_is_skipped_then_its_data_is_never_used_again(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = tmp_path / "run", make_config(recovery={"max_skips": 1})
    # Steps 6 and 7: each computed twice; the last of the four is one too many to skip.
    monkeypatch.setenv("MINIGPT_FAULTS", "nan:step=5,phase=reduce,times=4")
    train(config, dataset, run)
    assert [x["action"] for x in _events(run, "anomaly")] == ["retry", "skip", "retry", "roll back"]
    rollback = _events(run, "rollback")[0]
    assert (rollback["step"], rollback["to"]) == (7, 4)
    skips = SkipList.read(run / SKIP_FILE).samples
    assert [(skip.first, skip.count) for skip in skips] == [(5 * 8, 2 * 8)]
    assert open_artifact(run / "model").manifest.metrics["skipped_samples"] == 16
    result = _result(run)
    assert result["steps_logged"] == list(range(1, 13)) and "nan" not in result["hex"]
    monkeypatch.delenv("MINIGPT_FAULTS")
    train(make_config(), dataset, tmp_path / "whole")
    whole = _result(tmp_path / "whole")
    assert result["hex"][:5] == whole["hex"][:5] and result["hex"][5] != whole["hex"][5]
    # A run that had the record from the beginning is the same, through a kill as well.
    again = tmp_path / "again"
    again.mkdir()
    (again / SKIP_FILE).write_bytes((run / SKIP_FILE).read_bytes())
    with pytest.raises(TrainingInterruptedError):
        clock = _signal_when(lambda: _logged_steps(again) >= 6, signal.SIGTERM)
        train(config, dataset, again, clock=clock)
    train(config, dataset, again)
    assert _result(again)["hex"] == result["hex"]


def test_a_skipped_step_is_skipped_again_after_a_resume_and_anomalies_have_a_limit(
    make_config: ConfigFactory,
    dataset: Artifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, config = tmp_path / "run", make_config(recovery={"max_skips": 2, "max_rollbacks": 1})
    monkeypatch.setenv("MINIGPT_FAULTS", "nan:step=5,phase=reduce,times=1000")
    with pytest.raises(TrainingError, match=r"step 8 after 1 rollbacks.*gradient's norm is nan"):
        train(config, dataset, run)
    lines = list(read_metrics(run / "metrics.jsonl"))
    assert [line["step"] for line in lines if line.get("skipped")] == [6, 7]
    assert CheckpointStore(run / "checkpoints", keep=2).steps() == [4]
    for mark in (run / "ranks" / "struck").iterdir():  # so that it strikes once more
        mark.unlink()
    with pytest.raises(TrainingError, match="after 1 rollbacks"):  # the limit is the run's
        train(config, dataset, run)


def test_a_save_longer_than_the_grace_is_refused(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config = make_config(recovery={"grace_seconds": 1e-4})
    with pytest.raises(ConfigError, match=r"a save takes .* longer than recovery.grace_seconds"):
        train(config, dataset, tmp_path / "run")
    assert _logged_steps(tmp_path / "run") == 1
    train(make_config(recovery={"grace_seconds": 60}), dataset, tmp_path / "run")
    train(make_config(), dataset, tmp_path / "whole")
    assert _result(tmp_path / "run") == _result(tmp_path / "whole")


def test_saves_follow_the_measured_interval_and_change_nothing(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    adaptive = make_config(
        recovery={"adapt_interval": True, "grace_seconds": 60}, checkpoint={"every": 0}
    )
    # After the first save its time is known, and with so little exposure the bound is low.
    train(adaptive, dataset, tmp_path / "run")
    train(make_config(), dataset, tmp_path / "whole")
    assert _result(tmp_path / "run")["hex"] == _result(tmp_path / "whole")["hex"]
    saved = [line["step"] for line in _events(tmp_path / "run", "checkpoint")]
    assert saved[0] == 1 and saved[-1] == 12


def test_the_time_of_a_run_adds_up_through_a_stop(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config()
    with pytest.raises(TrainingInterruptedError):
        clock = _signal_when(lambda: _logged_steps(run) >= 6, signal.SIGTERM)
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
    assert _result(tmp_path / "timed") == _result(tmp_path / "counted")


def test_the_thread_count_is_the_runs_own(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    run, config = tmp_path / "run", make_config(threads="auto")
    with pytest.raises(TrainingInterruptedError):
        clock = _signal_when(lambda: _logged_steps(run) >= 2, signal.SIGTERM)
        train(config, dataset, run, clock=clock)
    stored = stored_config(run)
    assert stored is not None
    torch.set_num_threads(3)
    train(config, dataset, run)
    assert torch.get_num_threads() == stored.threads
    assert json.loads((run / "final.json").read_text())["steps"] == 12

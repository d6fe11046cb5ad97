"""Whole runs whose saves fail, take too long, or come by the clock: their bits do not change."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.train.runs import WatchingClock, events_of, exact_result, has_checkpoint, logged_steps

from minigpt.core.artifact import Artifact
from minigpt.core.errors import ConfigError, StorageError
from minigpt.train.checkpoint import CheckpointStore
from minigpt.train.config import TrainConfig
from minigpt.train.run import train

ConfigFactory = Callable[..., TrainConfig]


@pytest.fixture
def unlimited_files() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


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
        full = has_checkpoint(run, 4) and 5 <= logged_steps(run) < 12
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if full else -1, -1))

    train(config, dataset, run, clock=WatchingClock(fill_and_free))
    captured = capfd.readouterr()
    assert (captured.out + captured.err).count("checkpoint not saved") == 1
    assert not list((run / "checkpoints").glob(".*"))
    assert exact_result(run) == exact_result(tmp_path / "whole")


@pytest.mark.usefixtures("unlimited_files")
def test_a_full_disk_at_the_end_is_an_error_and_the_last_good_checkpoint_stays(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config = make_config()
    run = tmp_path / "run"

    def fill() -> None:
        full = has_checkpoint(run, 4) and logged_steps(run) >= 5
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000 if full else -1, -1))

    with pytest.raises(StorageError) as caught:
        train(config, dataset, run, clock=WatchingClock(fill))
    assert caught.value.exit_code == 2
    assert CheckpointStore(run / "checkpoints", keep=2).steps() == [4]
    assert not (run / "final.json").exists()
    assert not (run / "model").exists()
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    train(config, dataset, run)
    assert exact_result(run)["steps_logged"] == list(range(1, 13))


def test_a_save_longer_than_the_grace_is_refused(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    config = make_config(recovery={"grace_seconds": 1e-4})
    with pytest.raises(ConfigError, match=r"a save takes .* longer than recovery.grace_seconds"):
        train(config, dataset, tmp_path / "run")
    assert logged_steps(tmp_path / "run") == 1
    train(make_config(recovery={"grace_seconds": 60}), dataset, tmp_path / "run")
    train(make_config(), dataset, tmp_path / "whole")
    assert exact_result(tmp_path / "run") == exact_result(tmp_path / "whole")


def test_saves_follow_the_measured_interval_and_change_nothing(
    make_config: ConfigFactory, dataset: Artifact, tmp_path: Path
) -> None:
    adaptive = make_config(
        recovery={"adapt_interval": True, "grace_seconds": 60}, checkpoint={"every": 0}
    )
    # After the first save its time is known, and with so little exposure the bound is low.
    train(adaptive, dataset, tmp_path / "run")
    train(make_config(), dataset, tmp_path / "whole")
    assert exact_result(tmp_path / "run")["hex"] == exact_result(tmp_path / "whole")["hex"]
    saved = [line["step"] for line in events_of(tmp_path / "run", "checkpoint")]
    assert saved[0] == 1 and saved[-1] == 12

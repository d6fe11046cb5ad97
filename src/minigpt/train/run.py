"""A training run in a directory: started, resumed or already finished.

The directory holds `config.yaml` (fully resolved), `metrics.jsonl` (a line a step), `events.jsonl`
(validations and saves), `checkpoints/`, and at the end `model/` and `final.json`. Its config never
changes: what was derived or measured at the start, the number of threads included, holds for
every resume.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minigpt.core.artifact import Artifact
from minigpt.core.clock import Clock, SystemClock
from minigpt.core.config import load_config, resolved_values, to_yaml
from minigpt.core.errors import ConfigError, TrainingError
from minigpt.core.storage import storage_errors, write_atomic
from minigpt.core.telemetry import get_logger
from minigpt.data.loader import SampleLoader
from minigpt.data.skip_list import SKIP_FILE
from minigpt.model.config import ModelConfig
from minigpt.model.decoder import Decoder
from minigpt.train.build import (
    Build,
    Sources,
    build,
    check_mesh,
    fit_minutes,
    open_sources,
    resolve_for,
    use_machine,
)
from minigpt.train.checkpoint import CheckpointStore, TrainState
from minigpt.train.config import TrainConfig
from minigpt.train.context import Member, Outputs, Speedometer
from minigpt.train.display import SilentDisplay, make_display, show_table
from minigpt.train.export_weights import model_files
from minigpt.train.faults import faults_from_environment
from minigpt.train.finish import open_result, save_result, write_final
from minigpt.train.interrupt import TrainingInterruptedError
from minigpt.train.loop import TrainLoop
from minigpt.train.machine import choose_device, measured_peak
from minigpt.train.mesh import Mesh, open_mesh
from minigpt.train.metrics import MetricsLog, SilentLog, read_metrics
from minigpt.train.precision import product_dtype
from minigpt.train.progress import Progress, beacon_path
from minigpt.train.restore import restore
from minigpt.train.sessions import (
    EVENTS_FILE,
    History,
    begin_line,
    close_session,
    end_line,
    read_history,
    session_start,
)
from minigpt.train.trackers import BackgroundTracker, make_tracker
from minigpt.train.world import World, collective_timeout, is_supervised

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
FINAL_FILE = "final.json"
CHECKPOINT_DIRECTORY = "checkpoints"
CHANGEABLE = ("mesh", "recovery")
"""Sections that a resumed run may have otherwise than it began."""


@dataclass(frozen=True)
class Ranks:
    """The processes of the run, and since when this one has worked on it."""

    world: World
    mesh: Mesh
    began: float


def train(
    config: TrainConfig,
    dataset: Artifact,
    run_dir: Path,
    *,
    clock: Clock | None = None,
    began: float | None = None,
) -> Artifact:
    """Start the run in `run_dir`, resume the one there, or return the finished one's model.

    Runs in this process, which may be one of several ranks (torchrun's variables say so).

    Args:
        config: The recipe, "auto" values and all.
        dataset: What `config.data` names, opened.
        run_dir: The run's directory; made if it is not there. All ranks see the same.
        clock: For durations.
        began: Unix time at which work on the run began; None is now.

    Returns:
        The model artifact at `run_dir/model`.

    Raises:
        ConfigError: A value can't work, or differs from that of the run in `run_dir`.
        TrainingInterruptedError: A signal stopped the run, which is saved.
        TrainingError: Loss or gradient is not finite, or another process holds the run.
        StorageError: A full disk or the like at the start or at the end.
    """
    run_dir, clock = run_dir.absolute(), clock or SystemClock()
    began = clock.now().timestamp() if began is None else began
    with open_mesh(config.mesh, choose_device(config.device), timeout=collective_timeout()) as mesh:
        world = World.joined()
        with hold_run(run_dir) if world.is_first and not is_supervised() else nullcontext():
            finished = world.from_first(lambda: find_finished(config, run_dir))
            if finished is not None:
                return finished
            return _train(config, dataset, run_dir, Ranks(world, mesh, began), clock)


def find_finished(config: TrainConfig, run_dir: Path) -> Artifact | None:
    """Return the model of a finished run, None where the run is not finished or not begun.

    Raises:
        ConfigError: The directory holds a run with another config.
        ArtifactError: The finished run's model is missing or corrupt.
    """
    stored = stored_config(run_dir)
    if stored is None:
        return None
    check_same(config, stored, run_dir)
    if not (run_dir / FINAL_FILE).exists():
        return None
    return open_result(run_dir, stored)


def read_final(run_dir: Path) -> dict[str, Any]:
    """Return the content of a finished run's `final.json`."""
    with storage_errors(f"read {run_dir / FINAL_FILE}"):
        content: dict[str, Any] = json.loads((run_dir / FINAL_FILE).read_bytes())
    return content


def stored_config(run_dir: Path) -> TrainConfig | None:
    """Read the resolved config of the run in a directory, None where it holds no run."""
    path = run_dir / CONFIG_FILE
    return load_config(TrainConfig, path) if path.exists() else None


def check_same(requested: TrainConfig, stored: TrainConfig, run_dir: Path) -> None:
    """Refuse to resume under another config; "auto" stands for whatever the run has.

    How many processes run it and how it recovers may change.

    Raises:
        ConfigError: Naming each key that differs.
    """
    differing = [
        f"{key} ({there!r} in the run, {wanted!r} asked for)"
        for key, wanted, there in resolved_values(requested, stored)
        if wanted != "auto"
        and not _is_open(requested, key)
        and key.partition(".")[0] not in CHANGEABLE
    ]
    if differing:
        raise ConfigError(
            f"{run_dir} holds a run with another config: {', '.join(differing)}",
            remedy="use the same values to resume it, or another --run-dir for a new run",
        )


def _is_open(requested: TrainConfig, key: str) -> bool:
    """Tell whether a model key was left to the weights that the run starts from."""
    section, _, name = key.partition(".")
    given = requested.model.model_fields_set
    return (
        section == "model"
        and requested.initialize_from is not None
        and name.partition(".")[0] not in given
    )


@contextmanager
def hold_run(run_dir: Path) -> Iterator[int]:
    """Hold the run directory; the system lets go of it when the process dies, however.

    Yields the descriptor: processes that inherit it hold the run as well.

    A start that was refused leaves no empty directory behind.
    """
    with storage_errors(f"write {run_dir}"):
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {run_dir}",
                remedy="wait for it, stop it, or use another --run-dir",
            ) from None
        yield descriptor
    finally:
        os.close(descriptor)
        with suppress(OSError):  # there is something in it
            run_dir.rmdir()


def _train(
    config: TrainConfig, dataset: Artifact, run_dir: Path, ranks: Ranks, clock: Clock
) -> Artifact:
    started, world = clock.monotonic(), ranks.world
    history = world.from_first(partial(_open_run, run_dir))
    sources = open_sources(config, dataset)
    stored = world.from_first(lambda: stored_config(run_dir))
    use_machine(stored or config)
    resolved = world.from_first(lambda: resolve_for(stored or config, sources))
    fixed, model_config = resolved.config, resolved.model
    if stored is None:
        for warning in resolved.warnings if world.is_first else ():
            get_logger("train").warning(warning)
    else:
        fixed = stored.replace(mesh=config.mesh, recovery=config.recovery)
        check_mesh(fixed, model_config)
    parts = build(fixed, model_config, sources, ranks.mesh)
    if fixed.steps == "auto":
        fixed = fit_minutes(fixed, parts, clock, started)
    if stored is None and world.is_first:
        show_resolved(config, fixed, model_config)
        if fixed.skip_list is not None:
            parts.loader.skip_list.write(run_dir / SKIP_FILE)
        write_atomic(run_dir / CONFIG_FILE, to_yaml(fixed).encode())
    began = session_start(history.sessions, ranks.began)
    progress = Progress(beacon_path(run_dir, world.rank), began=began)
    session = Session(run_dir, world, ranks.mesh, progress, history, began)
    return _run(fixed, parts, sources, session, clock)


@dataclass(frozen=True)
class Session:
    """One process's part in a run."""

    run_dir: Path
    world: World
    mesh: Mesh
    progress: Progress
    history: History
    began: float
    """Unix time."""


def _open_run(run_dir: Path) -> History:
    """Close the record of a session that was killed, and sum up what came before."""
    close_session(run_dir)
    return read_history(list(read_metrics(run_dir / EVENTS_FILE)))


def _run(
    config: TrainConfig, parts: Build, sources: Sources, session: Session, clock: Clock
) -> Artifact:
    outputs = _open_outputs(config, parts, sources, session)
    status = "failed"
    try:
        artifact = _train_to_the_end(config, parts, sources, session, outputs, clock)
        status = "finished"
    except (TrainingInterruptedError, KeyboardInterrupt):
        status = "interrupted"
        raise
    finally:
        now, phases = clock.now().timestamp(), session.progress.seconds()
        outputs.events.append(end_line(session.progress.step, status, now, phases))
        outputs.metrics.close()
        outputs.events.close()
        outputs.tracker.close(status)
        outputs.store.close()
    return artifact


def _train_to_the_end(
    config: TrainConfig,
    parts: Build,
    sources: Sources,
    session: Session,
    outputs: Outputs,
    clock: Clock,
) -> Artifact:
    run_dir, world, progress = session.run_dir, session.world, session.progress
    go_back = partial(restore, config, parts, sources, outputs, world)
    state = go_back()
    faults = faults_from_environment(world.rank, run_dir)
    if faults is not None:
        faults.weights = lambda: list(parts.model.parameters())
        progress.listeners.append(faults.strike)
    if parts.cut is None:
        progress.follow(parts.model)
    else:
        progress.follow_pipeline(parts.cut)
    begin = begin_line(session.history.sessions, state.step, world.size, session.began)
    outputs.events.append(begin)
    loop = TrainLoop(
        config,
        state,
        parts,
        outputs,
        Member(run_dir, world, session.mesh, progress, session.history, go_back),
        _speedometer(config, parts, world),
        sources.parents,
        clock,
    )
    checkpoint = loop.run()
    progress.enter("finish")
    model = parts.whole_model()
    finish = partial(
        _finish, config, model, sources, outputs, run_dir, parts.loader, loop.state, checkpoint
    )
    return world.from_first(finish)


def _open_outputs(config: TrainConfig, parts: Build, sources: Sources, session: Session) -> Outputs:
    run_dir, world = session.run_dir, session.world
    store = CheckpointStore(
        config.checkpoint.url or run_dir / CHECKPOINT_DIRECTORY,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        model_files=model_files(parts.model.config, sources.train.tokenizer_dir, config),
    )
    metrics, events = run_dir / METRICS_FILE, run_dir / EVENTS_FILE
    if not world.is_first:
        silent = (SilentLog(metrics), SilentLog(events), BackgroundTracker({}), SilentDisplay())
        return Outputs(store, *silent)
    return Outputs(
        store,
        MetricsLog(metrics),
        MetricsLog(events),
        make_tracker(config, run_dir),
        make_display(),
    )


def _speedometer(config: TrainConfig, parts: Build, world: World) -> Speedometer:
    assert isinstance(config.batch.sequence_length, int)
    peak = world.from_first(lambda: measured_peak(config.device, product_dtype(config.precision)))
    flops = parts.model.config.flops_per_token(config.batch.sequence_length)
    return Speedometer(flops, world.size * peak)


def _finish(
    config: TrainConfig,
    model: Decoder,
    sources: Sources,
    outputs: Outputs,
    run_dir: Path,
    loader: SampleLoader,
    state: TrainState,
    checkpoint: Artifact,
) -> Artifact:
    """Write the model and `final.json`, on rank 0."""
    outputs.metrics.flush()
    outputs.events.flush()
    skipped = loader.skip_list.num_samples
    artifact = save_result(
        run_dir,
        model,
        config,
        base=None if sources.initial is None else sources.initial.id,
        tokenizer_dir=sources.train.tokenizer_dir,
        metrics={"loss": state.loss, "skipped_samples": skipped, **state.validation},
        parents=[*sources.parents, checkpoint],
    )
    write_final(
        run_dir / FINAL_FILE,
        run_dir / METRICS_FILE,
        state,
        model,
        artifact,
        dataset_sha256=sources.fingerprint,
    )
    return artifact


def show_resolved(recipe: TrainConfig, resolved: TrainConfig, model: ModelConfig) -> None:
    """Print each derived value, and the sizes that follow from them."""
    rows = [
        (key, str(value), f"from size = {resolved.size}" if key.startswith("model.") else "auto")
        for key, old, value in resolved_values(recipe, resolved)
        if old == "auto"
    ]
    counts = model.parameter_counts()
    assert isinstance(resolved.steps, int) and isinstance(resolved.batch.tokens_per_step, int)
    tokens = resolved.steps * resolved.batch.tokens_per_step
    rows += [
        ("parameters", f"{counts.total:,}", f"{counts.matmul:,} in matrix products"),
        ("tokens", f"{tokens:,}", f"{tokens / counts.matmul:.1f} per matrix parameter"),
    ]
    show_table(f"run {resolved.name}", rows)
